//! Daemons that are killed at any moment, one after the other, and what must hold whatever was going on.
//!
//! A daemon is a runtime of its own, which is shut down: its tasks end wherever they wait, as with SIGKILL. The
//! store, the disks and the simulated host outlive it. Its threads are waited for, since a process has none left
//! when it is dead; one that was still at it would do things to the host that no daemon can have done.

use std::collections::BTreeSet;
use std::sync::mpsc;

use super::*;

/// Numbers that differ, and are the same each time (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What was acknowledged of an instance last.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Promise {
    Runs,
    Stopped,
    Terminated,
}

/// Asks for this and that until it is killed; tells what was acknowledged.
async fn work(service: Service, seed: u64, acknowledged: mpsc::Sender<(String, Promise)>) {
    let mut dice = Dice(seed);
    loop {
        let ids: Vec<String> = service.host.records.read().instances.iter().map(|i| i.id.clone()).collect();
        let some = ids.get(dice.below(ids.len().max(1) as u64) as usize).cloned();
        let done = match (dice.below(6), some) {
            (0 | 1, _) | (_, None) => {
                match service.run(request(serde_json::json!({"instance_type": "nano"}))).await {
                    Ok(ran) => Some((ran[0].id.clone(), Promise::Runs)),
                    Err(Error::NoCapacity(_)) => None,
                    Err(error) => panic!("{error}"),
                }
            }
            (2, Some(id)) => {
                service.stop(&id, StopInstance::default()).await.ok().map(|_| (id, Promise::Stopped))
            }
            (3, Some(id)) => service.start(&id).await.ok().map(|_| (id, Promise::Runs)),
            (4, Some(id)) => service.reboot(&id).await.ok().map(|_| (id, Promise::Runs)),
            (_, Some(id)) => service.terminate(&id).await.ok().map(|_| (id, Promise::Terminated)),
        };
        if let Some(done) = done {
            let _ = acknowledged.send(done);
        }
        tokio::task::yield_now().await;
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn whatever_a_daemon_is_doing_when_it_is_killed() {
    const KILLS: u64 = 200;
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let mut promises = std::collections::HashMap::new();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    for round in 0..KILLS {
        let (sender, acknowledged) = mpsc::channel();
        let (path, host, seed) = (dir.path().to_owned(), simulation.clone(), dice.below(u64::MAX) | 1);
        let life = Duration::from_micros(dice.below(30_000));
        let runtime = runtime();
        let living = async move {
            let service = daemon(&path, &host).await;
            let _ = tokio::time::timeout(life, work(service, seed, sender)).await;
        };
        runtime.block_on(living);
        runtime.shutdown_timeout(PATIENCE);
        promises.extend(acknowledged.try_iter());
        if round % 20 == 19 {
            settle(dir.path(), &simulation, &promises);
        }
    }
    assert!(promises.len() > 20, "it did something: {}", promises.len());
}

/// One more daemon, which is left alone, comes to what was promised.
fn settle(dir: &Path, simulation: &Simulation, promises: &std::collections::HashMap<String, Promise>) {
    let runtime = runtime();
    runtime.block_on(async {
        let service = daemon(dir, simulation).await;
        for (id, promise) in promises {
            // One whose last answer was lost on the way may have come further than was heard.
            let settled = until(&service, id, |instance| {
                matches!(
                    (instance.desired, instance.state),
                    (Desired::Running, InstanceState::Running)
                        | (Desired::Stopped, InstanceState::Stopped)
                        | (Desired::Terminated, InstanceState::Terminated)
                )
            });
            let settled = settled.await;
            if *promise == Promise::Terminated {
                assert_eq!(settled.state, InstanceState::Terminated, "{id}");
            }
        }
        let holds = async {
            while let Err(problem) = invariants(dir, simulation, &service) {
                tokio::time::sleep(Duration::from_millis(5)).await;
                let _ = problem;
            }
        };
        if tokio::time::timeout(PATIENCE, holds).await.is_err() {
            panic!("{}", invariants(dir, simulation, &service).unwrap_err());
        }
    });
    runtime.shutdown_timeout(PATIENCE);
}

/// What holds whenever nothing is under way.
fn invariants(dir: &Path, simulation: &Simulation, service: &Service) -> Result<(), String> {
    let tables = service.host.records.read().clone();
    let alive = || tables.instances.iter().filter(|i| i.state != InstanceState::Terminated);
    let machines: BTreeSet<String> = simulation.list().into_iter().collect();
    let running = alive().filter(|i| i.state == InstanceState::Running);
    let wanted: BTreeSet<String> = running.map(|i| launch::machine_id(&i.id, i.generation)).collect();
    if machines != wanted {
        let odd = machines.symmetric_difference(&wanted);
        let odd = odd.map(|id| (id, launch::of_machine(id).and_then(|(id, _)| tables.instances.get(id))));
        return Err(format!("not both there and wanted: {:#?}", odd.collect::<Vec<_>>()));
    }
    let addresses: BTreeSet<_> = alive().map(|i| i.interface.private_address).collect();
    if addresses.len() != alive().count() {
        return Err("an address was given twice".into());
    }
    let files = std::fs::read_dir(dir.join("volumes")).unwrap().flatten();
    let files = files.map(|file| file.file_name().to_string_lossy().into_owned());
    let files: BTreeSet<String> =
        files.filter_map(|name| Some(name.strip_suffix(".raw")?.to_owned())).collect();
    let disks: BTreeSet<String> = alive().map(|i| i.root_volume.clone()).collect();
    let records: BTreeSet<String> = tables.volumes.iter().map(|v| v.id.clone()).collect();
    if records != disks {
        return Err(format!("there are records of disks {records:?}, and instances have {disks:?}"));
    }
    // A disk is made at the first boot; one stopped before that has none yet.
    match files.difference(&records).next() {
        Some(file) => Err(format!("disk {file} belongs to nothing")),
        None => Ok(()),
    }
}
