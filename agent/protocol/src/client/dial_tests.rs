use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// A VMM's socket on which each connection in turn is answered by the next of `answers` and closed, the
/// last only when the thread is joined.
fn vmm(dir: &Path, answers: &'static [&'static [u8]]) -> (PathBuf, JoinHandle<(Vec<String>, UnixStream)>) {
    let path = dir.join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || {
        let mut asked = Vec::new();
        let mut last = None;
        for (i, answer) in answers.iter().enumerate() {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            while !line.ends_with('\n') {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                line.push(byte[0].into());
            }
            asked.push(line);
            stream.write_all(answer).unwrap();
            last = (i + 1 == answers.len()).then_some(stream);
        }
        (asked, last.unwrap())
    });
    (path, thread)
}

#[test]
fn bytes_after_the_answer_are_the_guests() {
    let dir = tempfile::tempdir().unwrap();
    let (path, thread) = vmm(dir.path(), &[b"OK 1073741824\nfrom the guest"]);
    let mut stream = dial(&path, 1024, soon()).unwrap();
    let mut rest = [0; 14];
    stream.read_exact(&mut rest).unwrap();
    assert_eq!(&rest, b"from the guest");
    assert_eq!(thread.join().unwrap().0, ["CONNECT 1024\n"]);
}

#[test]
fn a_closed_connection_means_nothing_listens() {
    let dir = tempfile::tempdir().unwrap();
    let (path, thread) = vmm(dir.path(), &[b"", b"OK 1\n"]);
    assert!(matches!(dial(&path, 7, soon()), Err(DialError::Refused { port: 7 })));
    dial(&path, 7, soon()).unwrap();
    thread.join().unwrap();
}

#[test]
fn anything_but_ok_is_reported_as_it_came() {
    for answer in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"OK x\n", b"OK\n", &[b'x'; 100]] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || listener.accept().unwrap().0.write_all(answer).unwrap());
        let error = dial(&path, 7, soon()).unwrap_err();
        let DialError::Answer(text) = error else { panic!("{error:?}") };
        assert!(String::from_utf8_lossy(answer).starts_with(&text), "{text}");
        assert!(text.len() <= MAX_ANSWER);
        thread.join().unwrap();
    }
}

#[test]
fn no_socket_and_a_silent_vmm_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let error = dial(&path, 7, soon()).unwrap_err();
    assert!(matches!(error, DialError::Socket { .. }));
    assert!(error.to_string().contains("v.sock"), "{error}");

    let _listener = UnixListener::bind(&path).unwrap();
    let begun = Instant::now();
    let error = dial(&path, 7, begun + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, DialError::TimedOut { port: 7 }), "{error:?}");
    assert!((50..5000).contains(&begun.elapsed().as_millis()));
}

#[test]
fn a_full_backlog_does_not_hold_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    socket::listen(&fd, socket::Backlog::new(0).unwrap()).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    let error = dial(&path, 7, Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, DialError::TimedOut { port: 7 }), "{error:?}");
}

#[test]
fn connect_tries_again_while_the_guest_boots() {
    const HELLO: &[u8] = b"OK 5\n\x32\0\0\0\x01{\"version\":1,\"agent\":\"test agent\",\"role\":\"init\"}  ";
    let dir = tempfile::tempdir().unwrap();
    // Nothing listens in the guest; then the VMM says OK and the guest resets; then the agent is up.
    let (path, thread) = vmm(dir.path(), &[b"", b"OK 4\n", HELLO]);
    let connection = connect(&path, soon()).unwrap();
    assert_eq!(connection.agent().agent, "test agent");
    assert_eq!(thread.join().unwrap().0.len(), 3);
}

#[test]
fn connect_gives_up_at_its_deadline_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let begun = Instant::now();
    let error = connect(&path, begun + Duration::from_millis(100)).unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5));
}
