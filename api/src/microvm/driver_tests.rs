//! Whole lives of microVMs against a VMM that is not one: this test program itself, which answers the control
//! API and ends as it is told by the content of the "kernel" it is given.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::{env, fs, process, thread};

use pulau_vmm::config::{BootSourceConfig, VmConfig, VsockConfig};

use super::*;

/// The fake VMM. Not a test of its own: it does nothing unless [`Bench`]'s script runs it.
#[test]
fn fake_vmm() {
    let Ok(arguments) = env::var("FAKE_VMM_ARGUMENTS") else { return };
    let mut words = arguments.split(' ');
    let socket = words.find(|word| *word == "--api-sock").and_then(|_| words.next()).unwrap().to_owned();
    if arguments.contains("--id dies-early") {
        eprintln!("cannot open /dev/kvm");
        process::exit(9);
    }
    let listener = UnixListener::bind(socket).unwrap();
    let (stream, _) = listener.accept().unwrap();
    Fake { reader: BufReader::new(stream.try_clone().unwrap()), stream, kernel: String::new() }.serve();
}

struct Fake {
    reader: BufReader<UnixStream>,
    stream: UnixStream,
    kernel: String,
}

impl Fake {
    fn serve(mut self) {
        while let Some((line, body)) = self.request() {
            println!("fake: {line}");
            if line.starts_with("PUT /boot-source") {
                let boot: BootSourceConfig = serde_json::from_str(&body).unwrap();
                self.kernel = fs::read_to_string(boot.kernel_image_path).unwrap();
            }
            match (self.kernel.as_str(), line.as_str(), body.contains("InstanceStart")) {
                ("refused", _, true) => {
                    self.answer("400 Bad Request", r#"{"fault_message":"no such kernel"}"#)
                }
                ("dies-at-boot", _, true) => process::exit(7),
                ("silent", _, true) => {}
                ("panics", _, true) => {
                    self.answer("204 No Content", "");
                    println!("Kernel panic - not syncing: No working init found.");
                    thread::sleep(Duration::from_millis(50));
                    process::exit(pulau_vmm::exit::ExitCode::GuestPanic as i32);
                }
                ("deaf", "PATCH /vm", _) => self.answer("400 Bad Request", r#"{"fault_message":"no"}"#),
                ("listens", "PUT /actions", false) => process::exit(0),
                _ => self.answer("204 No Content", ""),
            }
        }
        // The client went away: the VMM runs on.
        thread::sleep(Duration::from_secs(60));
    }

    fn request(&mut self) -> Option<(String, String)> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let length =
            head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        self.reader.read_exact(&mut body).ok()?;
        let line = head.lines().next()?.trim_end_matches(" HTTP/1.1").to_owned();
        Some((line, String::from_utf8(body).ok()?))
    }

    fn answer(&mut self, status: &str, body: &str) {
        let length =
            if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let text = format!("HTTP/1.1 {status}\r\n{length}\r\n{body}");
        self.stream.write_all(text.as_bytes()).unwrap();
    }
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\nexec env FAKE_VMM_ARGUMENTS=\"$*\" {} --exact microvm::driver::tests::fake_vmm --nocapture\n",
            env::current_exe().unwrap().display()
        );
        let vmm = dir.path().join("vmm");
        fs::write(&vmm, script).unwrap();
        fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
        Bench { dir }
    }

    fn host(&self) -> Host {
        let path = |name: &str| self.dir.path().join(name);
        Host { vmm: path("vmm"), run_dir: path("run"), cgroup_parent: path("cgroup") }
    }

    fn create(&self, id: &str, kernel: &str) -> MicroVm {
        let kernel_path = self.dir.path().join(format!("kernel-{id}"));
        fs::write(&kernel_path, kernel).unwrap();
        let mut vm = VmConfig::default();
        vm.set_boot_source(BootSourceConfig { kernel_image_path: kernel_path, ..Default::default() })
            .unwrap();
        vm.set_vsock(VsockConfig { guest_cid: 3, uds_path: "chosen/later".into(), vsock_id: None }).unwrap();
        MicroVm::create(self.host(), Spec { id: id.into(), vm, jail: None, boot_timer: true })
    }

    /// Whether nothing of any microVM is left: no home and no process.
    fn is_clean(&self) -> bool {
        let homes = fs::read_dir(self.dir.path().join("run")).unwrap();
        let homes = homes.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
        homes == 0 && !self.has_process()
    }

    fn has_process(&self) -> bool {
        let marker = self.dir.path().join("run").display().to_string();
        let mentions = |pid: &Path| {
            let environment = fs::read(pid.join("environ")).unwrap_or_default();
            let arguments = fs::read(pid.join("cmdline")).unwrap_or_default();
            [environment, arguments].iter().any(|text| String::from_utf8_lossy(text).contains(&marker))
        };
        fs::read_dir("/proc").unwrap().any(|entry| mentions(&entry.unwrap().path()))
    }
}

fn start_error(ending: &Ending) -> String {
    match &ending.reason {
        Reason::NotStarted(error) => error.to_string(),
        other => panic!("it started: {other}"),
    }
}

#[tokio::test]
async fn a_whole_life() {
    let bench = Bench::new();
    let vm = bench.create("a", "listens");
    vm.started().await.unwrap();
    assert!(matches!(vm.state(), State::Running));
    vm.pause().await.unwrap();
    assert!(matches!(vm.state(), State::Paused));
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    assert!(matches!(vm.state(), State::Running));
    let times = vm.times();
    assert!(times.api_ready.unwrap() <= times.configured.unwrap());
    assert!(times.configured.unwrap() <= times.started.unwrap());
    let console = fs::read_to_string(vm.console_log().unwrap()).unwrap();
    let order =
        ["/machine-config", "/boot-source", "/vsock", "/actions"].map(|path| console.find(path).unwrap());
    assert!(order.is_sorted(), "{console}");
    // No agent answers, so the guest gets Ctrl+Alt+Del, at which this one powers off.
    let ending = vm.stop(Stop::Orderly { grace: Duration::from_secs(10) }).await;
    assert!(matches!(ending.reason, Reason::PoweredOff), "{}", ending.reason);
    assert!(ending.left_behind.is_none());
    assert!(matches!(vm.pause().await, Err(RequestError::NotRunning)));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_guest_that_does_not_end_is_killed_when_its_grace_is_over() {
    let bench = Bench::new();
    let vm = bench.create("a", "stubborn");
    vm.started().await.unwrap();
    let ending = vm.stop(Stop::Orderly { grace: Duration::from_millis(200) }).await;
    assert!(matches!(ending.reason, Reason::Killed), "{}", ending.reason);
    assert!(bench.is_clean());
}

#[tokio::test]
async fn an_orderly_stop_can_be_forced() {
    let bench = Bench::new();
    let vm = bench.create("a", "stubborn");
    vm.started().await.unwrap();
    let other = vm.clone();
    let orderly =
        tokio::spawn(async move { other.stop(Stop::Orderly { grace: Duration::from_secs(60) }).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(matches!(vm.state(), State::Stopping));
    vm.stop(Stop::Force).await;
    assert!(matches!(orderly.await.unwrap().reason, Reason::Killed));
}

#[tokio::test]
async fn a_start_is_abandoned_when_stopped() {
    let bench = Bench::new();
    let vm = bench.create("a", "silent");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(matches!(vm.state(), State::Starting));
    assert!(matches!(vm.pause().await, Err(RequestError::NotRunning)));
    let ending = vm.stop(Stop::Orderly { grace: Duration::from_secs(60) }).await;
    assert!(matches!(ending.reason, Reason::NotStarted(StartError::Abandoned)));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn each_failed_start_says_why_and_leaves_nothing() {
    let bench = Bench::new();
    let ending = bench.create("dies-early", "").started().await.unwrap_err();
    assert_eq!(start_error(&ending), "the VMM ended as it started (exit code 9)");
    assert_eq!(ending.log, ["cannot open /dev/kvm"]);
    let ending = bench.create("a", "refused").started().await.unwrap_err();
    assert_eq!(start_error(&ending), "no such kernel");
    let ending = bench.create("a", "dies-at-boot").started().await.unwrap_err();
    assert_eq!(start_error(&ending), "the VMM ended as it started (exit code 7)");
    let ending = bench.create("not_a_name", "x").started().await;
    assert!(start_error(&ending.unwrap_err()).contains("not_a_name"));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_vmm_that_cannot_be_spawned_is_named() {
    let bench = Bench::new();
    fs::remove_file(bench.dir.path().join("vmm")).unwrap();
    let ending = bench.create("a", "").started().await.unwrap_err();
    assert!(start_error(&ending).contains("/vmm: No such file"), "{}", ending.reason);
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_panic_is_told_with_the_consoles_last_lines() {
    let bench = Bench::new();
    let vm = bench.create("a", "panics");
    let ending = vm.ended().await;
    assert!(matches!(ending.reason, Reason::Panicked), "{}", ending.reason);
    assert_eq!(ending.console.last().unwrap(), "Kernel panic - not syncing: No working init found.");
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_refused_request_changes_nothing() {
    let bench = Bench::new();
    let vm = bench.create("a", "deaf");
    vm.started().await.unwrap();
    let error = vm.pause().await.unwrap_err();
    assert_eq!(error.to_string(), "no");
    assert!(matches!(vm.state(), State::Running));
    vm.stop(Stop::Force).await;
}

#[tokio::test]
async fn two_of_one_name_do_not_run_and_the_first_is_not_hurt() {
    let bench = Bench::new();
    let first = bench.create("a", "listens");
    first.started().await.unwrap();
    let second = bench.create("a", "listens").started().await.unwrap_err();
    assert!(start_error(&second).contains("already a microVM named a"));
    assert!(matches!(first.state(), State::Running));
    first.stop(Stop::Force).await;
    assert!(bench.is_clean());
}

#[tokio::test]
async fn dropping_the_last_handle_kills() {
    let bench = Bench::new();
    let vm = bench.create("a", "listens");
    vm.started().await.unwrap();
    let mut state = vm.watch();
    drop(vm);
    let state = state.wait_for(|state| matches!(state, State::Stopped(_))).await.unwrap().clone();
    assert!(matches!(state, State::Stopped(ending) if matches!(ending.reason, Reason::Killed)));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn the_agent_of_a_dead_guest_is_not_waited_for() {
    let bench = Bench::new();
    let vm = bench.create("a", "panics");
    let error = vm.agent(Duration::from_secs(60)).await.unwrap_err();
    assert!(matches!(error, super::super::GuestError::Ended(_)), "{error}");
}
