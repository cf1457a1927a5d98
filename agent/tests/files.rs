//! Files copied in and out: exact, whole or not at all.

#![allow(clippy::unwrap_used)] // clippy.toml allows it in test functions, not in their helpers

mod common;

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use common::{Noise, Service, wait_for};
use pulau_agent_protocol::ClientError;
use pulau_agent_protocol::frame::{self, Decoder, Kind};
use pulau_agent_protocol::message::{CopyIn, ErrorCode, ErrorReply, Request};

fn request(path: &Path, size: usize) -> CopyIn {
    CopyIn {
        path: path.to_str().unwrap().to_owned(),
        size: size as u64,
        mode: 0o640,
        owner: None,
        parents: false,
        sync: false,
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> (ErrorCode, String) {
    match result {
        Err(ClientError::Agent(error)) => (error.code, error.message),
        other => panic!("{other:?}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn round_trips_of_all_sizes() {
    let service = Service::start();
    let path = service.dir.path().join("file");
    for size in [0, 1, 65_535, 65_536, 65_537, 20_000_000] {
        let bytes = Noise::bytes(size as u64, size);
        service.connect().copy_in(&request(&path, size), bytes.as_slice()).unwrap();
        assert!(fs::read(&path).unwrap() == bytes, "{size} bytes in");
        let mut back = Vec::new();
        let info = service.connect().copy_out(path.to_str().unwrap(), &mut back).unwrap();
        assert!(back == bytes, "{size} bytes out");
        assert_eq!((info.size, info.mode, info.uid, info.gid), (size as u64, 0o640, 0, 0));
        assert_eq!(info.mtime, fs::metadata(&path).unwrap().mtime());
    }
    assert_eq!(names(service.dir.path()), ["agent.sock", "file"]);
    service.assert_idle();
}

#[test]
fn mode_owner_and_parents_are_as_asked() {
    let service = Service::start();
    let path = service.dir.path().join("a/b/program");
    let wanted = CopyIn {
        mode: 0o4751,
        owner: Some("4242:77".into()),
        parents: true,
        sync: true,
        ..request(&path, 2)
    };
    service.connect().copy_in(&wanted, &b"hi"[..]).unwrap();
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o4751, 4242, 77));
    assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn what_was_there_stays_until_the_new_is_whole() {
    let service = Service::start();
    let path = service.dir.path().join("file");
    fs::write(&path, "old").unwrap();
    let only_old = || {
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(service.dir.path()), ["agent.sock", "file"]);
    };

    // The source ends early: the client says so, and closes.
    let error = service.connect().copy_in(&request(&path, 10), &b"123"[..]).unwrap_err();
    assert!(matches!(&error, ClientError::Local(e) if e.kind() == io::ErrorKind::UnexpectedEof), "{error}");
    service.assert_idle();
    only_old();

    // A host that lies about the size, either way.
    let error = raw_copy_in(&service, &request(&path, 10), &[(Kind::FileData, b"123"), (Kind::FileEnd, b"")]);
    assert_eq!(error.code, ErrorCode::Truncated, "{error}");
    assert!(error.message.contains("7 bytes before the announced 10"), "{error}");
    only_old();
    let error =
        raw_copy_in(&service, &request(&path, 2), &[(Kind::FileData, b"123"), (Kind::FileData, b"4")]);
    assert_eq!(error.code, ErrorCode::Truncated, "{error}");
    only_old();
    let error = raw_copy_in(&service, &request(&path, 2), &[(Kind::FileData, b"1"), (Kind::Request, b"{}")]);
    assert_eq!(error.code, ErrorCode::BadRequest, "{error}");
    service.assert_idle();
    only_old();
}

/// Sends these frames after the agent is ready, and returns its error.
fn raw_copy_in(service: &Service, request: &CopyIn, frames: &[(Kind, &[u8])]) -> ErrorReply {
    let mut stream = service.raw();
    let mut decoder = Decoder::new();
    let request = serde_json::to_vec(&Request::CopyIn(request.clone())).unwrap();
    frame::write(&mut stream, Kind::Hello, br#"{"min_version":1,"max_version":1,"client":"t"}"#).unwrap();
    frame::write(&mut stream, Kind::Request, &request).unwrap();
    assert_eq!(decoder.read(&mut stream).unwrap().unwrap().0, Kind::Hello);
    assert_eq!(decoder.read(&mut stream).unwrap().unwrap(), (Kind::Reply, &br#"{"type":"ready"}"#[..]));
    for (kind, payload) in frames {
        frame::write(&mut stream, *kind, payload).unwrap();
    }
    let (kind, payload) = decoder.read(&mut stream).unwrap().unwrap();
    assert_eq!(kind, Kind::Error);
    serde_json::from_slice(payload).unwrap()
}

/// Yields without end, slowly enough for the host to vanish in the middle.
struct Endless;

impl Read for Endless {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(buf.len())
    }
}

/// The disk fills up while the host sends: the agent says so, though the host has not stopped sending.
#[test]
fn an_error_in_the_middle_reaches_a_host_that_is_still_sending() {
    let service = Service::start();
    let path = service.dir.path().join("file");
    let error = {
        let mut stream = service.raw();
        let mut decoder = Decoder::new();
        let request = serde_json::to_vec(&Request::CopyIn(request(&path, 10))).unwrap();
        frame::write(&mut stream, Kind::Hello, br#"{"min_version":1,"max_version":1,"client":"t"}"#).unwrap();
        frame::write(&mut stream, Kind::Request, &request).unwrap();
        let mut data = Vec::new();
        frame::encode(&mut data, Kind::FileData, &[0; 60_000]).unwrap();
        // Far more than any socket buffer holds.
        for _ in 0..100 {
            stream.write_all(&data).unwrap();
        }
        loop {
            match decoder.read(&mut stream).unwrap().unwrap() {
                (Kind::Error, payload) => break serde_json::from_slice::<ErrorReply>(payload).unwrap(),
                _ => continue,
            }
        }
    };
    assert_eq!(error.code, ErrorCode::Truncated);
    service.assert_idle();
}

#[test]
fn a_host_that_vanishes_leaves_no_file() {
    let service = Service::start();
    let path = service.dir.path().join("file");
    let mut stream = service.raw();
    let wanted = serde_json::to_vec(&Request::CopyIn(request(&path, 1 << 30))).unwrap();
    frame::write(&mut stream, Kind::Hello, br#"{"min_version":1,"max_version":1,"client":"t"}"#).unwrap();
    frame::write(&mut stream, Kind::Request, &wanted).unwrap();
    frame::write(&mut stream, Kind::FileData, &[1; 1000]).unwrap();
    wait_for("the file beside", || names(service.dir.path()).len() == 2);
    drop(stream);
    service.assert_idle();
    assert_eq!(names(service.dir.path()), ["agent.sock"]);
}

#[test]
fn what_cannot_be_copied_in_is_refused_before_its_bytes() {
    let service = Service::start();
    let dir = service.dir.path();
    let fails = |wanted: CopyIn| refusal(service.connect().copy_in(&wanted, Endless));
    assert_eq!(fails(request(&dir.join("no/file"), 1)).0, ErrorCode::NotFound);
    assert_eq!(fails(request(dir, 1)).0, ErrorCode::WrongType);
    assert_eq!(fails(request(&dir.join("agent.sock/x"), 1)).0, ErrorCode::WrongType);
    assert_eq!(fails(request(Path::new("file"), 1)).0, ErrorCode::BadRequest);
    assert_eq!(fails(request(Path::new("/"), 1)).0, ErrorCode::BadRequest);
    assert_eq!(fails(CopyIn { mode: 0o10000, ..request(&dir.join("f"), 1) }).0, ErrorCode::BadRequest);
    assert_eq!(fails(CopyIn { size: u64::MAX, ..request(&dir.join("f"), 1) }).0, ErrorCode::BadRequest);
    assert_eq!(fails(CopyIn { size: 1 << 62, ..request(&dir.join("f"), 1) }).0, ErrorCode::NoSpace);
    let owner = Some("no-one-here".to_owned());
    assert_eq!(fails(CopyIn { owner, ..request(&dir.join("f"), 1) }).0, ErrorCode::NotFound);
    assert_eq!(fails(request(Path::new("/proc/x"), 1)).0, ErrorCode::NotFound);
    assert_eq!(names(dir), ["agent.sock"]);
    service.assert_idle();
}

#[test]
fn links_are_replaced_going_in_and_followed_coming_out() {
    let service = Service::start();
    let (target, link) = (service.dir.path().join("target"), service.dir.path().join("link"));
    fs::write(&target, "target").unwrap();
    symlink(&target, &link).unwrap();
    let mut out = Vec::new();
    service.connect().copy_out(link.to_str().unwrap(), &mut out).unwrap();
    assert_eq!(out, b"target");
    service.connect().copy_in(&request(&link, 3), &b"new"[..]).unwrap();
    assert_eq!(fs::read_to_string(&target).unwrap(), "target");
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
}

#[test]
fn only_regular_files_come_out() {
    let service = Service::start();
    let fails = |path: &str| refusal(service.connect().copy_out(path, &mut io::sink()));
    assert_eq!(fails("/no/such").0, ErrorCode::NotFound);
    assert_eq!(fails("/etc").0, ErrorCode::WrongType);
    assert_eq!(fails("/dev/zero").0, ErrorCode::WrongType);
    assert_eq!(fails("etc/passwd").0, ErrorCode::BadRequest);
    // A pipe nobody writes to must not hang the agent.
    let fifo = service.dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(fails(fifo.to_str().unwrap()).0, ErrorCode::WrongType);
    service.assert_idle();
}

#[test]
fn a_file_that_shrinks_on_its_way_out_is_truncated() {
    let service = Service::start();
    let path = service.dir.path().join("file");
    fs::write(&path, vec![1; 8_000_000]).unwrap();
    /// Shortens the file when the first bytes have come, with most of it yet to be read by the agent.
    struct Shorten<'a>(&'a Path);
    impl Write for Shorten<'_> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            fs::OpenOptions::new().write(true).open(self.0)?.set_len(1000)?;
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (code, message) = refusal(service.connect().copy_out(path.to_str().unwrap(), &mut Shorten(&path)));
    assert_eq!(code, ErrorCode::Truncated, "{message}");
    service.assert_idle();
}

#[test]
fn the_file_keeps_the_mode_asked_for_not_the_umask() {
    let service = Service::start();
    let path = service.dir.path().join("open");
    service.connect().copy_in(&CopyIn { mode: 0o666, ..request(&path, 1) }, &b"x"[..]).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o666);
}
