use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::packet::{HOST_CID, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::event_loop::{EventLoop, lock};
use crate::virtio::testing::{Driver, MEMORY_SIZE};

const CID: u64 = 3;
const RX: usize = RX_QUEUE as usize;
const TX: usize = TX_QUEUE as usize;
const EVENT: usize = EVENT_QUEUE as usize;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_BUFFER_SIZE: u32 = 4096;
const TX_BUFFER: u64 = 0x40_0000;
const GUEST_BUF_ALLOC: u32 = 256 << 10;

struct Guest {
    driver: Driver,
    device: Arc<Mutex<Vsock>>,
    event_loop: EventLoop,
    features: u64,
    dir: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        Self::with_features(F_RING_EVENT_IDX)
    }

    fn with_features(features: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = Arc::new(Mutex::new(Vsock::new(CID, dir.path().join("v.sock")).unwrap()));
        let mut event_loop = EventLoop::new().unwrap();
        let events = event_loop.subscribe(device.clone());
        lock(&device).attach(events);
        let driver = Driver::new(&QUEUE_SIZES);
        lock(&device).activate(driver.activation(features)).unwrap();
        Self { driver, device, event_loop, features, dir }
    }

    fn with_buffers() -> Self {
        let mut guest = Self::new();
        guest.offer_rx(128);
        guest
    }

    fn offer_rx(&mut self, count: u16) {
        for i in 0..u64::from(count) {
            let address = RX_BUFFERS + i * u64::from(RX_BUFFER_SIZE);
            self.driver.queues[RX].offer(&[(address, RX_BUFFER_SIZE, true)]);
        }
        self.kick(RX_QUEUE);
    }

    fn kick(&mut self, queue: u32) {
        lock(&self.device).process(queue, EventSet::IN);
    }

    /// Lets the event loop deal with everything that happened.
    fn settle(&mut self) {
        for _ in 0..50 {
            self.event_loop.run_once(2).unwrap();
        }
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.write(TX_BUFFER, &header.to_bytes());
        self.driver.write(TX_BUFFER + 44, payload);
        let len = 44 + payload.len() as u32;
        self.driver.queues[TX].offer(&[(TX_BUFFER, len, false)]);
        self.kick(TX_QUEUE);
        assert!(self.driver.queues[TX].used_chain().is_some());
    }

    /// The next packet to the guest, whose buffer is offered again at once.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        if let Some(packet) = self.receive_now() {
            return Some(packet);
        }
        self.settle();
        self.receive_now()
    }

    fn receive_now(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.driver.queues[RX].used_chain()?;
        let address = RX_BUFFERS + u64::from(head) * u64::from(RX_BUFFER_SIZE);
        let bytes = self.driver.read(address, len as usize);
        let header = Header::from_bytes(bytes[..44].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - 44);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        self.driver.queues[RX].publish(head);
        Some((header, bytes[44..].to_vec()))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, payload) = self.receive().unwrap_or_else(|| panic!("no packet, expected {op}"));
        assert_eq!((header.op, payload.len()), (op, 0), "{header:?}");
        header
    }

    fn expect_nothing(&mut self) {
        if let Some((header, _)) = self.receive() {
            panic!("unexpected {header:?}");
        }
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.dir.path().join("v.sock")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        client
    }

    /// A host client connected to guest port 1024; the header is one the guest answers with.
    fn open_from_host(&mut self) -> (UnixStream, Header) {
        let mut client = self.client();
        client.write_all(b"CONNECT 1024\n").unwrap();
        let request = self.expect(op::REQUEST);
        assert_eq!((request.dst_port, request.type_), (1024, TYPE_STREAM));
        let answer = answer(&request);
        self.send(Header { op: op::RESPONSE, ..answer }, b"");
        assert_eq!(read_line(&mut client), format!("OK {}", request.src_port));
        (client, answer)
    }

    /// The guest connected to host port 52.
    fn open_from_guest(&mut self) -> (UnixStream, Header) {
        let listener = UnixListener::bind(self.dir.path().join("v.sock_52")).unwrap();
        let header = from_guest(5000, 52);
        self.send(Header { op: op::REQUEST, ..header }, b"");
        let response = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (52, 5000));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (stream, header)
    }

    fn connections(&self) -> usize {
        lock(&self.device).connections()
    }
}

fn from_guest(src_port: u32, dst_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port,
        dst_port,
        len: 0,
        type_: TYPE_STREAM,
        op: 0,
        flags: 0,
        buf_alloc: GUEST_BUF_ALLOC,
        fwd_cnt: 0,
    }
}

fn answer(request: &Header) -> Header {
    from_guest(request.dst_port, request.src_port)
}

fn data(header: &Header, len: usize) -> Header {
    Header { op: op::RW, len: len as u32, ..*header }
}

fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn reserved_identifiers_and_taken_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(matches!(Vsock::new(cid, &path), Err(VsockError::Cid(c)) if c == cid));
    }
    std::fs::write(&path, b"").unwrap();
    let error = Vsock::new(CID, &path).err().unwrap().to_string();
    assert!(error.starts_with("uds_path: cannot listen on "), "{error}");
    assert!(path.exists());
}

#[test]
fn the_socket_goes_with_the_device_unless_another_took_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    drop(Vsock::new(CID, &path).unwrap());
    assert!(!path.exists());
    let device = Vsock::new(CID, &path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"another").unwrap();
    drop(device);
    assert!(path.exists());
}

#[test]
fn the_guest_reads_its_identifier() {
    let dir = tempfile::tempdir().unwrap();
    let device = Vsock::new(0x1234_5678, dir.path().join("v.sock")).unwrap();
    let mut config = [0; 12];
    device.read_config(0, &mut config);
    assert_eq!(config, [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn host_client_talks_to_guest_port() {
    for features in [0, F_RING_EVENT_IDX] {
        let mut guest = Guest::with_features(features);
        guest.offer_rx(16);
        let (mut client, header) = guest.open_from_host();
        client.write_all(b"hello guest").unwrap();
        let (got, payload) = guest.receive().unwrap();
        assert_eq!((got.op, &payload[..]), (op::RW, &b"hello guest"[..]));
        assert!(guest.driver.interrupted());
        guest.send(data(&header, 10), b"hello host");
        let mut back = [0; 10];
        client.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello host");
        drop(client);
        assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
        guest.send(Header { op: op::RST, ..header }, b"");
        assert_eq!(guest.connections(), 0);
        guest.expect_nothing();
    }
}

#[test]
fn data_sent_with_the_connect_line_arrives() {
    let mut guest = Guest::with_buffers();
    let mut client = guest.client();
    client.write_all(b"CONNECT 7\nearly").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let request = guest.expect(op::REQUEST);
    guest.send(Header { op: op::RESPONSE, ..answer(&request) }, b"");
    assert_eq!(guest.receive().unwrap().1, b"early");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
}

#[test]
fn clients_get_ports_of_their_own_and_a_refusal_ends_the_stream() {
    let mut guest = Guest::with_buffers();
    let mut clients: Vec<_> = (0..3).map(|_| guest.client()).collect();
    let mut ports = Vec::new();
    for client in &mut clients {
        client.write_all(b"CONNECT 9\n").unwrap();
        let request = guest.expect(op::REQUEST);
        ports.push(request.src_port);
        guest.send(Header { op: op::RST, ..answer(&request) }, b"");
        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    }
    assert_eq!(ports, [1 << 30, (1 << 30) + 1, (1 << 30) + 2]);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn clients_wait_for_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let device = Arc::new(Mutex::new(Vsock::new(CID, dir.path().join("v.sock")).unwrap()));
    let mut client = UnixStream::connect(dir.path().join("v.sock")).unwrap();
    client.write_all(b"CONNECT 1024\n").unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let events = event_loop.subscribe(device.clone());
    lock(&device).attach(events);
    event_loop.run_once(10).unwrap();
    let driver = Driver::new(&QUEUE_SIZES);
    lock(&device).activate(driver.activation(F_RING_EVENT_IDX)).unwrap();
    let mut guest = Guest { driver, device, event_loop, features: F_RING_EVENT_IDX, dir };
    guest.offer_rx(4);
    guest.expect(op::REQUEST);
}

#[test]
fn guest_talks_to_a_host_socket_and_is_refused_without_one() {
    let mut guest = Guest::with_buffers();
    guest.send(Header { op: op::REQUEST, ..from_guest(5000, 51) }, b"");
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (51, 5000));
    let (mut stream, header) = guest.open_from_guest();
    guest.send(data(&header, 4), b"ping");
    let mut got = [0; 4];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(guest.receive().unwrap().1, b"pong");
    guest.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_BOTH, ..header }, b"");
    guest.expect(op::RST);
    assert_eq!(stream.read(&mut got).unwrap(), 0);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn much_data_to_the_guest_respects_its_credit() {
    let mut guest = Guest::with_buffers();
    let (mut client, header) = guest.open_from_host();
    let sent = pattern(3 << 20);
    let writer = std::thread::spawn({
        let sent = sent.clone();
        move || client.write_all(&sent).map(|()| client)
    });
    let (mut got, mut told) = (Vec::new(), 0);
    while got.len() < sent.len() {
        match guest.receive() {
            Some((h, payload)) if h.op == op::RW => got.extend_from_slice(&payload),
            Some((h, _)) => {
                assert_eq!(h.op, op::CREDIT_REQUEST);
                assert_eq!(
                    got.len(),
                    told + GUEST_BUF_ALLOC as usize,
                    "stopped before the credit was used up"
                );
                told = got.len();
                guest.send(Header { op: op::CREDIT_UPDATE, fwd_cnt: told as u32, ..header }, b"");
            }
            None => panic!("nothing comes any more after {} bytes", got.len()),
        }
        assert!(got.len() <= told + GUEST_BUF_ALLOC as usize, "credit exceeded");
    }
    assert!(got == sent);
    writer.join().unwrap().unwrap();
}

#[test]
fn a_slow_host_program_blocks_only_itself() {
    let mut guest = Guest::with_buffers();
    let (mut slow, slow_header) = guest.open_from_host();
    let (mut quick, quick_header) = guest.open_from_host();
    let sent = pattern(8 << 20);
    let (mut credit_used, mut at, mut fwd) = (0u32, 0, 0u32);
    let alloc = 256 << 10;
    // Until the socket's own buffer and the credit are used up.
    loop {
        while let Some((h, _)) = guest.receive_now() {
            assert_eq!(h.op, op::CREDIT_UPDATE);
            assert_eq!(h.buf_alloc, alloc);
            fwd = h.fwd_cnt;
        }
        credit_used = credit_used.max(at as u32 - fwd);
        let len = (60 << 10).min((fwd + alloc) as usize - at);
        if len == 0 {
            break;
        }
        guest.send(data(&slow_header, len), &sent[at..at + len]);
        at += len;
    }
    assert!(at < sent.len(), "somebody buffers without bounds");
    guest.send(data(&quick_header, 5), b"quick");
    let mut got = [0; 5];
    quick.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"quick");
    // The slow one wakes up, everything arrives, and the guest hears of the room.
    let mut all = vec![0; at];
    let mut read = 0;
    while read < at {
        read += slow.read(&mut all[read..]).unwrap();
        guest.settle();
    }
    assert!(all == sent[..at]);
    let update = guest.expect(op::CREDIT_UPDATE);
    assert!(update.fwd_cnt as usize > at - alloc as usize / 2);
    assert_eq!(update.dst_port, slow_header.src_port);
}

#[test]
fn what_the_guest_sent_reaches_the_host_after_the_guest_is_gone() {
    for last in [op::RST, op::SHUTDOWN] {
        let mut guest = Guest::with_buffers();
        let (mut client, header) = guest.open_from_host();
        let sent = pattern(1 << 20);
        let mut at = 0;
        let mut fwd = 0;
        while at < 400 << 10 {
            let len = (50 << 10).min((fwd + (256 << 10)) as usize - at);
            assert!(len > 0);
            guest.send(data(&header, len), &sent[at..at + len]);
            at += len;
            while let Some((h, _)) = guest.receive_now() {
                fwd = h.fwd_cnt;
            }
        }
        guest.send(Header { op: last, flags: SHUTDOWN_BOTH, ..header }, b"");
        if last == op::SHUTDOWN {
            guest.expect(op::RST);
        }
        assert_eq!(guest.connections(), 1, "there should be an orphan");
        // Its port is free for the guest at once: this packet is for nobody.
        guest.send(data(&header, 1), b"x");
        guest.expect(op::RST);
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            client.read_to_end(&mut all).map(|_| all)
        });
        while !reader.is_finished() {
            guest.settle();
        }
        assert!(reader.join().unwrap().unwrap() == sent[..at]);
        assert_eq!(guest.connections(), 0);
    }
}

#[test]
fn each_direction_ends_on_its_own() {
    let mut guest = Guest::with_buffers();
    let (mut client, header) = guest.open_from_host();
    client.write_all(b"question").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.receive().unwrap().1, b"question");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(data(&header, 6), b"answer");
    guest.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_SEND, ..header }, b"");
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"answer");
    // Now both are over, and the guest agrees.
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.send(Header { op: op::RST, ..header }, b"");
    assert_eq!(guest.connections(), 0);

    // The other way round: the guest will not read any more, the host may go on reading.
    let (mut client, header) = guest.open_from_host();
    guest.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_RECEIVE, ..header }, b"");
    assert_eq!(client.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    guest.send(data(&header, 4), b"more");
    let mut more = [0; 4];
    client.read_exact(&mut more).unwrap();
    assert_eq!(&more, b"more");
}

#[test]
fn host_client_that_leaves_early_is_forgotten() {
    let mut guest = Guest::with_buffers();
    let client = guest.client();
    guest.settle();
    assert_eq!(guest.connections(), 1);
    drop(client);
    guest.settle();
    assert_eq!(guest.connections(), 0);

    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.expect(op::REQUEST);
    drop(client);
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 0);

    let mut client = guest.client();
    client.write_all(b"CONNECT 1 or so\n").unwrap();
    guest.settle();
    assert_eq!(guest.connections(), 0);
    assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
}

#[test]
fn host_closing_with_unread_data_ends_the_connection() {
    let mut guest = Guest::with_buffers();
    let (client, header) = guest.open_from_host();
    guest.send(data(&header, 4), b"lost");
    drop(client);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    // The guest may still be sending; that goes nowhere, and harms nobody.
    guest.send(data(&header, 4), b"late");
    guest.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_BOTH, ..header }, b"");
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn what_takes_too_long_is_given_up() {
    let mut guest = Guest::with_buffers();
    let silent = guest.client();
    let mut unanswered = guest.client();
    unanswered.write_all(b"CONNECT 1\n").unwrap();
    guest.expect(op::REQUEST);
    let (closed, _) = guest.open_from_host();
    drop(closed);
    guest.expect(op::SHUTDOWN);
    let (_open, _) = guest.open_from_host();
    assert_eq!(guest.connections(), 4);
    let now = Instant::now();
    for (later, left) in [(1, 4), (3, 3), (11, 2), (31, 1), (3600, 1)] {
        lock(&guest.device).muxer.expire(now + Duration::from_secs(later));
        guest.kick(RX_QUEUE);
        assert_eq!(guest.connections(), left, "after {later} s");
    }
    guest.expect(op::RST);
    guest.expect(op::RST);
    assert_eq!(unanswered.read(&mut [0]).unwrap(), 0);
    drop(silent);
}

#[test]
fn the_timer_really_goes_off() {
    let mut guest = Guest::with_buffers();
    let (client, _) = guest.open_from_host();
    drop(client);
    guest.expect(op::SHUTDOWN);
    let start = Instant::now();
    while guest.connections() > 0 && start.elapsed() < Duration::from_secs(10) {
        guest.event_loop.run_once(100).unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
    guest.expect(op::RST);
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::with_buffers();
    let listener = UnixListener::bind(guest.dir.path().join("v.sock_52")).unwrap();
    let mut accepted = Vec::new();
    for port in 0..muxer::MAX_CONNECTIONS as u32 {
        guest.send(Header { op: op::REQUEST, ..from_guest(port, 52) }, b"");
        accepted.push(listener.accept().unwrap());
        assert_eq!(guest.expect(op::RESPONSE).buf_alloc, if port < 32 { 256 << 10 } else { 64 << 10 });
    }
    guest.send(Header { op: op::REQUEST, ..from_guest(9999, 52) }, b"");
    guest.expect(op::RST);
    let mut refused = guest.client();
    guest.settle();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    // Room again after one has ended.
    guest.send(Header { op: op::RST, ..from_guest(17, 52) }, b"");
    guest.send(Header { op: op::REQUEST, ..from_guest(9999, 52) }, b"");
    guest.expect(op::RESPONSE);
}

#[test]
fn guest_without_buffers_delays_but_loses_nothing() {
    let mut guest = Guest::new();
    // More refused requests than resets are kept.
    let mut taken = 0;
    for port in 0..250u32 * 3 {
        guest.driver.write(TX_BUFFER, &Header { op: op::REQUEST, ..from_guest(port, 1) }.to_bytes());
        guest.driver.queues[TX].offer(&[(TX_BUFFER, 44, false)]);
        guest.kick(TX_QUEUE);
        if guest.driver.queues[TX].used_chain().is_none() {
            taken = port;
            break;
        }
    }
    assert_eq!(taken, 256);
    // Nothing spins meanwhile: the loop has nothing to do.
    guest.settle();
    guest.offer_rx(64);
    let mut resets = 0;
    while let Some((header, _)) = guest.receive() {
        assert_eq!((header.op, header.dst_port), (op::RST, resets));
        resets += 1;
        guest.kick(RX_QUEUE);
    }
    assert_eq!(resets, 257);
}

#[test]
fn payload_may_be_scattered_and_indirect() {
    let mut guest = Guest::with_buffers();
    let (mut client, header) = guest.open_from_host();
    let bytes = [&data(&header, 6).to_bytes()[..], b"abcdef??"].concat();
    guest.driver.write(TX_BUFFER, &bytes);
    let buffers = [
        (TX_BUFFER, 20, false),
        (TX_BUFFER + 20, 25, false),
        (TX_BUFFER + 45, 0, false),
        (TX_BUFFER + 45, 7, false),
    ];
    guest.driver.queues[TX].offer(&buffers);
    guest.driver.queues[TX].offer_indirect(&buffers);
    guest.kick(TX_QUEUE);
    let mut got = [0; 12];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"abcdefabcdef");

    // And so may the receive buffers, header included.
    let mut guest = Guest::new();
    guest.driver.queues[RX].offer(&[(RX_BUFFERS, 50, true)]);
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.settle();
    let (_, len) = guest.driver.queues[RX].used_chain().unwrap();
    assert_eq!(len, 44);
    let bytes = guest.driver.read(RX_BUFFERS, 44);
    let header = answer(&Header::from_bytes(bytes[..].try_into().unwrap()));
    guest.send(Header { op: op::RESPONSE, ..header }, b"");
    guest.driver.queues[RX].offer(&[(RX_BUFFERS, 10, true), (RX_BUFFERS + 100, 36, true)]);
    guest.driver.queues[RX].offer_indirect(&[(RX_BUFFERS + 200, 43, true), (RX_BUFFERS + 300, 100, true)]);
    guest.kick(RX_QUEUE);
    client.write_all(b"abcde").unwrap();
    guest.settle();
    assert_eq!(guest.driver.queues[RX].used_chain().unwrap().1, 46);
    assert_eq!(guest.driver.queues[RX].used_chain().unwrap().1, 47);
    assert_eq!(guest.driver.read(RX_BUFFERS + 134, 2), b"ab");
    assert_eq!(guest.driver.read(RX_BUFFERS + 301, 3), b"cde");
}

#[test]
fn bogus_packets_are_refused_and_harm_nobody() {
    let mut guest = Guest::with_buffers();
    let (mut client, header) = guest.open_from_host();
    let stranger = from_guest(1, 2);
    // Not from or to here: dropped.
    guest.send(Header { op: op::REQUEST, src_cid: 99, ..stranger }, b"");
    guest.send(Header { op: op::REQUEST, dst_cid: 99, ..stranger }, b"");
    guest.send(Header { op: op::RW, dst_cid: u64::MAX, len: 3, ..stranger }, b"abc");
    guest.send(Header { op: op::RST, ..stranger }, b"");
    guest.expect_nothing();
    // For nobody, or of no kind there is: reset.
    for op in [0, op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 8, u16::MAX] {
        guest.send(Header { op, ..stranger }, b"");
        assert_eq!(guest.expect(op::RST).dst_port, 1);
    }
    guest.send(Header { op: op::REQUEST, type_: 2, ..stranger }, b"");
    assert_eq!(guest.expect(op::RST).type_, 2);
    guest.send(Header { type_: 7, ..data(&header, 1) }, b"x");
    assert_eq!(guest.expect(op::RST).type_, 7);
    // The connection lives on.
    guest.send(data(&header, 5), b"alive");
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"alive");
}

#[test]
fn breaking_a_connections_protocol_ends_that_connection() {
    for op in [op::REQUEST, op::RESPONSE, 0, 99] {
        let mut guest = Guest::with_buffers();
        let (mut client, header) = guest.open_from_host();
        guest.send(Header { op, ..header }, b"");
        guest.expect(op::RST);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert_eq!(guest.connections(), 0);
    }
    // Data after the end of data.
    let mut guest = Guest::with_buffers();
    let (_client, header) = guest.open_from_host();
    guest.send(Header { op: op::SHUTDOWN, flags: SHUTDOWN_SEND, ..header }, b"");
    guest.send(data(&header, 1), b"x");
    guest.expect(op::RST);
    // Anything but an answer to a request.
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.send(data(&answer(&request), 1), b"x");
    guest.expect(op::RST);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}

#[test]
fn more_data_than_credit_ends_the_connection() {
    let mut guest = Guest::with_buffers();
    let (_client, header) = guest.open_from_host();
    let bytes = pattern(64 << 10);
    for _ in 0..64 {
        guest.send(data(&header, bytes.len()), &bytes);
        if guest.connections() == 0 {
            break;
        }
    }
    assert_eq!(guest.connections(), 0);
    while let Some((header, _)) = guest.receive() {
        if header.op == op::RST {
            return;
        }
    }
    panic!("no reset");
}

#[test]
fn impossible_credit_stops_the_flow_and_nothing_else() {
    let mut guest = Guest::with_buffers();
    let (mut client, header) = guest.open_from_host();
    guest.send(Header { op: op::CREDIT_UPDATE, fwd_cnt: 1, ..header }, b"");
    client.write_all(b"x").unwrap();
    guest.expect(op::CREDIT_REQUEST);
    // Asked once, however often it answers that there is none.
    for fwd_cnt in [1, 100_000, u32::MAX / 2] {
        guest.send(Header { op: op::CREDIT_UPDATE, fwd_cnt, ..header }, b"");
        client.write_all(b"x").unwrap();
        guest.expect_nothing();
    }
    guest.send(Header { op: op::CREDIT_UPDATE, fwd_cnt: 0, buf_alloc: 0, ..header }, b"");
    guest.expect_nothing();
    guest.send(Header { op: op::CREDIT_UPDATE, buf_alloc: 2, ..header }, b"");
    assert_eq!(guest.receive().unwrap().1, b"xx");
    guest.expect(op::CREDIT_REQUEST);
    guest.send(Header { op: op::CREDIT_UPDATE, buf_alloc: u32::MAX, ..header }, b"");
    assert_eq!(guest.receive().unwrap().1, b"xx");
}

#[test]
fn broken_rings_stop_the_device_until_reset() {
    type Break = fn(&mut Guest);
    let breaks: [(&str, Break); 12] = [
        ("packet shorter than a header", |g| _ = g.driver.queues[TX].offer(&[(TX_BUFFER, 43, false)])),
        ("empty chain", |g| _ = g.driver.queues[TX].offer(&[(TX_BUFFER, 0, false)])),
        ("len beyond the buffer", |g| {
            let header = Header { len: 2, ..from_guest(1, 2) };
            g.driver.write(TX_BUFFER, &header.to_bytes());
            g.driver.queues[TX].offer(&[(TX_BUFFER, 45, false)]);
        }),
        ("giant len", |g| {
            let header = Header { len: u32::MAX, ..from_guest(1, 2) };
            g.driver.write(TX_BUFFER, &header.to_bytes());
            g.driver.queues[TX].offer(&[(TX_BUFFER, 4096, false)]);
        }),
        ("outside memory", |g| _ = g.driver.queues[TX].offer(&[(MEMORY_SIZE - 10, 44, false)])),
        ("wrapping address", |g| _ = g.driver.queues[TX].offer(&[(u64::MAX - 10, 44, false)])),
        ("writable packet", |g| _ = g.driver.queues[TX].offer(&[(TX_BUFFER, 44, true)])),
        ("descriptor loop", |g| {
            g.driver.queues[TX].descriptor(0, u64::MAX, 1, 1, 1);
            g.driver.queues[TX].descriptor(1, u64::MAX, 1, 1, 0);
            g.driver.queues[TX].publish(0);
        }),
        ("indirect table in itself", |g| {
            let table = g.driver.queues[TX].scratch();
            g.driver.queues[TX].offer_indirect(&[(table, 16, false)]);
            let indirect = [table.to_le_bytes(), (16u64 | 4 << 32).to_le_bytes()].concat();
            g.driver.write(table, &indirect);
        }),
        ("head outside the table", |g| g.driver.queues[TX].publish(1000)),
        ("available index runs away", |g| g.driver.queues[TX].set_avail_idx(1000)),
        ("receive buffer outside memory", |g| {
            g.driver.queues[RX].offer(&[(MEMORY_SIZE, 4096, true)]);
            let header = Header { op: op::REQUEST, ..from_guest(1, 2) };
            g.send(header, b"");
        }),
    ];
    for (what, break_it) in breaks {
        let mut guest = Guest::new();
        break_it(&mut guest);
        guest.kick(TX_QUEUE);
        assert!(guest.driver.broken(), "{what}");
        assert!(guest.driver.interrupted(), "{what}");
        // It stays silent, whatever comes.
        let mut client = guest.client();
        client.write_all(b"CONNECT 1\n").unwrap();
        for queue in [RX_QUEUE, TX_QUEUE, EVENT_QUEUE, 77, u32::MAX] {
            guest.kick(queue);
        }
        guest.settle();
        assert_eq!(guest.connections(), 0, "{what}");
        // After a reset it works again, and the client that waited is served.
        lock(&guest.device).reset();
        guest.driver = Driver::new(&QUEUE_SIZES);
        let activation = guest.driver.activation(guest.features);
        lock(&guest.device).activate(activation).unwrap();
        guest.offer_rx(4);
        guest.expect(op::REQUEST);
    }
}

#[test]
fn reset_in_the_middle_of_a_connection_ends_it() {
    let mut guest = Guest::with_buffers();
    let (mut client, _) = guest.open_from_host();
    client.write_all(b"under way").unwrap();
    lock(&guest.device).reset();
    assert_eq!(guest.connections(), 0);
    // Writing raced with the end, so the end may look like a reset.
    assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
    guest.settle();
    for queue in &mut guest.driver.queues {
        queue.restart();
    }
    let activation = guest.driver.activation(guest.features);
    lock(&guest.device).activate(activation).unwrap();
    guest.offer_rx(8);
    guest.open_from_host();
}

#[test]
fn after_a_transport_reset_connections_wait_for_the_driver() {
    let mut guest = Guest::with_buffers();
    let (mut old, _) = guest.open_from_host();
    guest.driver.queues[EVENT].offer(&[(0x1000, 4, true)]);
    guest.driver.write(0x1000, &[0xff; 4]);
    guest.kick(EVENT_QUEUE);
    lock(&guest.device).reset_connections();
    assert_eq!(old.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.driver.queues[EVENT].used_chain(), Some((0, 4)));
    assert_eq!(guest.driver.read(0x1000, 4), [0; 4]);
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.expect_nothing();
    guest.driver.queues[EVENT].offer(&[(0x1000, 4, true)]);
    guest.kick(EVENT_QUEUE);
    guest.expect(op::REQUEST);
}

/// Linux offers several, and would otherwise see that its notification was wanted of an earlier one only.
#[test]
fn after_a_transport_reset_the_driver_notifies_of_the_next_event_buffer() {
    let mut guest = Guest::with_features(F_RING_EVENT_IDX);
    for at in 0..8 {
        guest.driver.queues[EVENT].offer(&[(0x1000 + 8 * at, 4, true)]);
    }
    lock(&guest.device).reset_connections();
    let used_ring = guest.driver.activation(0).queues[EVENT].used_ring();
    let size = u64::from(guest.driver.activation(0).queues[EVENT].size());
    assert_eq!(guest.driver.read(used_ring + 4 + 8 * size, 2), 8u16.to_le_bytes());
}

#[test]
fn nothing_reaches_guest_memory_during_a_pause_and_nothing_is_lost() {
    let mut guest = Guest::with_buffers();
    let (mut client, header) = guest.open_from_host();
    lock(&guest.device).pause();
    client.write_all(b"patience").unwrap();
    let mut other = guest.client();
    other.write_all(b"CONNECT 5\n").unwrap();
    guest.driver.write(TX_BUFFER, &data(&header, 0).to_bytes());
    guest.driver.queues[TX].offer(&[(TX_BUFFER, 44, false)]);
    guest.kick(TX_QUEUE);
    guest.expect_nothing();
    assert_eq!(guest.driver.queues[TX].used_chain(), None);
    lock(&guest.device).resume();
    let (_, payload) = guest.receive().unwrap();
    assert_eq!(payload, b"patience");
    guest.expect(op::REQUEST);
    assert!(guest.driver.queues[TX].used_chain().is_some());
}

#[test]
fn descriptors_sent_by_a_client_do_not_stall_the_stream() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::os::fd::AsRawFd;
    let mut guest = Guest::with_buffers();
    let (client, _) = guest.open_from_host();
    let fds = [client.as_raw_fd()];
    let mut all = Vec::new();
    for part in [b"one", b"two", b"six"] {
        let message = [ControlMessage::ScmRights(&fds)];
        let parts = [std::io::IoSlice::new(part)];
        sendmsg::<()>(client.as_raw_fd(), &parts, &message, MsgFlags::empty(), None).unwrap();
    }
    while let Some((_, payload)) = guest.receive() {
        all.extend(payload);
    }
    assert_eq!(all, b"onetwosix");
}

#[test]
fn connections_that_come_and_go_without_buffers_leave_nothing_behind() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.dir.path().join("v.sock_52")).unwrap();
    let header = from_guest(5000, 52);
    for _ in 0..5000 {
        guest.send(Header { op: op::REQUEST, ..header }, b"");
        guest.send(Header { op: op::RST, ..header }, b"");
        drop(listener.accept().unwrap());
    }
    assert_eq!(guest.connections(), 0);
    assert!(lock(&guest.device).muxer.waiting() <= 2 * 1024);
    guest.offer_rx(128);
    guest.open_from_host();
}
