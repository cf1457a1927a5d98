//! MicroVMs with real guests, jailed, that outlive the process that drove them: detached or left by kill -9, and
//! taken over by another.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pulau::microvm::{
    Console, ConsoleLog, Host, JailSpec, MicroVm, Network, Reason, Spec, StartError, State, Stop, homes,
    sweep,
};
use pulau_agent_protocol::BootOptions;
use pulau_agent_protocol::boot::Overlay;
use pulau_agent_protocol::message::ExecRequest;
use pulau_tests::{PATIENCE, artifact, program, wait_for};
use pulau_vmm::config::{
    BalloonConfig, BootSourceConfig, DriveConfig, EntropyConfig, MachineConfig, VmConfig, VsockConfig,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

/// A host of a test's own, in a directory of its own.
#[derive(Clone)]
struct Place(PathBuf);

impl Place {
    fn host(&self) -> Host {
        let name = self.0.file_name().expect("a name").to_string_lossy().into_owned();
        Host {
            vmm: program("pulau-vmm"),
            run_dir: self.0.join("run"),
            // Its parent hands on the controllers.
            cgroup_parent: Path::new("/sys/fs/cgroup").join(format!("adopt-{name}")),
        }
    }

    fn log(&self) -> ConsoleLog {
        ConsoleLog { path: self.0.join("console.log"), max_bytes: 1 << 20 }
    }

    fn spec(&self, arguments: &str) -> Spec {
        let mut vm = VmConfig::default();
        vm.set_machine(MachineConfig { vcpu_count: 1, mem_size_mib: 128, ..Default::default() })
            .expect("a machine");
        let options = BootOptions { overlay: Some(Overlay::Tmpfs), ..Default::default() };
        vm.set_boot_source(BootSourceConfig {
            kernel_image_path: artifact("PULAU_TEST_KERNEL"),
            boot_args: Some(format!("console=ttyS0 reboot=k panic=-1 quiet {options} {arguments}")),
            ..Default::default()
        })
        .expect("a kernel");
        vm.set_drive(DriveConfig {
            drive_id: "root".into(),
            path_on_host: Some(artifact("PULAU_TEST_ROOTFS_MINIMAL")),
            is_root_device: true,
            is_read_only: Some(true),
            ..Default::default()
        })
        .expect("a drive");
        vm.set_vsock(VsockConfig { vsock_id: None, guest_cid: 3, uds_path: "vsock".into() })
            .expect("a vsock");
        vm.set_entropy(EntropyConfig::default());
        vm.set_balloon(BalloonConfig { stats_polling_interval_s: 1, ..Default::default() })
            .expect("a balloon");
        Spec {
            id: "a".into(),
            vm,
            jail: Some(JailSpec { network: Network::None, cgroup: true }),
            console: Console { log: Some(self.log()), attachable: true },
            ..Default::default()
        }
    }

    fn adopt(&self) -> MicroVm {
        MicroVm::adopt(&self.host(), "a").expect("a microVM that nobody drives")
    }

    /// Checks that nothing is left but the console's log.
    #[track_caller]
    fn assert_clean(&self) {
        let left = || homes(&self.host().run_dir).expect("the directory of homes");
        assert!(left().is_empty(), "left behind: {:?}", left());
        let group = self.host().cgroup_parent;
        assert!(!group.join("a").exists(), "the control group is left");
        let mark = self.0.display().to_string();
        // One that is about to end because there is nothing left for it may take a moment.
        wait_for("processes to end", PATIENCE, || {
            let mentions = |pid: &Path| {
                let arguments = fs::read(pid.join("cmdline")).unwrap_or_default();
                let arguments = String::from_utf8_lossy(&arguments);
                arguments.contains("pulau-vmm") && arguments.contains(&mark)
            };
            (!fs::read_dir("/proc").expect("/proc").any(|pid| mentions(&pid.expect("a process").path())))
                .then_some(())
        });
    }
}

/// A host whose traces go with it.
struct Here {
    place: Place,
    _dir: tempfile::TempDir,
}

impl Here {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Here { place: Place(dir.path().to_owned()), _dir: dir }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        let _ = sweep(&self.place.host().run_dir);
        let _ = fs::remove_dir(self.place.host().cgroup_parent);
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// A process that drives a microVM until it is killed. Not a test of its own.
#[test]
fn driving_process() {
    let Some(dir) = std::env::var_os("ADOPT_DRIVE") else { return };
    let place = Place(dir.into());
    let arguments = std::env::var("ADOPT_ARGUMENTS").expect("arguments");
    runtime().block_on(async {
        let vm = MicroVm::create(place.host(), place.spec(&arguments));
        vm.started().await.expect("a start");
        fs::write(place.0.join("started"), "").expect("a mark");
        vm.agent(PATIENCE).await.expect("the guest");
        fs::write(place.0.join("up"), "").expect("a mark");
        tokio::time::sleep(PATIENCE).await;
    });
}

struct Driving(Child);

impl Driving {
    fn start(place: &Place, arguments: &str) -> Self {
        for mark in ["started", "up"] {
            let _ = fs::remove_file(place.0.join(mark));
        }
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command
            .args(["--exact", "driving_process"])
            .env("ADOPT_DRIVE", &place.0)
            .env("ADOPT_ARGUMENTS", arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Driving(command.spawn().expect("a process"))
    }

    fn kill(mut self) {
        self.0.kill().expect("a kill");
        self.0.wait().expect("an end");
    }

    /// Waits until the guest is up, and kills it.
    fn kill_when_up(self, place: &Place) {
        wait_for("the guest", PATIENCE, || place.0.join("up").exists().then_some(()));
        self.kill();
    }
}

/// Runs a shell command in the guest; what it writes.
async fn sh(vm: &MicroVm, command: &str) -> String {
    let agent = vm.agent(PATIENCE).await.expect("the guest's agent");
    let argv = ["/bin/sh", "-c", command].map(str::to_owned).to_vec();
    let request = ExecRequest { argv, ..Default::default() };
    let output = tokio::task::spawn_blocking(move || agent.output(&request, b""));
    match output.await.expect("a thread") {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(_) => String::new(), // The command may end the guest.
    }
}

#[test]
fn what_a_killed_process_drove_is_taken_over_with_all_there_is_to_it() {
    let here = Here::new();
    let place = &here.place;
    Driving::start(place, "pulau.console=shell").kill_when_up(place);
    runtime().block_on(async {
        let vm = place.adopt();
        vm.started().await.expect("it runs");
        assert!(matches!(vm.state(), State::Running));
        assert!(sweep(&place.host().run_dir).expect("a sweep").is_empty());
        assert_eq!(sh(&vm, "echo $((6 * 7))").await, "42\n");

        let before = vm.usage().await.expect("usage");
        sh(&vm, "i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done; cat /bin/* | wc -c").await;
        let after = vm.usage().await.expect("usage");
        assert!(after.cpu_time_us > before.cpu_time_us + 1000, "{before:?} {after:?}");
        assert!(after.disk.read_bytes > 1 << 20 && after.disk.read_operations > 10, "{after:?}");
        assert!(after.resident_bytes > 10 << 20 && after.memory_bytes > 10 << 20, "{after:?}");
        let statistics = vm.balloon_statistics().await.expect("statistics");
        assert_eq!(statistics.target_mib, 0);
        vm.set_balloon(16).await.expect("a balloon");

        let mut console = vm.attach_console().await.expect("a console");
        console.write_all(b"echo $((50 + 5))-typed\n").await.expect("typing");
        let mut seen = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&seen).contains("55-typed") {
            assert!(Instant::now() < deadline);
            let mut chunk = [0; 4096];
            let read = tokio::time::timeout(PATIENCE, console.read(&mut chunk)).await.expect("output");
            let count = read.expect("a connection");
            assert_ne!(count, 0, "another was attached");
            seen.extend_from_slice(&chunk[..count]);
        }
        let log = || fs::read_to_string(place.log().path).unwrap_or_default();
        wait_for("the console's log", PATIENCE, || log().contains("55-typed").then_some(()));

        vm.pause().await.expect("a pause");
        assert!(vm.detach().await);
        let vm = place.adopt();
        vm.started().await.expect("it is there");
        assert!(matches!(vm.state(), State::Paused));
        let ending = vm.stop(Stop::Orderly { grace: PATIENCE }).await;
        assert!(matches!(ending.reason, Reason::PoweredOff), "{}", ending.reason);
        assert!(ending.left_behind.is_none());
        assert!(!log().is_empty(), "the console's log is kept");
    });
    place.assert_clean();
}

#[test]
fn how_a_guest_ended_is_told_to_who_was_not_there() {
    let here = Here::new();
    let place = &here.place;
    // Our kernel has no other way to panic on request than the end of init.
    for (command, wanted) in [
        ("(sleep 1; poweroff -f) & exit", "powered itself off"),
        ("(sleep 1; reboot -f) & exit", "rebooted itself"),
        ("(sleep 1; echo c > /proc/sysrq-trigger) & exit", "kernel panicked"),
    ] {
        Driving::start(place, "").kill_when_up(place);
        runtime().block_on(async {
            let vm = place.adopt();
            vm.started().await.expect("it runs");
            sh(&vm, &format!("setsid sh -c '{command}' </dev/null >/dev/null 2>&1 &")).await;
            assert!(vm.detach().await);
            let exit = place.host().run_dir.join("a/exit");
            wait_for("the guest's end", PATIENCE, || {
                fs::read_to_string(&exit).is_ok_and(|text| !text.is_empty()).then_some(())
            });
            let ending = place.adopt().ended().await;
            assert!(ending.reason.to_string().contains(wanted), "{command}: {}", ending.reason);
            assert!(ending.left_behind.is_none());
        });
        place.assert_clean();
    }
}

#[test]
fn killed_at_any_moment_of_a_start_it_is_taken_over_or_leaves_nothing() {
    let here = Here::new();
    let place = &here.place;
    // How long a start takes here, from the first line of the process.
    let begun = Instant::now();
    let driving = Driving::start(place, "");
    wait_for("a start", PATIENCE, || place.0.join("started").exists().then_some(()));
    let whole = begun.elapsed();
    driving.kill();
    sweep(&place.host().run_dir).expect("a sweep");
    place.assert_clean();
    const STEPS: u32 = 40;
    let (mut running, mut interrupted, mut nothing) = (0, 0, 0);
    for step in 0..STEPS {
        let driving = Driving::start(place, "");
        std::thread::sleep(whole * step / STEPS + Duration::from_millis(1));
        driving.kill();
        if !place.host().run_dir.exists() {
            nothing += 1;
            continue;
        }
        if step % 4 == 0 {
            wait_for("all to be swept away", PATIENCE, || {
                sweep(&place.host().run_dir).expect("a sweep");
                homes(&place.host().run_dir).expect("homes").is_empty().then_some(())
            });
        } else {
            runtime().block_on(async {
                let Ok(vm) = MicroVm::adopt(&place.host(), "a") else {
                    nothing += 1;
                    return;
                };
                match vm.started().await {
                    Ok(()) => {
                        running += 1;
                        vm.stop(Stop::Force).await;
                    }
                    Err(ending) => {
                        interrupted += 1;
                        assert!(
                            matches!(ending.reason, Reason::NotStarted(StartError::Interrupted)),
                            "{}",
                            ending.reason
                        );
                        assert!(ending.left_behind.is_none(), "{ending:?}");
                    }
                }
            });
        }
        place.assert_clean();
    }
    println!("{running} were running, {interrupted} had not started, {nothing} had left nothing");
    assert!(interrupted > 0);
}
