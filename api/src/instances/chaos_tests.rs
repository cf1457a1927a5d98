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

/// What was acknowledged of something last.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Promise {
    /// Of instances.
    Runs,
    Stopped,
    Terminated,
    /// Of volumes and snapshots: it was made; it is about to be deleted, or was, by a daemon that died before it could
    /// say so; it was deleted.
    Made,
    InDoubt,
    Deleted,
}

/// Asks for this and that until it is killed; tells what was acknowledged.
async fn work(service: Service, seed: u64, acknowledged: mpsc::Sender<(String, Promise)>) {
    let mut dice = Dice(seed);
    loop {
        let ids: Vec<String> = service.host.records.read().instances.iter().map(|i| i.id.clone()).collect();
        let some = ids.get(dice.below(ids.len().max(1) as u64) as usize).cloned();
        let done = match (dice.below(10), some) {
            (0 | 1, _) | (_, None) => {
                let more = match dice.below(3) {
                    0 => serde_json::json!({"instance_type": "nano", "volumes": [{"size_gib": 1}]}),
                    _ => serde_json::json!({"instance_type": "nano"}),
                };
                match service.run(request(more)).await {
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
            (5, Some(id)) => service.terminate(&id).await.ok().map(|_| (id, Promise::Terminated)),
            (_, Some(id)) => with_volumes(&service, &mut dice, id, &acknowledged).await,
        };
        if let Some(done) = done {
            let _ = acknowledged.send(done);
        }
        tokio::task::yield_now().await;
    }
}

/// Does something to volumes and snapshots.
async fn with_volumes(
    service: &Service,
    dice: &mut Dice,
    instance: String,
    acknowledged: &mpsc::Sender<(String, Promise)>,
) -> Option<(String, Promise)> {
    let (volume, snapshot) = {
        let tables = service.host.records.read();
        let volumes: Vec<String> = tables.volumes.iter().map(|volume| volume.id.clone()).collect();
        let snapshots: Vec<String> = tables.snapshots.iter().map(|snapshot| snapshot.id.clone()).collect();
        let mut some = |ids: &[String]| ids.get(dice.below(ids.len().max(1) as u64) as usize).cloned();
        (some(&volumes), some(&snapshots))
    };
    let make = async |request: serde_json::Value| {
        let made = service.create_volume(serde_json::from_value(request).unwrap()).await;
        made.ok().map(|volume| (volume.id.clone(), Promise::Made))
    };
    match (dice.below(8), volume, snapshot) {
        (0, ..) | (_, None, _) => make(serde_json::json!({"size_gib": 1})).await,
        (1, _, Some(snapshot)) => make(serde_json::json!({"snapshot_id": snapshot})).await,
        (2, Some(volume), _) => {
            let delete_on_termination = dice.below(2) == 0;
            let to = AttachVolume { instance_id: instance, delete_on_termination };
            let _ = service.attach_volume(&volume, &to).await;
            None
        }
        (3, Some(volume), _) => {
            let _ = service.detach_volume(&volume).await;
            None
        }
        (4, Some(volume), _) => {
            let grown = ModifyVolume { size_gib: Some(1 + dice.below(3)), ..Default::default() };
            let _ = service.modify_volume(&volume, &grown).await;
            None
        }
        (5, Some(volume), _) => service.delete_volume(&volume).await.ok().map(|_| (volume, Promise::Deleted)),
        (6, _, Some(snapshot)) => {
            let _ = acknowledged.send((snapshot.clone(), Promise::InDoubt));
            service.delete_snapshot(&snapshot).await.ok().map(|()| (snapshot, Promise::Deleted))
        }
        (_, Some(volume), _) => {
            let request = serde_json::from_value(serde_json::json!({"volume_id": volume})).unwrap();
            let taken = service.create_snapshot(request).await;
            taken.ok().map(|snapshot| (snapshot.id.clone(), Promise::Made))
        }
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
            let (is_volume, is_snapshot) = (id.starts_with("vol-"), id.starts_with("snap-"));
            if is_volume || is_snapshot {
                let there = || {
                    let tables = service.host.records.read();
                    tables.volumes.get(id).is_some() || tables.snapshots.get(id).is_some()
                };
                // A volume that was made may have gone with its instance, as it was to.
                match promise {
                    Promise::Deleted => {
                        let gone = async {
                            while there() {
                                tokio::time::sleep(Duration::from_millis(2)).await;
                            }
                        };
                        assert!(tokio::time::timeout(PATIENCE, gone).await.is_ok(), "{id} was deleted");
                    }
                    Promise::Made => assert!(is_volume || there(), "{id} was made"),
                    _ => {}
                }
                continue;
            }
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
    for machine in &machines {
        match simulation.state(machine) {
            Some(crate::microvm::State::Running) => {}
            state => return Err(format!("{machine} does not go on: {state:?}")),
        }
    }
    storage_invariants(dir, &tables)
}

/// What holds of volumes and snapshots whenever nothing is under way.
fn storage_invariants(dir: &Path, tables: &crate::records::Tables) -> Result<(), String> {
    use crate::model::{SnapshotState, VolumeState};
    let files = |name: &str| -> BTreeSet<String> {
        let files = std::fs::read_dir(dir.join(name)).unwrap().flatten();
        let files = files.map(|file| file.file_name().to_string_lossy().into_owned());
        files.filter_map(|name| Some(name.strip_suffix(".raw")?.to_owned())).collect()
    };
    let (volumes, snapshots) = (files("volumes"), files("snapshots"));
    let mut places = BTreeSet::new();
    for volume in tables.volumes.iter() {
        let id = &volume.id;
        let instance = volume.attachment.as_ref().map(|attachment| &attachment.instance_id);
        let instance = instance.map(|instance| tables.instances.get(instance));
        match (volume.state, instance) {
            (VolumeState::Available, None) => {}
            (VolumeState::InUse, Some(Some(instance))) if instance.state != InstanceState::Terminated => {}
            (state, instance) => return Err(format!("volume {id} is {state:?}, of {instance:?}")),
        }
        if let Some(attachment) = &volume.attachment
            && !places.insert((attachment.instance_id.clone(), attachment.index))
        {
            return Err(format!("two volumes are in the place of {id}"));
        }
        let is_root = tables.instances.iter().any(|instance| instance.root_volume == *id);
        // A root disk is made at the first boot; one stopped before that has none yet.
        let size = std::fs::metadata(dir.join(format!("volumes/{id}.raw"))).map(|meta| meta.len());
        let is_right = size.as_ref().is_ok_and(|size| *size == volume.size);
        let is_to_come = is_root && !volumes.contains(id);
        if !is_right && !is_to_come {
            return Err(format!("volume {id} has {} bytes, and on the disk {size:?}", volume.size));
        }
    }
    for instance in tables.instances.iter().filter(|i| i.state != InstanceState::Terminated) {
        if tables.volumes.get(&instance.root_volume).is_none_or(|root| !root.is_attached_to(&instance.id)) {
            return Err(format!("instance {} has lost its root disk", instance.id));
        }
    }
    if let Some(file) = volumes.iter().find(|file| tables.volumes.get(file).is_none()) {
        return Err(format!("disk {file} belongs to nothing"));
    }
    let taken = tables.snapshots.iter().filter(|snapshot| snapshot.state == SnapshotState::Completed);
    let taken: BTreeSet<String> = taken.map(|snapshot| snapshot.id.clone()).collect();
    if let Some(pending) = tables.snapshots.iter().find(|s| s.state == SnapshotState::Pending) {
        return Err(format!("snapshot {} is pending", pending.id));
    }
    match taken.symmetric_difference(&snapshots).next() {
        Some(odd) => Err(format!("snapshot {odd}: only its record or only its file is there")),
        None => Ok(()),
    }
}
