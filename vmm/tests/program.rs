//! The program itself, as whoever starts it sees it: command line, socket, API, signals, exit codes.
//! Nothing here starts a guest.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pulau_vmm::exit::ExitCode;

const PATIENCE: Duration = Duration::from_secs(30);

fn vmm(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pulau-vmm"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs a VMM that is to end by itself.
fn ends(arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = vmm(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// A VMM that listens.
struct Vmm {
    child: Child,
    dir: tempfile::TempDir,
}

impl Vmm {
    fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api");
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let arguments = [&["--api-sock", socket.to_str().unwrap()], arguments].concat();
        let child = vmm(&arguments).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let vmm = Self { child, dir };
        let start = Instant::now();
        while UnixStream::connect(vmm.socket()).is_err() {
            assert!(start.elapsed() < PATIENCE, "no API: {}", vmm.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        vmm
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Status and body of a request on a connection of its own.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = self.connect();
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    /// Sends a signal and returns the code the process ends with, and what it logged.
    fn signal(mut self, signal: Signal) -> (Option<i32>, String, bool) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        let code = self.child.wait().unwrap().code();
        (code, self.log(), self.socket().exists())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn help_and_version_are_written_to_standard_output() {
    let (code, out, err) = ends(&["--help"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("Usage: pulau-vmm") && out.contains("Examples:"));
    let (code, out, _) = ends(&["--version"]);
    assert_eq!((code, out.as_str()), (0, concat!("pulau-vmm ", env!("CARGO_PKG_VERSION"), "\n")));
}

#[test]
fn a_command_line_that_is_wrong_has_its_code() {
    let (code, out, err) = ends(&["--api-sock"]);
    assert_eq!((code, out.as_str()), (ExitCode::BadArguments as i32, ""));
    assert!(err.contains("--api-sock") && err.contains("--help"), "{err}");
    assert_eq!(ends(&["--level", "loud"]).0, ExitCode::BadConfiguration as i32);
}

#[test]
fn a_configuration_that_is_wrong_has_its_code_names_its_field_and_leaves_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api");
    let kernel = write(dir.path(), "kernel", "x");
    let with = |json: &str| write(dir.path(), "config.json", json);
    let boot = format!(r#""boot-source":{{"kernel_image_path":"{kernel}"}}"#);
    for (json, message) in [
        ("", "EOF while parsing"),
        ("{", "EOF while parsing"),
        (r#"{"nonsense":1}"#, "unknown field `nonsense`"),
        ("{}", "kernel_image_path is empty"),
        (r#"{"boot-source":{"kernel_image_path":"/no/kernel"}}"#, "/no/kernel"),
        (&format!(r#"{{{boot},"machine-config":{{"vcpu_count":33,"mem_size_mib":1}}}}"#), "vcpu_count"),
        (
            &format!(r#"{{{boot},"drives":[{{"drive_id":"a","is_root_device":true}}]}}"#),
            "drive a: path_on_host is missing",
        ),
    ] {
        let config = with(json);
        let (code, _, err) = ends(&["--api-sock", socket.to_str().unwrap(), "--config-file", &config]);
        assert_eq!(code, ExitCode::BadConfiguration as i32, "{json}: {err}");
        assert!(err.starts_with("pulau-vmm: --config-file \"") && err.contains(message), "{json}: {err}");
        assert!(!socket.exists());
    }
    let (code, _, err) = ends(&["--no-api", "--config-file", "/no/file"]);
    assert_eq!(code, ExitCode::BadConfiguration as i32);
    assert!(err.contains("/no/file") && err.contains("No such file"), "{err}");
    let metadata = write(dir.path(), "metadata", r#"{"a":"0123456789"}"#);
    let arguments =
        ["--api-sock", socket.to_str().unwrap(), "--metadata", &metadata, "--mmds-size-limit", "9"];
    let (code, _, err) = ends(&arguments);
    assert_eq!(code, ExitCode::BadConfiguration as i32);
    assert!(err.contains("18 bytes exceed the limit of 9"), "{err}");
}

#[test]
fn places_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let there = write(dir.path(), "there", "");
    let (code, _, err) = ends(&["--api-sock", &there]);
    assert_eq!(code, ExitCode::Error as i32);
    assert!(err.contains("there\" already exists"), "{err}");
    assert!(Path::new(&there).exists(), "what was there stays");
    for option in ["--api-sock", "--log-path", "--metrics-path"] {
        let (code, _, err) = ends(&[option, "/no/such/place"]);
        assert_eq!(code, ExitCode::Error as i32, "{err}");
        assert!(err.contains("\"/no/such/place\": No such file"), "{err}");
    }
}

#[test]
fn requests_are_answered_and_kept_to_their_limits() {
    let vmm = Vmm::start(&["--id", "vm-1", "--http-api-max-payload-size", "100", "--mmds-size-limit", "50"]);
    let (status, body) = vmm.ask("GET", "/", "");
    assert_eq!(status, 200);
    assert!(body.contains(r#""id":"vm-1","state":"Not started""#), "{body}");
    assert_eq!(vmm.ask("PUT", "/mmds", r#"{"a":1}"#), (204, String::new()));
    assert_eq!(vmm.ask("GET", "/mmds", ""), (200, r#"{"a":1}"#.into()));
    assert_eq!(vmm.ask("PUT", "/mmds", &format!("\"{}\"", "1".repeat(60))).0, 413);
    assert_eq!(vmm.ask("PUT", "/mmds", &format!("\"{}\"", "1".repeat(99))).0, 413);
    let (status, body) = vmm.ask("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
    assert_eq!(status, 400);
    assert!(body.contains("kernel_image_path"), "{body}");
    let (status, body) = vmm.ask("PATCH", "/vm", r#"{"state":"Paused"}"#);
    assert_eq!(status, 400);
    assert!(body.contains("not supported before starting"), "{body}");
    assert!(vmm.log().contains("[vm-1:main] API: PATCH \"/vm\": 400"), "{}", vmm.log());
}

/// Neither needs a KVM that works: both fail before it comes to that.
#[test]
fn a_start_that_fails_leaves_nothing_and_can_be_repeated() {
    let vmm = Vmm::start(&[]);
    let kernel = write(vmm.dir.path(), "kernel", "x");
    let console = vmm.dir.path().join("console");
    let start = || vmm.ask("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
    let boot_source = format!(r#"{{"kernel_image_path":"{kernel}"}}"#);
    assert_eq!(vmm.ask("PUT", "/boot-source", &boot_source).0, 204);
    let serial = format!(r#"{{"socket_path":"{}"}}"#, console.display());
    assert_eq!(vmm.ask("PUT", "/serial", &serial).0, 204);
    assert_eq!(vmm.ask("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":1048576}"#).0, 204);
    let (status, body) = start();
    assert_eq!(status, 400);
    assert!(body.contains("mem_size_mib 1048576 is more than this host's memory"), "{body}");
    assert_eq!(vmm.ask("PATCH", "/machine-config", r#"{"mem_size_mib":64}"#).0, 204);
    for _ in 0..2 {
        let (status, body) = start();
        assert_eq!(status, 400);
        assert!(body.contains("Start microvm error: "), "{body}");
        assert!(!console.exists());
    }
    assert!(vmm.ask("GET", "/", "").1.contains("Not started"));
}

#[test]
fn many_clients_at_once_are_served() {
    let vmm = Vmm::start(&[]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut stream = vmm.connect();
                for _ in 0..100 {
                    stream.write_all(b"GET /version HTTP/1.1\r\n\r\n").unwrap();
                    let mut answer = Vec::new();
                    while !answer.ends_with(b"}") {
                        let mut chunk = [0; 512];
                        let count = stream.read(&mut chunk).unwrap();
                        assert_ne!(count, 0);
                        answer.extend_from_slice(&chunk[..count]);
                    }
                    assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"));
                }
            });
        }
    });
}

#[test]
fn log_and_metrics_go_where_they_are_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (log, metrics) = (path("log"), path("metrics"));
    let arguments = [
        "--log-path",
        &log,
        "--level",
        "Debug",
        "--show-level",
        "--metrics-path",
        &metrics,
        "--start-time-us",
        "1",
    ];
    let vmm = Vmm::start(&arguments);
    vmm.ask("GET", "/version", "");
    let (status, body) = vmm.ask("PUT", "/metrics", &format!(r#"{{"metrics_path":"{metrics}"}}"#));
    assert_eq!(status, 400);
    assert!(body.contains("already configured"), "{body}");
    let (code, stderr, _) = vmm.signal(Signal::SIGTERM);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains(":main:DEBUG] API: GET /version"), "{log}");
    assert!(log.contains(":main:INFO] The process was asked to end by SIGTERM."), "{log}");
    let line: serde_json::Value =
        serde_json::from_str(std::fs::read_to_string(metrics).unwrap().trim()).unwrap();
    assert_eq!(line["get_api_requests"]["vmm_version_count"], 1);
    assert_eq!(line["put_api_requests"]["metrics_fails"], 1);
    assert!(line["api_server"]["process_startup_time_us"].as_u64().unwrap() > 1);
}

#[test]
fn signals_end_the_process_and_leave_no_socket() {
    for (signal, code, message) in [
        (Signal::SIGTERM, ExitCode::Ok, "SIGTERM"),
        (Signal::SIGINT, ExitCode::Ok, "SIGINT"),
        (Signal::SIGHUP, ExitCode::Sighup, "SIGHUP"),
        (Signal::SIGSEGV, ExitCode::Sigsegv, "ended by SIGSEGV"),
        (Signal::SIGBUS, ExitCode::Sigbus, "ended by SIGBUS"),
        (Signal::SIGILL, ExitCode::Sigill, "ended by SIGILL"),
        (Signal::SIGXCPU, ExitCode::Sigxcpu, "ended by SIGXCPU"),
        (Signal::SIGSYS, ExitCode::BadSyscall, "forbidden system call"),
    ] {
        let (got, log, left) = Vmm::start(&[]).signal(signal);
        assert_eq!(got, Some(code as i32), "{signal}");
        assert!(log.contains(message), "{signal}: {log}");
        assert!(!left, "{signal}");
    }
    let vmm = Vmm::start(&[]);
    for signal in [Signal::SIGPIPE, Signal::SIGXFSZ] {
        kill(Pid::from_raw(vmm.child.id() as i32), signal).unwrap();
    }
    assert_eq!(vmm.ask("GET", "/", "").0, 200);
}

/// Nobody can keep the API from others, whatever they send or do not send.
#[test]
fn hostile_clients_shut_nobody_out() {
    let vmm = Vmm::start(&[]);
    let mut held = Vec::new();
    for n in 0..30 {
        let mut stream = vmm.connect();
        let start: &[u8] = match n % 3 {
            0 => b"",
            1 => b"PUT /mmds HTTP/1.1\r\nContent-Length: 51200\r\n\r\n{",
            _ => b"GET / HT",
        };
        stream.write_all(start).unwrap();
        held.push(stream);
        assert_eq!(vmm.ask("GET", "/", "").0, 200);
    }
    let mut flood = vmm.connect();
    flood.set_nonblocking(true).unwrap();
    // Requests without reading answers, until the socket takes no more.
    while flood.write(&b"GET /vm/config HTTP/1.1\r\n\r\n".repeat(100)).is_ok() {}
    assert_eq!(vmm.ask("GET", "/", "").0, 200);
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.child.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    assert!(kib < 32 << 10, "{kib} KiB resident");
}

#[test]
fn the_exit_file_tells_how_it_ended_and_the_pid_file_who_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (exit, pid) = (path("exit"), path("pid"));
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let files = ["--exit-file", &exit, "--pid-file", &pid];
    for (signal, line) in [
        (Signal::SIGTERM, "000\n"),
        (Signal::SIGHUP, "156\n"),
        (Signal::SIGSEGV, "150\n"),
        (Signal::SIGKILL, ""),
    ] {
        let vmm = Vmm::start(&files);
        assert_eq!(read(&exit), "");
        assert_eq!(read(&pid).trim(), vmm.child.id().to_string());
        vmm.signal(signal);
        assert_eq!(read(&exit), line, "{signal}");
    }
    // Whoever has given up on this process has put a directory there.
    std::fs::remove_file(&pid).unwrap();
    std::fs::create_dir(&pid).unwrap();
    let socket = path("api");
    let (code, _, err) = ends(&[&files[..], &["--api-sock", &socket]].concat());
    assert_eq!(code, 1);
    assert!(err.contains("pid file"), "{err}");
    assert!(!Path::new(&socket).exists() && !Path::new(&path("pid.new")).exists());
    assert_eq!(read(&exit), "001\n");
}

#[test]
fn metrics_can_be_asked_for() {
    let vmm = Vmm::start(&[]);
    vmm.ask("GET", "/version", "");
    let (status, body) = vmm.ask("GET", "/metrics", "");
    assert_eq!(status, 200);
    let metrics: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(metrics["get_api_requests"]["vmm_version_count"], 1);
    assert_eq!(vmm.ask("GET", "/metrics", "").0, 200);
}
