//! Processes run through the agent: how they start, what they are given, how they end.

#![allow(clippy::unwrap_used)] // clippy.toml allows it in test functions, not in their helpers

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{Service, argv, exists, on_tty, sh, wait_for};
use pulau_agent_protocol::ClientError;
use pulau_agent_protocol::client::{Exec, Output, OutputEvent};
use pulau_agent_protocol::message::{ErrorCode, ExecRequest, ExitStatus, WindowSize};

fn run(service: &Service, request: &ExecRequest, stdin: &[u8]) -> Output {
    service.connect().output(request, stdin).unwrap()
}

/// Standard output of a script that must succeed, without the last line feed.
fn says(service: &Service, request: &ExecRequest) -> String {
    let output = run(service, request, b"");
    assert_eq!(output.status, ExitStatus::Code(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// Reads output until it contains `text`.
fn read_until(exec: &mut Exec<UnixStream>, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        match exec.output.next_event().unwrap() {
            OutputEvent::Stdout(bytes) | OutputEvent::Stderr(bytes) => {
                seen += &String::from_utf8_lossy(bytes)
            }
            OutputEvent::Exited(status) => panic!("it {status} after {seen:?}, without {text:?}"),
        }
    }
    seen
}

/// Reads to the end: remaining output and status.
fn finish(mut exec: Exec<UnixStream>) -> (String, ExitStatus) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = exec.output.copy_to(&mut out, &mut err).unwrap();
    out.extend(err);
    (String::from_utf8_lossy(&out).into_owned(), status)
}

#[test]
fn outputs_and_exit_code_come_back_apart() {
    let service = Service::start();
    let output = run(&service, &sh("echo out; echo err >&2; exit 7"), b"");
    assert_eq!(
        output,
        Output { status: ExitStatus::Code(7), stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec() }
    );
    service.assert_idle();
}

#[test]
fn standard_input_is_given_and_ended() {
    let service = Service::start();
    let output = run(&service, &argv(["sort"]), b"b\nc\na\n");
    assert_eq!((output.status, output.stdout), (ExitStatus::Code(0), b"a\nb\nc\n".to_vec()));
    assert_eq!(says(&service, &sh("readlink /proc/self/fd/0")), "/dev/null");
    service.assert_idle();
}

#[test]
fn a_process_that_does_not_read_its_input_ends_all_the_same() {
    let service = Service::start();
    let input = vec![b'x'; 4 << 20];
    assert_eq!(run(&service, &argv(["true"]), &input).status, ExitStatus::Code(0));
    // It closes its input and lives on: the rest is thrown away.
    let output = run(&service, &sh("exec <&-; sleep 0.3; echo alive"), &input);
    assert_eq!((output.status, output.stdout), (ExitStatus::Code(0), b"alive\n".to_vec()));
    service.assert_idle();
}

#[test]
fn writing_to_a_closed_input_says_so() {
    let service = Service::start();
    let request = ExecRequest { stdin: true, ..sh("exec <&-; echo closed; sleep 60") };
    let mut exec = service.connect().exec(&request).unwrap();
    read_until(&mut exec, "closed");
    let Exec { mut input, mut output, .. } = exec;
    let reader = std::thread::spawn(move || {
        let _ = output.next_event();
    });
    let error = loop {
        if let Err(e) = input.write_all(&[b'x'; 65536]) {
            break e;
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    input.signal(9).unwrap();
    reader.join().unwrap();
    service.assert_idle();
}

#[test]
fn environment_directory_and_user() {
    let service = Service::start();
    let defaults = says(&service, &argv(["env"]));
    let mut names: Vec<&str> = defaults.lines().map(|l| l.split('=').next().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["HOME", "LOGNAME", "PATH", "SHELL", "USER"]);

    let env = BTreeMap::from([("A".to_owned(), "1 2".to_owned()), ("HOME".to_owned(), "/x".to_owned())]);
    let mut request = ExecRequest { env: env.clone(), ..argv(["env"]) };
    assert!(says(&service, &request).contains("A=1 2"));
    assert!(says(&service, &request).contains("HOME=/x"));
    request = ExecRequest { env, clear_env: true, ..argv(["/usr/bin/env"]) };
    assert_eq!(says(&service, &request), "A=1 2\nHOME=/x");

    assert_eq!(says(&service, &ExecRequest { cwd: Some("/usr".into()), ..argv(["pwd"]) }), "/usr");
    assert_eq!(says(&service, &ExecRequest { user: Some("4242:77".into()), ..sh("pwd") }), "/");

    let who = sh("id -u; id -g; id -G; umask");
    assert_eq!(says(&service, &ExecRequest { user: Some("daemon".into()), ..who.clone() }), "1\n1\n1\n0022");
    assert_eq!(says(&service, &ExecRequest { user: Some("4242:77".into()), ..who }), "4242\n77\n77\n0022");
    service.assert_idle();
}

#[test]
fn a_process_starts_clean() {
    let service = Service::start();
    // Its descriptors are its own three (and the one `ls` reads the list by).
    assert_eq!(says(&service, &argv(["ls", "/proc/self/fd"])), "0\n1\n2\n3");
    let status = says(&service, &argv(["cat", "/proc/self/status"]));
    for set in ["SigBlk", "SigIgn", "SigCgt"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000")), "{status}");
    }
    // It leads a session and a group.
    let stat = says(&service, &sh("exec cat /proc/self/stat"));
    let fields: Vec<&str> = stat.split(' ').collect();
    assert_eq!((fields[4], fields[5]), (fields[0], fields[0]), "{stat}");
}

#[test]
fn what_cannot_be_started_says_why() {
    let service = Service::start();
    let fails = |request: ExecRequest| match service.connect().exec(&request) {
        Err(ClientError::Agent(error)) => (error.code, error.message),
        other => panic!("{other:?}"),
    };
    let (code, message) = fails(argv(["no-such-program", "x"]));
    assert_eq!(code, ErrorCode::NotFound);
    assert!(message.contains("no-such-program"), "{message}");
    assert_eq!(fails(argv(["/etc/passwd"])).0, ErrorCode::PermissionDenied);
    assert_eq!(fails(argv([])).0, ErrorCode::BadRequest);
    assert_eq!(fails(argv(["a\0b"])).0, ErrorCode::BadRequest);
    let (code, message) = fails(ExecRequest { cwd: Some("/no/such".into()), ..argv(["true"]) });
    assert_eq!(code, ErrorCode::NotFound);
    assert!(message.contains("cwd /no/such"), "{message}");
    assert_eq!(
        fails(ExecRequest { cwd: Some("/etc/passwd".into()), ..argv(["true"]) }).0,
        ErrorCode::WrongType
    );
    assert_eq!(fails(ExecRequest { cwd: Some("etc".into()), ..argv(["true"]) }).0, ErrorCode::BadRequest);
    assert_eq!(
        fails(ExecRequest { user: Some("no-one-here".into()), ..argv(["true"]) }).0,
        ErrorCode::NotFound
    );
    let env = BTreeMap::from([("A=B".to_owned(), String::new())]);
    assert_eq!(fails(ExecRequest { env, ..argv(["true"]) }).0, ErrorCode::BadRequest);
    service.assert_idle();
}

#[test]
fn signals_reach_the_group_and_show_in_the_status() {
    let service = Service::start();
    let mut exec = service.connect().exec(&sh("sleep 60 & echo up; wait")).unwrap();
    read_until(&mut exec, "up");
    exec.input.signal(15).unwrap();
    assert_eq!(finish(exec).1, ExitStatus::Signal(15));

    let script = "trap 'echo got; exit 3' USR1; echo up; while :; do sleep 0.05; done";
    let mut exec = service.connect().exec(&sh(script)).unwrap();
    read_until(&mut exec, "up");
    // To the group: the sleep dies of it, the shell handles it.
    exec.input.signal(10).unwrap();
    assert!(matches!(finish(exec), (out, ExitStatus::Code(3)) if out.contains("got")));
    service.assert_idle();
}

/// The process never reads; the signal must not wait behind the input.
#[test]
fn a_signal_overtakes_input_nobody_takes() {
    let service = Service::start();
    let request = ExecRequest { stdin: true, ..argv(["sleep", "60"]) };
    let Exec { mut input, mut output, .. } = service.connect().exec(&request).unwrap();
    // All the window allows: the pipe takes 64 KiB of it, the agent holds the rest.
    input.write_all(&vec![0; 256 << 10]).unwrap();
    input.signal(9).unwrap();
    let status = output.copy_to(&mut std::io::sink(), &mut std::io::sink()).unwrap();
    assert_eq!(status, ExitStatus::Signal(9));
    service.assert_idle();
}

#[test]
fn a_terminal_is_one() {
    let service = Service::start();
    let script = "tty; stty size; echo $TERM; test -t 0 -a -t 1 -a -t 2 && : </dev/tty && echo terminal";
    let output = run(&service, &on_tty(sh(script)), b"");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert!(lines[0].starts_with("/dev/pts/"), "{text}");
    assert_eq!(lines[1..], ["24 80", "xterm", "terminal", ""]);
    assert_eq!(output.status, ExitStatus::Code(0));
    service.assert_idle();
}

#[test]
fn a_terminal_echoes_interrupts_and_ends() {
    let service = Service::start();
    let mut exec =
        service.connect().exec(&on_tty(sh("trap 'echo caught' INT; echo up; cat; echo end"))).unwrap();
    read_until(&mut exec, "up");
    exec.input.write_all(b"line\n").unwrap();
    read_until(&mut exec, "line\r\nline\r\n");
    // Control-C, by the terminal's own line discipline.
    exec.input.write_all(b"\x03").unwrap();
    let (rest, status) = finish(exec);
    assert!(rest.contains("caught"), "{rest:?}");
    assert!(rest.ends_with("end\r\n") || status == ExitStatus::Signal(2), "{rest:?} {status}");

    let mut exec = service.connect().exec(&on_tty(argv(["cat"]))).unwrap();
    exec.input.write_all(b"to the end\n").unwrap();
    exec.input.close().unwrap();
    let (rest, status) = finish(exec);
    assert_eq!((rest.as_str(), status), ("to the end\r\nto the end\r\n", ExitStatus::Code(0)));
    service.assert_idle();
}

#[test]
fn a_terminal_changes_size_and_tells_the_process() {
    let service = Service::start();
    let script = "trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.05; done";
    let mut exec = service.connect().exec(&on_tty(sh(script))).unwrap();
    read_until(&mut exec, "up");
    exec.input.resize(WindowSize { rows: 50, cols: 132 }).unwrap();
    let (rest, status) = finish(exec);
    assert!(rest.contains("50 132"), "{rest:?}");
    assert_eq!(status, ExitStatus::Code(0));
}

/// All that was written to the terminal before the end comes out, many times over.
#[test]
fn a_terminal_loses_nothing_at_the_end() {
    let service = Service::start();
    for round in 0..30 {
        let output = run(&service, &on_tty(sh("seq 1 2000")), b"");
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.lines().count(), 2000, "round {round}");
        assert!(text.ends_with("\r\n2000\r\n"), "round {round}");
    }
    service.assert_idle();
}

/// A process left behind keeps the pipes open; the exec ends with its own process all the same, and what
/// that wrote is all there.
#[test]
fn a_daemon_left_behind_does_not_hold_the_exec() {
    let service = Service::start();
    let begun = Instant::now();
    let mut exec = service.connect().exec(&sh("sleep 7 & echo $!; seq 1 10000; exit 0")).unwrap();
    let first = read_until(&mut exec, "\n");
    let left: u32 = first.lines().next().unwrap().parse().unwrap();
    let (rest, status) = finish(exec);
    assert_eq!(status, ExitStatus::Code(0));
    assert!((first + &rest).ends_with("\n10000\n"));
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(exists(left), "it was not the exec's to end");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(left as i32), nix::sys::signal::SIGKILL).unwrap();
    service.assert_idle();
}

#[test]
fn a_daemon_that_floods_the_pipe_does_not_hold_the_exec() {
    let service = Service::start();
    let output = run(&service, &sh("yes & echo $! >&2; sleep 0.1; exit 4"), b"");
    assert_eq!(output.status, ExitStatus::Code(4));
    let left: u32 = String::from_utf8(output.stderr).unwrap().trim().parse().unwrap();
    wait_for("the daemon to get SIGPIPE", || !exists(left) || zombie(left));
    service.assert_idle();
}

fn zombie(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}
