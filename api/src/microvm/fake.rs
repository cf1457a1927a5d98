//! A VMM that is none, for tests: this test program itself, which answers the control API and ends as it is told
//! by the content of the "kernel" it is given. And a place to run it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use pulau_vmm::config::{BootSourceConfig, VmConfig, VsockConfig};
use pulau_vmm::exit::ExitCode;

use super::{Ending, Host, MicroVm, Reason, Spec, State};

/// The fake VMM. Not a test of its own: it does nothing unless [`Bench`]'s script runs it.
#[test]
fn fake_vmm() {
    let Ok(arguments) = env::var("FAKE_VMM_ARGUMENTS") else { return };
    let option = |name: &str| {
        let mut words = arguments.split(' ');
        words.find(|word| *word == name).and_then(|_| words.next()).map(PathBuf::from)
    };
    let fake = FakeVmm {
        exit_file: option("--exit-file").unwrap(),
        socket: option("--api-sock").unwrap(),
        kernel: String::new(),
        state: "Not started",
    };
    fs::write(&fake.exit_file, "").unwrap();
    if arguments.contains("--id dies-early") {
        eprintln!("cannot open /dev/kvm");
        fake.exit(9);
    }
    if arguments.contains("--id slow-") {
        thread::sleep(Duration::from_millis(300));
    }
    let pid_file = option("--pid-file").unwrap();
    let new = pid_file.with_extension("new");
    if fs::write(&new, process::id().to_string()).and_then(|()| fs::rename(&new, &pid_file)).is_err() {
        fake.exit(ExitCode::Error as i32);
    }
    match UnixListener::bind(&fake.socket) {
        Ok(listener) => fake.serve(&listener),
        Err(_) => fake.exit(ExitCode::Error as i32),
    }
}

struct FakeVmm {
    exit_file: PathBuf,
    socket: PathBuf,
    kernel: String,
    state: &'static str,
}

struct Client {
    reader: BufReader<UnixStream>,
    stream: UnixStream,
}

impl FakeVmm {
    fn exit(&self, code: i32) -> ! {
        // Gone with the home, if nobody is interested.
        let _ = fs::OpenOptions::new()
            .write(true)
            .open(&self.exit_file)
            .map(|mut file| writeln!(file, "{code:03}"));
        process::exit(code);
    }

    fn serve(mut self, listener: &UnixListener) {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            let (stream, _) = listener.accept().unwrap();
            let mut client = Client { reader: BufReader::new(stream.try_clone().unwrap()), stream };
            while let Some((line, body)) = client.request() {
                println!("fake: {line}");
                self.answer(&mut client, &line, &body);
            }
            // The client went away: the VMM runs on.
        }
    }

    fn answer(&mut self, client: &mut Client, line: &str, body: &str) {
        if line.starts_with("PUT /boot-source") {
            let boot: BootSourceConfig = serde_json::from_str(body).unwrap();
            self.kernel = fs::read_to_string(boot.kernel_image_path).unwrap();
        }
        if body.contains("InstanceStart") || body.contains("Resumed") {
            self.state = "Running";
        } else if body.contains("Paused") {
            self.state = "Paused";
        }
        match (self.kernel.as_str(), line, body.contains("InstanceStart")) {
            ("refused", _, true) => client.answer("400 Bad Request", r#"{"fault_message":"no such kernel"}"#),
            ("dies-at-boot", _, true) => self.exit(7),
            ("silent", _, true) => self.state = "Not started",
            ("panics", _, true) => {
                client.answer("204 No Content", "");
                println!("Kernel panic - not syncing: No working init found.");
                thread::sleep(Duration::from_millis(50));
                self.exit(ExitCode::GuestPanic as i32);
            }
            ("deaf", "PATCH /vm", _) => client.answer("400 Bad Request", r#"{"fault_message":"no"}"#),
            ("listens", "PUT /actions", false) => self.exit(0),
            ("ends-slowly", "PUT /actions", false) => {
                fs::remove_file(&self.socket).unwrap();
                client.stream.shutdown(std::net::Shutdown::Both).unwrap();
                thread::sleep(Duration::from_millis(300));
                self.exit(ExitCode::GuestReboot as i32);
            }
            ("mute", "GET /", _) => thread::sleep(Duration::from_secs(60)),
            (_, "GET /", _) => {
                let info =
                    format!(r#"{{"id":"a","state":"{}","vmm_version":"1","app_name":"x"}}"#, self.state);
                client.answer("200 OK", &info);
            }
            (_, "GET /vm/config", _) => {
                client.answer("200 OK", r#"{"boot-source":{"kernel_image_path":"k"},"vsock":null}"#);
            }
            (_, "GET /metrics", _) => {
                client.answer("200 OK", r#"{"block":{"read_bytes":4096},"net":{"tx_packets_count":3}}"#);
            }
            (_, "GET /balloon/statistics", _) => {
                let statistics = r#"{"target_pages":0,"actual_pages":0,"target_mib":0,"actual_mib":7}"#;
                client.answer("200 OK", statistics);
            }
            _ => client.answer("204 No Content", ""),
        }
    }
}

impl Client {
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
        // The client may have been killed.
        let _ = self.stream.write_all(format!("HTTP/1.1 {status}\r\n{length}\r\n{body}").as_bytes());
    }
}

/// A host with the fake VMM.
pub struct Bench {
    dir: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\nexec env FAKE_VMM_ARGUMENTS=\"$*\" {} --exact microvm::fake::fake_vmm --nocapture -- \"$@\"\n",
            env::current_exe().unwrap().display()
        );
        let vmm = dir.path().join("vmm");
        fs::write(&vmm, script).unwrap();
        fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
        Bench { dir: dir.path().to_owned(), _temporary: Some(dir) }
    }

    /// One that another process made.
    pub fn at(dir: PathBuf) -> Self {
        Bench { dir, _temporary: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn host(&self) -> Host {
        Host { vmm: self.path("vmm"), run_dir: self.path("run"), cgroup_parent: self.path("cgroup") }
    }

    pub fn create(&self, id: &str, kernel: &str) -> MicroVm {
        MicroVm::create(self.host(), self.spec(id, kernel))
    }

    pub fn spec(&self, id: &str, kernel: &str) -> Spec {
        let kernel_path = self.path(&format!("kernel-{id}"));
        fs::write(&kernel_path, kernel).unwrap();
        let mut vm = VmConfig::default();
        vm.set_boot_source(BootSourceConfig { kernel_image_path: kernel_path, ..Default::default() })
            .unwrap();
        vm.set_vsock(VsockConfig { guest_cid: 3, uds_path: "chosen/later".into(), vsock_id: None }).unwrap();
        Spec { id: id.into(), vm, boot_timer: true, ..Default::default() }
    }

    /// Whether nothing of any microVM is left: no home and no process.
    pub fn is_clean(&self) -> bool {
        let homes = fs::read_dir(self.path("run")).unwrap();
        let homes = homes.filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
        homes == 0 && !self.has_process()
    }

    pub fn has_process(&self) -> bool {
        let marker = self.path("run").display().to_string();
        let mentions = |pid: &Path| {
            let environment = fs::read(pid.join("environ")).unwrap_or_default();
            let arguments = fs::read(pid.join("cmdline")).unwrap_or_default();
            [environment, arguments].iter().any(|text| String::from_utf8_lossy(text).contains(&marker))
        };
        fs::read_dir("/proc").unwrap().any(|entry| mentions(&entry.unwrap().path()))
    }
}

pub fn start_error(ending: &Ending) -> String {
    match &ending.reason {
        Reason::NotStarted(error) => error.to_string(),
        other => panic!("it started: {other}"),
    }
}

/// The state of one that was just let go or taken over.
pub fn is_running(vm: &MicroVm) -> bool {
    matches!(vm.state(), State::Running)
}
