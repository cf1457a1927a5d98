//! Updates of guests that are simulated: what they say, a test decides.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::*;
use crate::model::{Patch, PatchState};

/// How far the update of each microVM is, and what its guest says of it.
#[derive(Default)]
struct Guests(Mutex<BTreeMap<String, &'static str>>);

impl Guests {
    /// Guests that answer, in each of which an update runs until [`Guests::set`] says how it ended.
    fn new(simulation: &Simulation) -> Arc<Self> {
        let guests = Arc::new(Self::default());
        let answers = guests.clone();
        simulation.on_command(move |machine, argv| {
            let mut all = answers.0.lock().unwrap();
            match argv.get(4).map(String::as_str) {
                Some("start") if all.get(machine) == Some(&"unsupported") => {
                    Some(("unsupported\n".into(), 0))
                }
                Some("start") => {
                    all.entry(machine.to_owned()).or_insert("state running\noutput\nUnpacking\n");
                    Some((String::new(), 0))
                }
                Some("look") => Some((all.get(machine).copied().unwrap_or("state unknown\n").to_owned(), 0)),
                Some("cancel") => {
                    all.insert(machine.to_owned(), "state done\nexit 143\noutput\nTerminated\n");
                    Some((String::new(), 0))
                }
                _ => None,
            }
        });
        guests
    }

    fn set(&self, machine: &str, says: &'static str) {
        self.0.lock().unwrap().insert(machine.to_owned(), says);
    }
}

const DONE: &str = "state done\nexit 0\npackage libc6 1 2\noutput\nDone.\n";
const REBOOT: &str = "state done\nexit 0\nreboot required\npackage libc6 1 2\noutput\nDone.\n";

fn of(ids: &[&String], more: serde_json::Value) -> PatchInstances {
    let mut request = serde_json::json!({ "instance_ids": ids });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(request).unwrap()
}

async fn patched(service: &Service, id: &str, mut holds: impl FnMut(&Patch) -> bool) -> Arc<Patch> {
    let waiting = async {
        loop {
            let patch = service.patch(id).unwrap();
            if holds(&patch) {
                return patch;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(patch) => patch,
        Err(_) => panic!("never came to it: {:?}", service.patch(id)),
    }
}

#[tokio::test]
async fn each_instance_is_updated_reported_and_booted_anew_if_asked_to() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let guests = Guests::new(&simulation);
    let service = daemon(dir.path(), &simulation).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        let id = run_one(&service, serde_json::json!({"instance_type": "nano"})).await;
        until(&service, &id, |i| i.status.agent == Check::Ok).await;
        ids.push(id);
    }
    guests.set(&format!("{}-1", ids[2]), "unsupported");
    let request = of(&[&ids[0], &ids[1], &ids[2]], serde_json::json!({"reboot": true, "client_token": "t"}));
    let begun = service.patch_instances(request.clone()).await.unwrap();
    assert_eq!(begun.state, PatchState::Running);
    assert_eq!(service.patch_instances(request).await.unwrap().id, begun.id, "the same token begins nothing");
    let running = |patch: &Patch| patch.instances[0].message.as_deref() == Some("Unpacking");
    patched(&service, &begun.id, running).await;
    let twice = service.patch_instances(of(&[&ids[0]], serde_json::json!({}))).await;
    assert!(matches!(&twice, Err(Error::State { state, .. }) if state == "being updated"), "{twice:?}");

    guests.set(&format!("{}-1", ids[0]), REBOOT);
    guests.set(&format!("{}-1", ids[1]), DONE);
    let patch = patched(&service, &begun.id, |patch| patch.finished.is_some()).await;
    assert_eq!(patch.state, PatchState::Failed, "one of them could not be");
    let [first, second, third] = &patch.instances[..] else { panic!("{patch:?}") };
    assert_eq!(
        (first.state, first.rebooted, first.reboot_required),
        (PatchState::Succeeded, true, Some(true))
    );
    assert_eq!(service.get(&ids[0]).unwrap().generation, 2);
    assert_eq!((second.state, second.rebooted, second.exit_code), (PatchState::Succeeded, false, Some(0)));
    assert_eq!((second.packages[0].name.as_str(), second.output.as_str()), ("libc6", "Done.\n"));
    assert_eq!((third.state, third.exit_code), (PatchState::Failed, None));
    assert!(third.message.as_ref().unwrap().contains("no package manager"), "{third:?}");
}

#[tokio::test]
async fn an_update_outlives_the_daemon_that_began_it() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let guests = Guests::new(&simulation);
    let first = daemon(dir.path(), &simulation).await;
    let (a, b) = (
        run_one(&first, serde_json::json!({"instance_type": "nano"})).await,
        run_one(&first, serde_json::json!({"instance_type": "nano"})).await,
    );
    let begun = first.patch_instances(of(&[&a, &b], serde_json::json!({}))).await.unwrap();
    patched(&first, &begun.id, |patch| patch.instances.iter().all(|i| i.state == PatchState::Running)).await;
    first.let_go().await;
    // One ends meanwhile, the other's guest has forgotten it.
    guests.set(&format!("{a}-1"), DONE);
    guests.set(&format!("{b}-1"), "state unknown\n");
    drop(first);
    let second = daemon(dir.path(), &simulation).await;
    let patch = patched(&second, &begun.id, |patch| patch.finished.is_some()).await;
    assert_eq!(patch.instances[0].state, PatchState::Succeeded);
    assert_eq!(patch.instances[1].message.as_deref(), Some("the guest knows nothing of it any more"));
}

#[tokio::test]
async fn an_update_is_left_off_and_what_stops_under_it_is_told() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let guests = Guests::new(&simulation);
    let service = daemon(dir.path(), &simulation).await;
    // One more than are updated at once.
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(run_one(&service, serde_json::json!({"instance_type": "nano"})).await);
    }
    let all: Vec<&String> = ids.iter().collect();
    let begun = service.patch_instances(of(&all, serde_json::json!({}))).await.unwrap();
    let under_way = |patch: &Patch| patch.instances.iter().filter(|i| i.message.is_some()).count() == 4;
    let patch = patched(&service, &begun.id, under_way).await;
    let waits = patch.instances.iter().find(|i| i.state == PatchState::Pending).unwrap().instance_id.clone();
    let stops = ids.iter().find(|id| **id != waits).unwrap();
    service.stop(stops, StopInstance::default()).await.unwrap();
    patched(&service, &begun.id, |patch| patch.instances.iter().any(|i| i.state == PatchState::Failed)).await;
    service.cancel_patch(&begun.id).await.unwrap();
    let patch = patched(&service, &begun.id, |patch| patch.finished.is_some()).await;
    for entry in &patch.instances {
        let expected = if entry.instance_id == *stops { PatchState::Failed } else { PatchState::Cancelled };
        assert_eq!(entry.state, expected, "{entry:?}");
    }
    let stopped = service.patch_instances(of(&[stops], serde_json::json!({}))).await;
    assert!(matches!(stopped, Err(Error::State { .. })), "{stopped:?}");
    // It failed by itself.
    let again = &ids[ids.len() - 1];
    guests.set(&format!("{again}-1"), "state done\nexit 100\noutput\nE: no such mirror\n");
    let failed = service.patch_instances(of(&[again], serde_json::json!({}))).await.unwrap();
    let failed = patched(&service, &failed.id, |patch| patch.finished.is_some()).await;
    assert!(failed.instances[0].message.as_ref().unwrap().contains("exit code 100"), "{failed:?}");
    for wrong in [
        serde_json::json!({"instance_ids": []}),
        serde_json::json!({"instance_ids": [again, again]}),
        serde_json::json!({"instance_ids": [again], "timeout_seconds": 1}),
    ] {
        let refused = service.patch_instances(serde_json::from_value(wrong).unwrap()).await;
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{refused:?}");
    }
}
