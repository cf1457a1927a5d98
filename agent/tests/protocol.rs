//! The conversation itself: versions, requests one after another, and hosts that break the rules.

#![allow(clippy::unwrap_used)] // clippy.toml allows it in test functions, not in their helpers

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;

use common::{Noise, Service, argv, soon};
use pulau_agent_protocol::frame::{self, Decoder, Kind};
use pulau_agent_protocol::message::{EntropySeed, ErrorCode, ErrorReply, Identity, Resumed, Role, WallClock};
use pulau_agent_protocol::{ClientError, Connection};

const HELLO: &[u8] = br#"{"min_version":1,"max_version":1,"client":"test"}"#;

/// The agent's frames up to the end of the connection.
fn read_all(mut stream: UnixStream) -> Vec<(Kind, String)> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    // A reset in place of an end: the agent closed with bytes unread.
    while let Ok(Some((kind, payload))) = decoder.read(&mut stream) {
        frames.push((kind, String::from_utf8_lossy(payload).into_owned()));
    }
    frames
}

fn error(frame: &(Kind, String)) -> ErrorReply {
    assert_eq!(frame.0, Kind::Error, "{frame:?}");
    serde_json::from_str(&frame.1).unwrap()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorReply {
    match result {
        Err(ClientError::Agent(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn versions_are_negotiated() {
    let service = Service::start();
    let hello = service.connect().agent().clone();
    assert_eq!((hello.version, hello.role), (1, Role::Service));
    assert!(hello.agent.starts_with("pulau-agent 0."), "{}", hello.agent);

    let talk = |hello: &str| {
        let mut stream = service.raw();
        frame::write(&mut stream, Kind::Hello, hello.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        read_all(stream)
    };
    // A newer host that still speaks this version.
    let answer = talk(r#"{"min_version":1,"max_version":9,"client":"future","more":[]}"#);
    assert!(matches!(&answer[..], [(Kind::Hello, text)] if text.contains("\"version\":1")), "{answer:?}");
    for (min, max) in [(2, 9), (0, 0), (5, 3)] {
        let answer = talk(&format!(r#"{{"min_version":{min},"max_version":{max},"client":"x"}}"#));
        assert_eq!(answer.len(), 1);
        assert_eq!(error(&answer[0]).code, ErrorCode::UnsupportedVersion, "{min} to {max}");
    }
    service.assert_idle();
}

#[test]
fn requests_follow_each_other_also_after_an_error() {
    let service = Service::start();
    let mut connection = service.connect();
    let first = connection.health().unwrap();
    assert!(first.uptime_ms > 0 && first.memory_total > first.memory_available);
    assert!(first.memory_available > 0 && first.boot.is_empty() && first.problems.is_empty());
    assert_eq!((first.execs, first.id), (0, None));

    let bad = WallClock { secs: 1, nanos: 1_000_000_000 };
    assert_eq!(refusal(connection.set_time(bad)).code, ErrorCode::BadRequest);
    let bad = WallClock { secs: u64::MAX, nanos: 0 };
    assert_eq!(refusal(connection.set_time(bad)).code, ErrorCode::BadRequest);
    let bad = "dev=nosuch0,10.0.0.2/24".parse().unwrap();
    let error = refusal(connection.configure_network(&bad));
    assert_eq!(error.code, ErrorCode::NotFound);
    assert!(error.message.contains("nosuch0"), "{error}");

    let running = service.connect().exec(&argv(["sleep", "60"])).unwrap();
    assert_eq!(connection.health().unwrap().execs, 1);
    drop(running);
    service.connect().output(&argv(["true"]), b"").unwrap();
    connection.health().unwrap();
    drop(connection);
    service.assert_idle();
}

/// What comes first must not be applied if a later step is refused before anything happened; here the
/// time is refused, so the identity must not change.
#[test]
fn a_refused_resume_does_not_change_the_identity() {
    let service = Service::start();
    let mut connection = service.connect();
    let resumed = Resumed {
        identity: Identity { id: "i-1".into(), hostname: None },
        network: vec![],
        wall_clock: WallClock { secs: 0, nanos: u32::MAX },
        entropy_seed: EntropySeed::new(Noise::bytes(1, 64)).unwrap(),
    };
    assert_eq!(refusal(connection.resumed(&resumed)).code, ErrorCode::BadRequest);
    assert_eq!(connection.health().unwrap().id, None);
}

#[test]
fn rule_breakers_are_told_and_cut_off_and_nobody_else_is() {
    let service = Service::start();
    let mut bystander = service.connect();
    let hello = |bytes: &mut Vec<u8>| frame::encode(bytes, Kind::Hello, HELLO).unwrap();
    let with = |kind: Kind, payload: &[u8]| {
        let mut bytes = Vec::new();
        hello(&mut bytes);
        frame::encode(&mut bytes, kind, payload).unwrap();
        bytes
    };
    let raw = |header: [u8; 5]| {
        let mut bytes = Vec::new();
        hello(&mut bytes);
        bytes.extend(header);
        bytes
    };
    let mut no_hello = Vec::new();
    frame::encode(&mut no_hello, Kind::Request, br#"{"type":"health"}"#).unwrap();
    let cases: [(&str, Vec<u8>); 9] = [
        ("Request before the hello", no_hello),
        ("unknown frame kind 99", raw([0, 0, 0, 0, 99])),
        ("larger than the limit", raw([0xff, 0xff, 0xff, 0x7f, 2])),
        ("larger than the limit", raw([1, 0, 0, 0, 20])),
        ("Stdin where a request belongs", with(Kind::Stdin, b"x")),
        ("Hello where a request belongs", with(Kind::Hello, HELLO)),
        ("unknown variant `fly`", with(Kind::Request, br#"{"type":"fly"}"#)),
        ("EOF while parsing", with(Kind::Request, b"{")),
        ("invalid", with(Kind::Request, &[b'['; 100_000])),
    ];
    for (expected, bytes) in cases {
        let mut stream = service.raw();
        stream.write_all(&bytes).unwrap();
        // Not shut down: it is the agent who ends it.
        let frames = read_all(stream);
        let error = error(frames.last().unwrap_or_else(|| panic!("{expected}: no answer")));
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert!(error.message.contains(expected), "{error} instead of {expected}");
        bystander.health().unwrap();
    }
    drop(bystander);
    service.assert_idle();
}

/// During an exec a broken rule ends the process as well.
#[test]
fn rules_hold_during_an_exec_too() {
    let service = Service::start();
    let window = 256 * 1024;
    let flood = vec![(Kind::Stdin, vec![0; 65536]); window / 65536 + 2];
    let after_end = vec![(Kind::Stdin, vec![]), (Kind::Stdin, vec![1])];
    type Frames = Vec<(Kind, Vec<u8>)>;
    let cases: [(&str, Frames); 5] = [
        ("unacknowledged", flood),
        ("after its end", after_end),
        ("Request during an exec", vec![(Kind::Request, b"{}".to_vec())]),
        ("0 is not a signal", vec![(Kind::Control, br#"{"type":"signal","signal":0}"#.to_vec())]),
        ("65 is not a signal", vec![(Kind::Control, br#"{"type":"signal","signal":65}"#.to_vec())]),
    ];
    for (expected, frames) in cases {
        let mut stream = service.raw();
        frame::write(&mut stream, Kind::Hello, HELLO).unwrap();
        let exec = br#"{"type":"exec","argv":["sleep","60"],"stdin":true}"#;
        frame::write(&mut stream, Kind::Request, exec).unwrap();
        for (kind, payload) in frames {
            // The agent may be gone before the last of a flood.
            let _ = frame::write(&mut stream, kind, &payload);
        }
        let frames = read_all(stream);
        let error = error(frames.last().unwrap());
        assert!(error.message.contains(expected), "{error} instead of {expected}");
        service.assert_idle();
    }
}

#[test]
fn noise_in_any_place_harms_nobody() {
    let service = Service::start();
    let mut noise = Noise::new(77);
    for round in 0..150 {
        let mut bytes = vec![0; 4 + round];
        noise.fill(&mut bytes);
        let mut start = Vec::new();
        if round % 3 > 0 {
            frame::encode(&mut start, Kind::Hello, HELLO).unwrap();
        }
        if round % 3 > 1 {
            frame::encode(&mut start, Kind::Request, br#"{"type":"exec","argv":["cat"],"stdin":true}"#)
                .unwrap();
        }
        let mut stream = service.raw();
        stream.write_all(&start).unwrap();
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        read_all(stream);
    }
    service.connect().health().unwrap();
    service.assert_idle();
}

#[test]
fn the_client_gives_up_on_a_silent_agent() {
    let (host, _agent) = UnixStream::pair().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_millis(50);
    assert!(matches!(Connection::new(host, Some(deadline)), Err(ClientError::TimedOut)));
    let (host, agent) = UnixStream::pair().unwrap();
    drop(agent);
    assert!(matches!(Connection::new(host, Some(soon())), Err(ClientError::Disconnected)));
}

#[test]
fn wrong_arguments_say_how_it_is_used() {
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_pulau-agent")).args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for args in [&[][..], &["--listen"], &["--service", "--listen", "tcp:1"], &["--wat"]] {
        let (code, stderr) = run(args);
        assert_eq!(code, Some(2), "{args:?}");
        assert!(stderr.contains("pulau-agent --service [--listen ADDRESS]"), "{stderr}");
    }
    let (code, stderr) = run(&["--service", "--listen", "unix:/no/such/dir/s"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("unix:/no/such/dir/s"), "{stderr}");
}
