//! Much at once, much data, and hosts that vanish: nothing is lost, nothing waits for somebody else, and
//! nothing is left behind.

#![allow(clippy::unwrap_used)] // clippy.toml allows it in test functions, not in their helpers

mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use common::{Noise, Service, argv, exists, on_tty, sh, wait_for};
use pulau_agent_protocol::client::{Exec, OutputEvent};
use pulau_agent_protocol::frame::{self, Kind};
use pulau_agent_protocol::message::{ExecRequest, ExitStatus, Request};

/// Yields so many bytes of noise.
struct Source(Noise, usize);

impl Read for Source {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // Whole words, so that the noise does not depend on how it is cut.
        let n = (buf.len() & !7).min(self.1);
        self.0.fill(&mut buf[..n]);
        self.1 -= n;
        Ok(n)
    }
}

/// Takes so many bytes, which must be that noise.
struct Check {
    noise: Noise,
    ahead: Vec<u8>,
    taken: usize,
}

impl Check {
    fn new(seed: u64) -> Self {
        Self { noise: Noise::new(seed), ahead: vec![], taken: 0 }
    }
}

impl Write for Check {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        while self.ahead.len() < buf.len() {
            let mut more = [0; 4096];
            self.noise.fill(&mut more);
            self.ahead.extend(more);
        }
        if self.ahead[..buf.len()] != *buf {
            return Err(io::Error::other(format!("wrong bytes after {}", self.taken)));
        }
        self.ahead.drain(..buf.len());
        self.taken += buf.len();
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_hundred_mebibytes_there_and_back() {
    const SIZE: usize = 100 << 20;
    let service = Service::start();
    let exec = service.connect().exec(&ExecRequest { stdin: true, ..argv(["cat"]) }).unwrap();
    let mut check = Check::new(5);
    let begun = Instant::now();
    let status = exec.run(Source(Noise::new(5), SIZE), &mut check, &mut io::stderr()).unwrap();
    eprintln!("{} MiB/s each way", (SIZE >> 20) as f64 / begun.elapsed().as_secs_f64());
    assert_eq!((status, check.taken), (ExitStatus::Code(0), SIZE));
    service.assert_idle();
}

#[test]
fn both_outputs_flood_and_both_arrive() {
    let service = Service::start();
    let script = "head -c 20000000 /dev/zero & head -c 20000000 /dev/zero >&2 & wait";
    let output = service.connect().output(&sh(script), b"").unwrap();
    assert_eq!((output.stdout.len(), output.stderr.len()), (20_000_000, 20_000_000));
    service.assert_idle();
}

#[test]
fn fifty_at_once_keep_their_own() {
    let service = Service::start();
    thread::scope(|scope| {
        for n in 0..50u64 {
            let service = &service;
            scope.spawn(move || {
                let input = Noise::bytes(n + 1, 200_000);
                let script = format!("cat; echo {n} >&2; exit {n}");
                let output = service.connect().output(&sh(&script), &input).unwrap();
                assert_eq!(output.status, ExitStatus::Code(n as i32));
                assert_eq!(output.stderr, format!("{n}\n").as_bytes());
                assert!(output.stdout == input, "exec {n} got another's bytes");
            });
        }
    });
    service.assert_idle();
}

#[test]
fn a_host_that_does_not_read_holds_up_only_its_own_process() {
    let service = Service::start();
    let slow: Vec<_> =
        (0..5).map(|_| service.connect().exec(&sh("head -c 5000000 /dev/zero; exit 9")).unwrap()).collect();
    thread::sleep(Duration::from_millis(100));
    for n in 0..20 {
        let output = service.connect().output(&sh(&format!("echo {n}")), b"").unwrap();
        assert_eq!(output.stdout, format!("{n}\n").as_bytes());
    }
    // And loses nothing by being slow.
    for mut exec in slow {
        let mut out = Vec::new();
        let status = exec.output.copy_to(&mut out, &mut io::sink()).unwrap();
        assert_eq!((status, out.len()), (ExitStatus::Code(9), 5_000_000));
    }
    service.assert_idle();
}

/// Process ids a script prints, one a line, up to an empty line.
fn printed_pids(exec: &mut Exec<UnixStream>) -> Vec<u32> {
    let mut text = String::new();
    while !text.replace('\r', "").contains("\n\n") {
        match exec.output.next_event().unwrap() {
            OutputEvent::Stdout(bytes) => text += std::str::from_utf8(bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

#[test]
fn processes_of_a_vanished_host_are_ended() {
    let service = Service::start();
    // Of its own group, in the background, stopped, deaf to SIGHUP: all of one session.
    let script = "trap '' HUP; echo $$; sleep 300 & echo $!; (exec setsid -w sleep 0; :) ; \
        set -m 2>/dev/null; sleep 301 & echo $!; sleep 302 & echo $!; kill -STOP $!; echo; while :; do sleep 1; done";
    for request in [sh(script), on_tty(sh(script))] {
        let mut exec = service.connect().exec(&request).unwrap();
        let pids = printed_pids(&mut exec);
        assert_eq!(pids.len(), 4);
        assert!(pids.iter().all(|pid| exists(*pid)));
        drop(exec);
        wait_for("all of the session to end", || !pids.iter().any(|pid| alive(*pid)));
        service.assert_idle();
    }
}

/// A zombie whose parent is not the agent is for another to reap.
fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_process_that_obeys_sighup_ends_at_once() {
    let service = Service::start();
    let mut exec = service.connect().exec(&sh("echo $$; echo; exec sleep 300")).unwrap();
    let pid = printed_pids(&mut exec)[0];
    let begun = Instant::now();
    drop(exec);
    wait_for("it to end", || !exists(pid));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn a_host_that_vanishes_behind_unread_output_is_noticed() {
    let service = Service::start();
    let exec = service.connect().exec(&argv(["yes"])).unwrap();
    let pid = exec.pid;
    thread::sleep(Duration::from_millis(100));
    drop(exec);
    wait_for("it to end", || !exists(pid));
    service.assert_idle();
}

#[test]
fn many_hosts_vanish_at_any_moment_and_nothing_is_left() {
    let service = Service::start();
    let request = Request::Exec(ExecRequest { stdin: true, ..sh("sleep 30 & cat; wait") });
    let mut bytes = Vec::new();
    frame::encode(&mut bytes, Kind::Hello, br#"{"min_version":1,"max_version":1,"client":"test"}"#).unwrap();
    frame::encode(&mut bytes, Kind::Request, &serde_json::to_vec(&request).unwrap()).unwrap();
    frame::encode(&mut bytes, Kind::Stdin, &[7; 5000]).unwrap();
    thread::scope(|scope| {
        for n in 0..60 {
            let (service, bytes) = (&service, &bytes);
            scope.spawn(move || {
                let mut stream = service.raw();
                let cut = bytes.len() * (n % 12) / 11;
                stream.write_all(&bytes[..cut]).unwrap();
                thread::sleep(Duration::from_millis(n as u64 % 7));
            });
        }
    });
    service.assert_idle();
    // And it still serves.
    assert_eq!(service.connect().output(&argv(["echo", "ok"]), b"").unwrap().stdout, b"ok\n");
}

#[test]
fn the_agents_end_ends_its_processes() {
    let service = Service::start();
    let mut exec =
        service.connect().exec(&sh("trap '' HUP; echo $$; echo; while :; do sleep 1; done")).unwrap();
    let pid = printed_pids(&mut exec)[0];
    drop(service);
    wait_for("it to end", || !alive(pid));
}
