//! The service over a simulated host: real records, disks and drivers, pretended microVMs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::files::Task;
use crate::image::{Architecture, Images, Manifest, Root};
use crate::microvm::Machines;
use crate::microvm::sim::{self, At, Fault, How, Simulation};
use crate::model::{Check, Desired, Image, ImageState, Instance, InstanceState, ShutdownBehavior, id};
use crate::records::Records;
use crate::store::Embedded;
use crate::volume::Volumes;

use super::*;

#[path = "ports_tests.rs"]
mod ports_tests;

#[path = "chaos_tests.rs"]
mod chaos;
#[path = "patch_tests.rs"]
mod patching;
#[path = "storage_tests.rs"]
mod storage;

/// Longer than anything in here takes.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) async fn host(dir: &Path, simulation: &Simulation) -> Host {
    let store = loop {
        // The daemon before lets go of its store when its last task has ended.
        match Embedded::open(&dir.join("store.redb")) {
            Ok(store) => break store,
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    Host {
        records: Records::open(Arc::new(store)).await.unwrap(),
        machines: Machines::Simulated(simulation.clone()),
        wiring: Wiring::Unconnected,
        images: Images::open(dir, crate::image::Limits::default(), 0).unwrap(),
        volumes: Volumes::open(dir, 0).unwrap(),
        agent: Some(dir.join("agent")),
        limits: Arc::new(Limits {
            vcpus: 8,
            memory_mib: 2048,
            stop_within: Duration::from_secs(2),
            retry_after: Duration::from_millis(2),
            check_every: Duration::from_millis(20),
            terminated_visible: Duration::from_secs(3600),
        }),
        logs: dir.to_owned(),
        jailed: false,
    }
}

/// A daemon with an image named `tiny`.
pub(crate) async fn daemon(dir: &Path, simulation: &Simulation) -> Service {
    let service = Service::open(host(dir, simulation).await).await.unwrap();
    if service.images().is_empty() {
        let file = dir.join("disk");
        std::fs::write(&file, vec![7; 1 << 20]).unwrap();
        let blob = service.host.images.blobs().add_file(&file, &Task::quiet()).unwrap();
        let image = Image {
            id: id::new(id::IMAGE),
            name: "tiny".into(),
            description: String::new(),
            state: ImageState::Available,
            state_reason: None,
            state_code: None,
            progress: None,
            source: None,
            created: service.host.now(),
            size: 1 << 20,
            manifest: Some(Manifest {
                architecture: Architecture::host(),
                created: 0,
                kernel: blob,
                initrd: None,
                boot_args: String::new(),
                root: Root::Disk { blob, device: "/dev/vda".into() },
                container: None,
            }),
            tags: Default::default(),
        };
        let create = |_: &crate::records::Tables, changes: &mut crate::records::Changes| {
            changes.create(&image);
            Ok::<_, Error>(())
        };
        service.host.records.update(create).await.unwrap();
    }
    service
}

fn request(more: serde_json::Value) -> RunInstances {
    let mut request = serde_json::json!({"image": "tiny", "root_size_gib": 1});
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(request).unwrap()
}

async fn run_one(service: &Service, more: serde_json::Value) -> String {
    let id = service.run(request(more)).await.unwrap()[0].id.clone();
    reaches(service, &id, InstanceState::Running).await;
    id
}

async fn reaches(service: &Service, id: &str, state: InstanceState) -> Arc<Instance> {
    until(service, id, |instance| instance.state == state).await
}

async fn until(service: &Service, id: &str, mut holds: impl FnMut(&Instance) -> bool) -> Arc<Instance> {
    let waiting = async {
        loop {
            let instance = service.get(id).unwrap();
            if holds(&instance) {
                return instance;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, waiting).await {
        Ok(instance) => instance,
        Err(_) => panic!("never came to it: {:?}", service.get(id)),
    }
}

#[tokio::test]
async fn an_instance_runs_stops_starts_reboots_and_is_terminated() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let ran = service.run(request(serde_json::json!({"tags": {"Name": "Web-1"}}))).await.unwrap();
    assert_eq!((ran.len(), ran[0].state, ran[0].hostname.as_str()), (1, InstanceState::Pending, "web-1"));
    assert_eq!(ran[0].interface.private_address.to_string(), "10.77.0.4");
    let id = ran[0].id.clone();
    let running = until(&service, &id, |i| i.status.agent == Check::Ok).await;
    assert_eq!(running.state, InstanceState::Running);
    assert!(running.boot.unwrap().agent_us.is_some());
    let disk = service.host.volumes.path(&running.root_volume).unwrap();
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 1 << 30);
    let (output, truncated) =
        service.exec(&id, vec!["echo".into(), "hi".into()], String::new(), None, PATIENCE).await.unwrap();
    assert!(output.status.success() && !truncated);

    let rebooted = service.reboot(&id).await.unwrap();
    assert_eq!((rebooted.state, rebooted.generation), (InstanceState::Running, 2));
    assert_eq!(rebooted.status.agent, Check::Initializing, "the boot before does not count");
    until(&service, &id, |_| simulation.list() == [format!("{id}-2")]).await;

    assert_eq!(service.stop(&id, StopInstance::default()).await.unwrap().state, InstanceState::Stopping);
    let stopped = reaches(&service, &id, InstanceState::Stopped).await;
    assert_eq!(stopped.state_reason.as_ref().unwrap().code, "Client.UserInitiatedShutdown");
    assert_eq!((simulation.list().len(), stopped.status.vmm), (0, Check::NotApplicable));
    assert_eq!(stopped.interface, running.interface, "it keeps its address");
    assert!(service.exec(&id, vec!["true".into()], String::new(), None, PATIENCE).await.is_err());

    assert_eq!(service.start(&id).await.unwrap().state, InstanceState::Pending);
    reaches(&service, &id, InstanceState::Running).await;
    service.terminate(&id).await.unwrap();
    reaches(&service, &id, InstanceState::Terminated).await;
    until(&service, &id, |_| !disk.exists()).await;
    until(&service, &id, |_| service.host.records.read().volumes.is_empty()).await;
    assert!(simulation.list().is_empty());
    assert!(matches!(service.start(&id).await, Err(Error::State { .. })));
}

#[tokio::test]
async fn a_request_is_fulfilled_whole_or_not_at_all_and_once() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let small = |more: serde_json::Value| {
        let mut request = request(serde_json::json!({"instance_type": "small"}));
        request.client_token = more["token"].as_str().map(str::to_owned);
        request.min_count = more["min"].as_u64().map(|n| n as u32);
        request.max_count = more["max"].as_u64().map(|n| n as u32);
        request
    };
    // There is room for four.
    let too_many = service.run(small(serde_json::json!({"min": 5}))).await;
    assert!(matches!(too_many, Err(Error::NoCapacity(_))), "{too_many:?}");
    assert!(service.host.records.read().instances.is_empty());
    let some = service.run(small(serde_json::json!({"min": 2, "max": 10, "token": "t"}))).await.unwrap();
    assert_eq!(some.len(), 4);
    let again = service.run(small(serde_json::json!({"min": 2, "max": 10, "token": "t"}))).await.unwrap();
    assert_eq!(
        again.iter().map(|i| &i.id).collect::<Vec<_>>(),
        some.iter().map(|i| &i.id).collect::<Vec<_>>()
    );
    let other = service.run(small(serde_json::json!({"min": 1, "token": "t"}))).await;
    assert!(matches!(other, Err(Error::TokenReused(_))));
    let full = service.run(small(serde_json::json!({"min": 1}))).await;
    assert!(matches!(full, Err(Error::NoCapacity(_))));
    // A stopped one makes room, which another can take.
    let first = &some[0].id;
    reaches(&service, first, InstanceState::Running).await;
    service.stop(first, StopInstance { force: true }).await.unwrap();
    reaches(&service, first, InstanceState::Stopped).await;
    service.run(small(serde_json::json!({"min": 1}))).await.unwrap();
    assert!(matches!(service.start(first).await, Err(Error::NoCapacity(_))));
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let refusal = async |more: serde_json::Value| service.run(request(more)).await.unwrap_err().to_string();
    let long = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, vec![b'a'; 16385]);
    for (more, named) in [
        (serde_json::json!({"image": "nope"}), "image \"nope\""),
        (serde_json::json!({"instance_type": "huge"}), "instance type \"huge\""),
        (serde_json::json!({"instance_type": "custom"}), "vcpus and memory_mib"),
        (
            serde_json::json!({"instance_type": "custom", "vcpus": 33, "memory_mib": 128}),
            "vcpus: must be 1 to 32",
        ),
        (serde_json::json!({"key_name": "me"}), "key pair \"me\""),
        (serde_json::json!({"network": "far"}), "network \"far\""),
        (serde_json::json!({"security_groups": ["open"]}), "security group \"open\""),
        (serde_json::json!({"private_address": "10.77.0.1"}), "10.77.0.1"),
        (serde_json::json!({"private_address": "10.78.0.9"}), "10.78.0.9"),
        (serde_json::json!({"user_data": "%%%"}), "user_data: must be base64"),
        (serde_json::json!({"user_data": long}), "16384"),
        (serde_json::json!({"min_count": 0}), "min_count"),
        (serde_json::json!({"min_count": 2, "max_count": 1}), "max_count"),
        (serde_json::json!({"root_size_gib": 0}), "root_size_gib"),
        (serde_json::json!({"client_token": ""}), "client_token"),
        (serde_json::json!({"dry_run": true}), "dry_run"),
    ] {
        let message = refusal(more.clone()).await;
        assert!(message.contains(named), "{more}: {message}");
    }
    let taken = serde_json::json!({"private_address": "10.77.0.77"});
    service.run(request(taken.clone())).await.unwrap();
    assert!(refusal(taken).await.contains("10.77.0.77 is in use"));
    assert_eq!(service.host.records.read().instances.len(), 1);
}

#[tokio::test]
async fn what_the_guest_does_is_seen() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let stops = run_one(&service, serde_json::json!({})).await;
    let goes = run_one(&service, serde_json::json!({"shutdown_behavior": "terminate"})).await;
    assert_eq!(service.get(&goes).unwrap().shutdown_behavior, ShutdownBehavior::Terminate);
    for id in [&stops, &goes] {
        assert!(simulation.end(&format!("{id}-1"), sim::POWER_OFF));
    }
    let stopped = reaches(&service, &stops, InstanceState::Stopped).await;
    assert_eq!(stopped.state_reason.as_ref().unwrap().code, "Client.InstanceInitiatedShutdown");
    reaches(&service, &goes, InstanceState::Terminated).await;

    let reboots = run_one(&service, serde_json::json!({})).await;
    assert!(simulation.end(&format!("{reboots}-1"), sim::REBOOT));
    until(&service, &reboots, |i| i.generation == 2 && i.state == InstanceState::Running).await;
    until(&service, &reboots, |_| simulation.list() == [format!("{reboots}-2")]).await;
}

#[tokio::test]
async fn what_fails_is_started_again_and_given_up_at_last() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let id = run_one(&service, serde_json::json!({})).await;
    assert!(simulation.end(&format!("{id}-1"), sim::PANIC));
    until(&service, &id, |i| i.state_reason.as_ref().is_some_and(|why| why.message.contains("panicked")))
        .await;
    until(&service, &id, |_| simulation.list() == [format!("{id}-2")]).await;
    until(&service, &id, |i| i.status.vmm == Check::Ok).await;

    let fault = |how| Fault { at: At::Start, how, id: None, times: usize::MAX };
    simulation.inject(fault(How::Fail("no memory".into())));
    let doomed = service.run(request(serde_json::json!({}))).await.unwrap()[0].id.clone();
    let stopped = reaches(&service, &doomed, InstanceState::Stopped).await;
    let why = stopped.state_reason.as_ref().unwrap();
    assert!(why.code == "Server.InternalError" && why.message.contains("no memory"), "{why:?}");
}

#[tokio::test]
async fn a_daemon_that_is_gone_is_followed_by_one_that_takes_over() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let first = daemon(dir.path(), &simulation).await;
    let runs = run_one(&first, serde_json::json!({})).await;
    let powers_off = run_one(&first, serde_json::json!({})).await;
    let (stops, gone) =
        (run_one(&first, serde_json::json!({})).await, run_one(&first, serde_json::json!({})).await);
    first.let_go().await;
    assert_eq!(simulation.list().len(), 4, "they run on");
    simulation.end(&format!("{powers_off}-1"), sim::POWER_OFF);
    // What was acknowledged and not done yet.
    let want = |desired, state| {
        move |instance: &mut Instance| {
            instance.desired = desired;
            instance.state = state;
            Ok::<_, Error>(())
        }
    };
    first.host.records.modify(&stops, want(Desired::Stopped, InstanceState::Stopping)).await.unwrap();
    first.host.records.modify(&gone, want(Desired::Terminated, InstanceState::ShuttingDown)).await.unwrap();
    std::fs::write(dir.path().join("volumes/vol-0123456789abcdef0.raw"), "x").unwrap();
    drop(first);

    let second = daemon(dir.path(), &simulation).await;
    assert_eq!(second.get(&runs).unwrap().state, InstanceState::Running);
    reaches(&second, &stops, InstanceState::Stopped).await;
    reaches(&second, &gone, InstanceState::Terminated).await;
    reaches(&second, &powers_off, InstanceState::Stopped).await;
    until(&second, &runs, |_| simulation.list() == [format!("{runs}-1")]).await;
    assert!(!dir.path().join("volumes/vol-0123456789abcdef0.raw").exists(), "it belonged to nothing");
    second.stop(&runs, StopInstance::default()).await.unwrap();
    reaches(&second, &runs, InstanceState::Stopped).await;
    // The record of a disk goes after the state of its instance has changed.
    until(&second, &gone, |_| second.host.records.read().volumes.len() == 3).await;
}

/// Time moves by itself here, and by leaps: it is bounded by the clock on the wall.
async fn in_time(service: &Service, id: &str, mut holds: impl FnMut(&Instance) -> bool) -> Arc<Instance> {
    let begun = std::time::Instant::now();
    loop {
        let instance = service.get(id).unwrap();
        if holds(&instance) {
            return instance;
        }
        assert!(begun.elapsed() < PATIENCE, "never came to it: {instance:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_answer_any_more_is_impaired_and_booted_anew() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let mut events = service.host.records.subscribe();
    let run = async |more| {
        let id = service.run(request(more)).await.unwrap()[0].id.clone();
        in_time(&service, &id, |i| i.status.agent == Check::Ok).await;
        id
    };
    let recovers = run(serde_json::json!({})).await;
    let stays = run(serde_json::json!({"auto_recovery": false})).await;
    for id in [&recovers, &stays] {
        simulation.inject(Fault::always(At::Agent, How::Fail("wedged".into()), &format!("{id}-1")));
    }
    in_time(&service, &stays, |i| i.status.agent == Check::Impaired).await;
    let back = in_time(&service, &recovers, |i| i.generation == 2 && i.status.agent == Check::Ok).await;
    assert_eq!((back.state, back.status.vmm), (InstanceState::Running, Check::Ok));
    assert!(simulation.list().contains(&format!("{recovers}-2")));
    let stayed = service.get(&stays).unwrap();
    assert_eq!((stayed.generation, stayed.status.vmm), (1, Check::Ok));
    // What was seen of it, in order.
    let mut seen = Vec::new();
    while let Ok(change) = events.try_recv() {
        if let AnyRecord::Instance { new: Some(new), .. } = change.record
            && new.id == recovers
        {
            seen.push((new.status.agent, new.state_reason.clone().map(|why| why.code)));
        }
    }
    assert!(seen.contains(&(Check::Impaired, None)), "{seen:?}");
    assert!(seen.contains(&(Check::Initializing, Some("Server.Unresponsive".into()))), "{seen:?}");
    // A VMM that does not answer is as bad.
    simulation.inject(Fault::always(At::Request, How::Fail("wedged".into()), &format!("{recovers}-2")));
    in_time(&service, &recovers, |i| i.generation == 3 && i.status.vmm == Check::Ok).await;
}

#[tokio::test]
async fn protection_holds_until_it_is_taken_back() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let service = daemon(dir.path(), &simulation).await;
    let id = run_one(&service, serde_json::json!({"termination_protection": true})).await;
    assert!(matches!(service.terminate(&id).await, Err(Error::Protected(_))));
    let modify = |json| serde_json::from_value::<ModifyInstance>(json).unwrap();
    let resize = modify(serde_json::json!({"instance_type": "small"}));
    assert!(matches!(service.modify(&id, &resize).await, Err(Error::State { .. })), "it runs");
    service.modify(&id, &modify(serde_json::json!({"termination_protection": false}))).await.unwrap();
    service.stop(&id, StopInstance::default()).await.unwrap();
    reaches(&service, &id, InstanceState::Stopped).await;
    assert_eq!(service.modify(&id, &resize).await.unwrap().size.memory_mib, 512);
    service.terminate(&id).await.unwrap();
    reaches(&service, &id, InstanceState::Terminated).await;
}

#[tokio::test]
async fn a_machine_that_outlived_its_instance_is_ended() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let first = daemon(dir.path(), &simulation).await;
    let id = run_one(&first, serde_json::json!({})).await;
    first.let_go().await;
    // As where the host could not end it, or the daemon ended in the middle.
    let terminated = |instance: &mut Instance| {
        instance.desired = Desired::Terminated;
        instance.state = InstanceState::Terminated;
        Ok::<_, Error>(())
    };
    first.host.records.modify(&id, terminated).await.unwrap();
    drop(first);
    let second = daemon(dir.path(), &simulation).await;
    until(&second, &id, |_| simulation.list().is_empty()).await;
    until(&second, &id, |_| second.host.records.read().volumes.is_empty()).await;
}

#[tokio::test]
async fn a_daemon_that_ends_in_the_middle_of_a_stop_does_not_say_it_is_done() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let first = daemon(dir.path(), &simulation).await;
    let id = run_one(&first, serde_json::json!({})).await;
    simulation.inject(Fault::always(At::Stop, How::Hang, &format!("{id}-1")));
    first.stop(&id, StopInstance::default()).await.unwrap();
    let machine = first.machine(&id).unwrap();
    let stopping = async {
        while !matches!(machine.state(), crate::microvm::State::Stopping) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, stopping).await.unwrap();
    first.let_go().await;
    assert_eq!(first.get(&id).unwrap().state, InstanceState::Stopping);
    assert_eq!(simulation.list(), [format!("{id}-1")], "it runs on");
    drop((first, machine));
    let second = daemon(dir.path(), &simulation).await;
    reaches(&second, &id, InstanceState::Stopped).await;
    assert!(simulation.list().is_empty());
}
