//! MicroVMs left by whoever drove them, orderly or by kill -9, and taken over by another.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use crate::microvm::fake::{Bench, is_running, start_error};
use crate::microvm::{ConsoleLog, HomeError, MicroVm, Reason, State, Stop, homes, sweep};

const PATIENCE: Duration = Duration::from_secs(20);

/// A process that drives a microVM until it is killed. Not a test of its own.
#[test]
fn driving_process() {
    let Ok(line) = env::var("DRIVE") else { return };
    let mut words = line.split(' ');
    let mut word = || words.next().unwrap();
    let bench = Bench::at(word().into());
    let (id, kernel, pause) = (word(), word(), word() == "pause");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let vm = bench.create(id, kernel);
        if vm.started().await.is_ok() && pause {
            vm.pause().await.unwrap();
        }
        fs::write(bench.path("drives"), "").unwrap();
        tokio::time::sleep(PATIENCE).await;
    });
}

struct Driving(Child);

impl Driving {
    fn start(bench: &Bench, id: &str, kernel: &str, then: &str) -> Self {
        let _ = fs::remove_file(bench.path("drives"));
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", "microvm::adopt::tests::driving_process"])
            .env("DRIVE", format!("{} {id} {kernel} {then}", bench.path("").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0);
        Driving(command.spawn().unwrap())
    }

    /// Waits until it has got as far as it gets, and kills it.
    fn kill_when_done(self, bench: &Bench) {
        wait_until(|| bench.path("drives").exists());
        self.kill();
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[track_caller]
fn wait_until(done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(2));
    }
}

async fn adopt(bench: &Bench, id: &str) -> MicroVm {
    let vm = MicroVm::adopt(&bench.host(), id).unwrap();
    vm.started().await.unwrap();
    vm
}

#[tokio::test]
async fn a_detached_microvm_runs_on_and_is_taken_over() {
    let bench = Bench::new();
    let vm = bench.create("a", "listens");
    vm.started().await.unwrap();
    assert!(matches!(MicroVm::adopt(&bench.host(), "a"), Err(HomeError::Driven { .. })));
    assert!(vm.detach().await);
    assert!(matches!(vm.state(), State::Detached));
    assert!(matches!(vm.ended().await.reason, Reason::Detached));
    drop(vm);
    assert_eq!(homes(&bench.path("run")).unwrap(), ["a"]);

    let vm = adopt(&bench, "a").await;
    assert!(is_running(&vm));
    assert!(sweep(&bench.path("run")).unwrap().is_empty(), "what was adopted is not swept away");
    let usage = vm.usage().await.unwrap();
    assert_eq!((usage.disk.read_bytes, usage.network.sent_packets), (4096, 3));
    assert!(usage.resident_bytes > 0);
    assert_eq!(vm.balloon_statistics().await.unwrap().actual_mib, 7);
    vm.pause().await.unwrap();
    assert!(vm.detach().await);
    let vm = adopt(&bench, "a").await;
    assert!(matches!(vm.state(), State::Paused));
    assert!(vm.console_log().unwrap().exists());
    let ending = vm.stop(Stop::Orderly { grace: PATIENCE }).await;
    assert!(matches!(ending.reason, Reason::PoweredOff), "{}", ending.reason);
    assert!(bench.is_clean());
    assert!(matches!(MicroVm::adopt(&bench.host(), "a"), Err(HomeError::Missing { .. })));
    assert!(matches!(MicroVm::adopt(&bench.host(), "../run"), Err(HomeError::Missing { .. })));
}

#[tokio::test]
async fn what_a_killed_process_drove_is_taken_over() {
    let bench = Bench::new();
    Driving::start(&bench, "a", "listens", "pause").kill_when_done(&bench);
    let vm = adopt(&bench, "a").await;
    assert!(matches!(vm.state(), State::Paused));
    vm.resume().await.unwrap();
    drop(vm);
    wait_until_clean(&bench).await;
}

async fn wait_until_clean(bench: &Bench) {
    let begun = Instant::now();
    while !bench.is_clean() {
        let homes = homes(&bench.path("run"));
        assert!(begun.elapsed() < PATIENCE, "{homes:?} and a process: {}", bench.has_process());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn how_it_ended_is_known_to_who_was_not_there() {
    let bench = Bench::new();
    Driving::start(&bench, "a", "stubborn", "run").kill_when_done(&bench);
    let vmm: i32 = fs::read_to_string(bench.path("run/a/vmm.pid")).unwrap().trim().parse().unwrap();
    fs::write(bench.path("run/a/exit"), "065\n").unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(vmm), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until(|| !bench.has_process());
    let ending = MicroVm::adopt(&bench.host(), "a").unwrap().ended().await;
    assert!(matches!(ending.reason, Reason::Panicked), "{}", ending.reason);
    assert!(!ending.console.is_empty());

    // The same, with a console that is kept, and a VMM that ends while it is driven by who adopted it.
    let log = ConsoleLog { path: bench.path("console.log"), max_bytes: 1 << 20 };
    let mut spec = bench.spec("b", "listens");
    spec.console.log = Some(log.clone());
    let vm = MicroVm::create(bench.host(), spec);
    vm.started().await.unwrap();
    assert_eq!(vm.console_log(), Some(log.path.clone()));
    vm.detach().await;
    let vm = adopt(&bench, "b").await;
    vm.ctrl_alt_del().await.unwrap_err();
    let ending = vm.ended().await;
    assert!(matches!(ending.reason, Reason::PoweredOff), "{}", ending.reason);
    assert!(fs::read_to_string(&log.path).unwrap().contains("fake: PUT /actions"));
    assert!(ending.console.iter().any(|line| line.contains("fake: PUT /actions")));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn one_that_is_just_ending_is_waited_for() {
    let bench = Bench::new();
    let vm = bench.create("a", "ends-slowly");
    vm.started().await.unwrap();
    vm.ctrl_alt_del().await.unwrap_err();
    assert!(vm.detach().await);
    let ending = MicroVm::adopt(&bench.host(), "a").unwrap().ended().await;
    assert!(matches!(ending.reason, Reason::Rebooted), "{}", ending.reason);
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_start_that_was_never_finished_is_buried() {
    let bench = Bench::new();
    for kernel in ["silent", "mute"] {
        let driving = Driving::start(&bench, "a", kernel, "run");
        let console = bench.path("run/a/console.log");
        wait_until(|| fs::read_to_string(&console).is_ok_and(|text| text.contains("/actions")));
        // One has been told to boot and has not agreed; the other has, and will not say anything again.
        wait_until(|| kernel == "silent" || bench.path("run/a/started").exists());
        driving.kill();
        let vm = MicroVm::adopt(&bench.host(), "a").unwrap();
        let ending = vm.started().await.unwrap_err();
        if kernel == "silent" {
            assert_eq!(start_error(&ending), "whoever started it died before it had started");
        } else {
            assert!(ending.reason.to_string().contains("did not answer"), "{}", ending.reason);
        }
        assert!(bench.is_clean());
    }
}

#[tokio::test]
async fn a_vmm_nobody_knows_the_number_of_yet_does_not_stay() {
    let bench = Bench::new();
    let driving = Driving::start(&bench, "slow-1", "listens", "run");
    wait_until(|| bench.path("run/slow-1/vmm.log").exists());
    driving.kill();
    assert_eq!(sweep(&bench.path("run")).unwrap(), ["slow-1"]);
    wait_until_clean(&bench).await;
}

#[tokio::test]
async fn killed_at_any_moment_of_a_start_it_is_taken_over_or_leaves_nothing() {
    let bench = Bench::new();
    let run = bench.path("run");
    let (mut adopted, mut buried, mut nothing) = (0, 0, 0);
    for step in 0..60u64 {
        let driving = Driving::start(&bench, "a", "listens", "run");
        // From before its first line to well after it has started; closest together where it has hardly begun.
        thread::sleep(Duration::from_micros(step * step * 40));
        driving.kill();
        if step % 3 == 0 && run.exists() {
            // What was forked from the process and is not the VMM yet has the lock for another moment.
            wait_until(|| {
                sweep(&run).unwrap();
                homes(&run).unwrap().is_empty()
            });
        } else {
            match MicroVm::adopt(&bench.host(), "a") {
                Ok(vm) => match vm.started().await {
                    Ok(()) => {
                        adopted += 1;
                        vm.stop(Stop::Force).await;
                    }
                    Err(ending) => {
                        assert!(ending.left_behind.is_none(), "{ending:?}");
                        buried += 1;
                    }
                },
                Err(HomeError::Missing { .. }) => nothing += 1,
                Err(error) => panic!("{error}"),
            }
        }
        if run.exists() {
            wait_until_clean(&bench).await;
        }
    }
    // How far it comes in what time is the machine's; that it was met on either side of its start is the test's.
    assert!(
        adopted > 0 && buried + nothing > 0,
        "adopted {adopted}, buried {buried}, nothing to bury {nothing}"
    );
}
