//! Lives of simulated microVMs, with the clock moved.

use std::time::Instant as WallTime;

use pulau_agent_protocol::message::{CopyIn, ExecRequest, ExitStatus};
use pulau_vmm::config::{BootSourceConfig, VmConfig, VsockConfig};

use super::*;
use crate::microvm::{GuestError, Machines, Reason, RequestError, StartError, State, Stop};

const GRACE: Duration = Duration::from_secs(30);
const MINUTE: Duration = Duration::from_secs(60);

fn spec(id: &str) -> Spec {
    let mut vm = VmConfig::default();
    vm.set_boot_source(BootSourceConfig { kernel_image_path: "/k".into(), ..Default::default() }).unwrap();
    vm.set_vsock(VsockConfig { guest_cid: 3, uds_path: "v".into(), vsock_id: None }).unwrap();
    Spec { id: id.into(), vm, ..Default::default() }
}

fn slow() -> Simulation {
    let seconds = Duration::from_secs;
    Simulation::with_times(Times { start: seconds(1), agent: seconds(2), stop: seconds(3) })
}

#[tokio::test(start_paused = true)]
async fn a_whole_life_takes_simulated_time_only() {
    let (sim, begun, wall) = (slow(), Instant::now(), WallTime::now());
    let vm = sim.create(spec("a"));
    assert!(matches!(vm.pause().await, Err(RequestError::NotRunning)));
    vm.started().await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let mut agent = vm.agent(MINUTE).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(3));
    let health = tokio::task::spawn_blocking(move || agent.health()).await.unwrap().unwrap();
    assert_eq!(health.id.as_deref(), Some("a"));
    vm.pause().await.unwrap();
    assert!(matches!(vm.state(), State::Paused));
    vm.resume().await.unwrap();
    vm.put_metadata(serde_json::json!({"a": 1, "b": {"c": 2}})).await.unwrap();
    vm.patch_metadata(serde_json::json!({"a": null, "b": {"d": 3}})).await.unwrap();
    assert_eq!(sim.metadata("a").unwrap(), serde_json::json!({"b": {"c": 2, "d": 3}}));
    sim.set_cpu_load("a", 2.0);
    let before = vm.usage().await.unwrap().cpu_time_us;
    tokio::time::sleep(MINUTE).await;
    let used = vm.usage().await.unwrap().cpu_time_us - before;
    assert!((120_000_000..120_100_000).contains(&used), "{used}");
    let ending = vm.stop(Stop::Orderly { grace: GRACE }).await;
    assert!(matches!(ending.reason, Reason::PoweredOff), "{}", ending.reason);
    assert!(sim.list().is_empty());
    assert!(wall.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn the_agent_runs_commands_and_keeps_files() {
    let vm = Simulation::new().create(spec("a"));
    let run = |vm: MicroVm, words: &'static [&'static str]| async move {
        let agent = vm.agent(MINUTE).await.unwrap();
        let argv = words.iter().map(|word| (*word).to_owned()).collect();
        let request = ExecRequest { argv, ..Default::default() };
        let output = tokio::task::spawn_blocking(move || agent.output(&request, &[]));
        output.await.unwrap().unwrap()
    };
    let output = run(vm.clone(), &["echo", "hello"]).await;
    assert_eq!((output.stdout, output.status), (b"echo hello\n".to_vec(), ExitStatus::Code(0)));
    assert_eq!(run(vm.clone(), &["sh", "-c", "exit 7"]).await.status, ExitStatus::Code(7));

    let (into, out) = (vm.agent(MINUTE).await.unwrap(), vm.agent(MINUTE).await.unwrap());
    let copied = tokio::task::spawn_blocking(move || {
        let content = vec![b'x'; 200_000];
        let file = CopyIn {
            path: "/f".into(),
            size: 200_000,
            mode: 0o644,
            owner: None,
            parents: false,
            sync: false,
        };
        into.copy_in(&file, &content[..])?;
        let mut back = Vec::new();
        out.copy_out("/f", &mut back)?;
        assert!(back == content);
        Ok::<_, pulau_agent_protocol::ClientError>(())
    });
    copied.await.unwrap().unwrap();
    let agent = vm.agent(MINUTE).await.unwrap();
    let missing = tokio::task::spawn_blocking(move || agent.copy_out("/none", &mut Vec::new()));
    assert!(missing.await.unwrap().unwrap_err().to_string().contains("/none"));
}

#[tokio::test(start_paused = true)]
async fn guests_end_by_themselves() {
    let sim = Simulation::new();
    let kill = Exit::Signal(9);
    for (exit, told) in [
        (POWER_OFF, "the guest powered itself off"),
        (REBOOT, "the guest rebooted itself"),
        (PANIC, "the guest's kernel panicked"),
        (kill, "killed by signal 9"),
    ] {
        let vm = sim.create(spec("a"));
        vm.started().await.unwrap();
        assert!(sim.end("a", exit));
        assert!(vm.ended().await.reason.to_string().contains(told));
        assert!(!sim.end("a", exit), "it is gone");
    }
    let vm = sim.create(spec("a"));
    let ending = vm.stop(Stop::Reboot { grace: GRACE }).await;
    assert!(matches!(ending.reason, Reason::NotStarted(StartError::Abandoned) | Reason::Rebooted));
}

#[tokio::test(start_paused = true)]
async fn what_is_to_go_wrong_does() {
    let sim = Simulation::new();
    sim.inject(Fault::once(At::Start, How::Fail("no such kernel".into())));
    let ending = sim.create(spec("a")).started().await.unwrap_err();
    assert_eq!(ending.reason.to_string(), "it did not start: no such kernel");
    sim.inject(Fault::once(At::Start, How::Hang));
    let ending = sim.create(spec("a")).started().await.unwrap_err();
    assert!(matches!(ending.reason, Reason::NotStarted(StartError::Silent(_))));
    sim.inject(Fault::once(At::Start, How::DieAfter(MINUTE)));
    let (vm, begun) = (sim.create(spec("a")), Instant::now());
    vm.started().await.unwrap();
    assert!(matches!(vm.ended().await.reason, Reason::VmmFailed(Exit::Signal(9))));
    assert!(begun.elapsed() >= MINUTE);

    let vm = sim.create(spec("a"));
    vm.started().await.unwrap();
    sim.inject(Fault::once(At::Request, How::Fail("no".into())));
    assert_eq!(vm.pause().await.unwrap_err().to_string(), "no");
    sim.inject(Fault::once(At::Request, How::Hang));
    assert!(vm.pause().await.unwrap_err().to_string().contains("did not answer"));
    assert!(matches!(vm.state(), State::Running));
    sim.inject(Fault::always(At::Agent, How::Fail("not today".into()), "a"));
    let error = vm.agent(Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(&error, GuestError::TimedOut { last, .. } if last == "not today"), "{error}");
    sim.inject(Fault::once(At::Stop, How::Hang));
    sim.inject(Fault::once(At::Remove, How::Fail("device busy".into())));
    let ending = vm.stop(Stop::Orderly { grace: GRACE }).await;
    assert!(matches!(ending.reason, Reason::Killed));
    assert_eq!(ending.left_behind.as_ref().unwrap().to_string(), "device busy");
    assert_eq!(sim.sweep(), ["a"], "what is left is nobody's");
}

#[tokio::test(start_paused = true)]
async fn microvms_outlive_who_drives_them() {
    let sim = Simulation::new();
    let machines = Machines::Simulated(sim.clone());
    let (runs, paused, ends, starts) =
        (machines.create(spec("runs")), sim.create(spec("paused")), sim.create(spec("ends")), "starts");
    for vm in [&runs, &paused, &ends] {
        vm.started().await.unwrap();
    }
    paused.pause().await.unwrap();
    sim.inject(Fault::once(At::Start, How::Hang));
    let starting = sim.create(spec(starts));
    tokio::task::yield_now().await;
    assert!(matches!(sim.adopt("runs"), Err(HomeError::Driven { .. })));
    for vm in [runs, paused, ends, starting] {
        assert!(vm.detach().await);
        assert!(matches!(vm.state(), State::Detached));
        assert!(matches!(vm.pause().await, Err(RequestError::NotRunning)));
    }
    sim.end("ends", PANIC);
    assert_eq!(machines.list().await.unwrap(), ["ends", "paused", "runs", "starts"]);

    let adopt = |id: &str| machines.adopt(id).unwrap();
    let (runs, paused) = (adopt("runs"), adopt("paused"));
    assert!(matches!(adopt("ends").ended().await.reason, Reason::Panicked));
    assert!(matches!(adopt("starts").ended().await.reason, Reason::NotStarted(StartError::Interrupted)));
    runs.started().await.unwrap();
    runs.agent(MINUTE).await.unwrap();
    paused.started().await.unwrap();
    assert!(matches!(paused.state(), State::Paused));
    assert!(machines.sweep().await.unwrap().is_empty());
    drop((runs, paused));
    tokio::time::sleep(MINUTE).await;
    assert!(sim.list().is_empty(), "the last handle's drop kills");
    assert!(matches!(machines.adopt("runs"), Err(HomeError::Missing { .. })));
}

#[test]
fn a_runtime_that_goes_leaves_its_microvms() {
    let sim = Simulation::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let vm = runtime.block_on(async {
        let vm = sim.create(spec("a"));
        vm.started().await.unwrap();
        vm
    });
    drop(runtime);
    drop(vm);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let vm = sim.adopt("a").unwrap();
        vm.started().await.unwrap();
        vm.stop(Stop::Force).await;
    });
    assert!(sim.list().is_empty());
}

#[tokio::test(start_paused = true)]
async fn thousands_are_cheap() {
    let (sim, begun) = (slow(), WallTime::now());
    let vms: Vec<_> = (0..5000).map(|n| sim.create(spec(&format!("vm-{n}")))).collect();
    for vm in &vms {
        vm.started().await.unwrap();
    }
    for vm in &vms {
        vm.detach().await;
    }
    let vms: Vec<_> = sim.list().iter().map(|id| sim.adopt(id).unwrap()).collect();
    for vm in &vms {
        vm.started().await.unwrap();
        vm.stop(Stop::Force).await;
    }
    assert!(sim.list().is_empty());
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}
