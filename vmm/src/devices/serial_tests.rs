use super::*;
use crate::event_loop::EventLoop;

struct Fixture {
    event_loop: EventLoop,
    port: SerialPort,
    console: Arc<Mutex<Console>>,
}

fn fixture(sink: Sink) -> Fixture {
    limited_fixture(sink, None)
}

fn limited_fixture(sink: Sink, limit: Option<TokenBucket>) -> Fixture {
    let (port, console) = create(EventFd::new(libc::EFD_NONBLOCK).unwrap(), sink, limit, None).unwrap();
    let console = Arc::new(Mutex::new(console));
    let mut event_loop = EventLoop::new().unwrap();
    let events = event_loop.subscribe(console.clone());
    lock(&console).attach(events).unwrap();
    Fixture { event_loop, port, console }
}

fn print(port: &SerialPort, text: &[u8]) {
    for byte in text {
        port.write(0, &[*byte]);
    }
}

fn pipe() -> (File, File) {
    let (read, write) = nix::unistd::pipe().unwrap();
    (read.into(), write.into())
}

#[test]
fn output_arrives_in_order_and_in_few_writes() {
    let (mut read, write) = pipe();
    let mut f = fixture(Sink { output: write, input: Input::None });
    let text: Vec<u8> = (0..3000).map(|i| b'a' + (i % 26) as u8).collect();
    print(&f.port, &text);
    f.event_loop.run_once(1000).unwrap();
    let mut got = vec![0; 4096];
    let count = read.read(&mut got).unwrap();
    assert_eq!(&got[..count], &text[..]);
}

#[test]
fn a_sink_that_blocks_never_blocks_the_guest_or_the_loop() {
    let (mut read, write) = pipe();
    let mut f = fixture(Sink { output: write, input: Input::None });
    for _ in 0..300 {
        print(&f.port, &[b'x'; 1024]);
        f.event_loop.run_once(0).unwrap();
    }
    assert_eq!(lock(&lock(&f.console).pending).file.bytes.len(), BUFFER);
    assert!(lock(&lock(&f.console).pending).file.dropped > 0);
    let mut drained = vec![0; 1 << 20];
    let mut total = read.read(&mut drained).unwrap();
    for _ in 0..50 {
        f.event_loop.run_once(0).unwrap();
    }
    total += read.read(&mut drained).unwrap();
    assert!(total > BUFFER, "{total}");
    assert!(
        lock(&lock(&f.console).pending).file.bytes.is_empty(),
        "what was kept arrives once there is room"
    );
}

#[test]
fn input_waits_for_room_and_is_complete() {
    let (input, mut keyboard) = pipe();
    let (_read, write) = pipe();
    let mut f = fixture(Sink { output: write, input: Input::File(input) });
    let text: Vec<u8> = (0..500u32).map(|i| i as u8).collect();
    keyboard.write_all(&text).unwrap();
    let mut got = Vec::new();
    for _ in 0..2000 {
        f.event_loop.run_once(0).unwrap();
        let mut status = [0];
        f.port.read(5, &mut status);
        if status[0] & 1 == 1 {
            let mut byte = [0];
            f.port.read(0, &mut byte);
            got.push(byte[0]);
        }
    }
    assert_eq!(got, text);
    drop(keyboard);
    f.event_loop.run_once(100).unwrap();
    assert!(!lock(&f.console).input_open);
}

#[test]
fn a_client_attaches_sees_what_was_written_and_may_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let (mut log, write) = pipe();
    let mut f = fixture(Sink { output: write, input: Input::Client(ConsoleSocket::bind(&path).unwrap()) });
    print(&f.port, b"before ");
    f.event_loop.run_once(0).unwrap();
    let mut first = UnixStream::connect(&path).unwrap();
    f.event_loop.run_once(1000).unwrap();
    print(&f.port, b"after");
    f.event_loop.run_once(1000).unwrap();
    let mut got = [0; 64];
    let count = first.read(&mut got).unwrap();
    assert_eq!(&got[..count], b"before after");

    let mut second = UnixStream::connect(&path).unwrap();
    f.event_loop.run_once(1000).unwrap();
    assert_eq!(second.read(&mut got).unwrap(), 0, "refused while another is attached");

    first.write_all(b"k").unwrap();
    f.event_loop.run_once(1000).unwrap();
    let mut byte = [0];
    f.port.read(0, &mut byte);
    assert_eq!(byte, [b'k']);

    drop(first);
    for _ in 0..3 {
        f.event_loop.run_once(10).unwrap();
    }
    let mut third = UnixStream::connect(&path).unwrap();
    f.event_loop.run_once(1000).unwrap();
    print(&f.port, b"again");
    f.event_loop.run_once(1000).unwrap();
    let count = third.read(&mut got).unwrap();
    assert_eq!(&got[..count], b"again");
    let count = log.read(&mut got).unwrap();
    assert_eq!(&got[..count], b"before afteragain", "the file gets all of it, whoever is attached");
}

#[test]
fn a_client_that_does_not_read_costs_the_file_nothing_and_gets_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let log = File::create(dir.path().join("log")).unwrap();
    let mut f = fixture(Sink { output: log, input: Input::Client(ConsoleSocket::bind(&path).unwrap()) });
    let mut client = UnixStream::connect(&path).unwrap();
    f.event_loop.run_once(1000).unwrap();
    let total = 2000 * 512;
    for n in 0..2000u32 {
        print(&f.port, &[b'a' + (n % 26) as u8; 512]);
        f.event_loop.run_once(0).unwrap();
    }
    assert_eq!(std::fs::metadata(dir.path().join("log")).unwrap().len(), total);
    // It types all the same.
    client.write_all(b"k").unwrap();
    f.event_loop.run_once(1000).unwrap();
    let mut byte = [0];
    f.port.read(0, &mut byte);
    assert_eq!(byte, [b'k']);
    client.set_nonblocking(true).unwrap();
    let mut seen = Vec::new();
    for _ in 0..200 {
        let mut chunk = vec![0; 64 << 10];
        if let Ok(count) = client.read(&mut chunk) {
            seen.extend_from_slice(&chunk[..count]);
        }
        f.event_loop.run_once(0).unwrap();
    }
    assert!((seen.len() as u64) < total && seen.len() > BUFFER);
    assert!(seen.ends_with(&[b'a' + (1999 % 26) as u8; 512]));
}

#[test]
fn output_beyond_the_limit_is_dropped() {
    let (mut read, write) = pipe();
    let hour = std::time::Duration::from_secs(3600);
    let limit = TokenBucket::new(10, 5, hour, Instant::now());
    let mut f = limited_fixture(Sink { output: write, input: Input::None }, limit);
    print(&f.port, b"0123456789abcdefghij");
    f.event_loop.run_once(1000).unwrap();
    let mut got = [0; 64];
    let count = read.read(&mut got).unwrap();
    assert_eq!(&got[..count], b"0123456789abcde");
}

#[test]
fn the_sockets_file_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let socket = ConsoleSocket::bind(&path).unwrap();
    assert!(ConsoleSocket::bind(&path).is_err());
    assert!(path.exists());
    drop(socket);
    assert!(!path.exists());
}

#[test]
fn a_guest_that_never_stops_printing_leaves_others_their_turn() {
    use std::time::Duration;
    let output = File::options().write(true).open("/dev/null").unwrap();
    let mut f = fixture(Sink { output, input: Input::None });
    let port = SerialPort(f.port.0.clone());
    let printing = std::thread::spawn(move || {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            print(&port, b"more and more");
        }
    });
    let start = Instant::now();
    for _ in 0..20 {
        f.event_loop.run_once(1000).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    printing.join().unwrap();
}
