use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::event_loop::{EventLoop, lock};
use crate::virtio::testing::{Driver, MEMORY_SIZE};

const RX: usize = RX_QUEUE as usize;
const TX: usize = TX_QUEUE as usize;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFER: u64 = 0x80_0000;

struct Guest {
    driver: Driver,
    device: Arc<Mutex<Net>>,
    event_loop: EventLoop,
    /// The host's end of the stand-in for a tap.
    host: Option<OwnedFd>,
    features: u64,
    buffer_size: u32,
}

fn config() -> NetworkInterfaceConfig {
    NetworkInterfaceConfig {
        iface_id: "eth0".into(),
        host_dev_name: "tap0".into(),
        guest_mac: Some("06:00:ac:10:00:02".parse().unwrap()),
        mtu: Some(1400),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    }
}

fn ops(size: u64, refill_time: u64) -> Option<RateLimiterConfig> {
    let bucket = TokenBucketConfig { size, one_time_burst: None, refill_time };
    Some(RateLimiterConfig { ops: Some(bucket), bandwidth: None })
}

impl Guest {
    fn new() -> Self {
        Self::with(&config(), F_RING_EVENT_IDX | feature::MRG_RXBUF)
    }

    fn with(config: &NetworkInterfaceConfig, features: u64) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (host, tap) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let device = Net::with_tap(config, Tap::from_socket(tap), None).unwrap();
        Self::over(device, features, Some(host))
    }

    fn over(device: Net, features: u64, host: Option<OwnedFd>) -> Self {
        let device = Arc::new(Mutex::new(device));
        let mut event_loop = EventLoop::new().unwrap();
        let events = event_loop.subscribe(device.clone());
        lock(&device).attach(events);
        let driver = Driver::new(&QUEUE_SIZES);
        lock(&device).activate(driver.activation(features)).unwrap();
        Self { driver, device, event_loop, host, features, buffer_size: 2048 }
    }

    fn kick(&mut self, queue: u32) {
        lock(&self.device).process(queue, EventSet::IN);
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            self.event_loop.run_once(1).unwrap();
        }
    }

    fn offer_rx(&mut self, count: u16) {
        for i in 0..u64::from(count) {
            let address = RX_BUFFERS + i * u64::from(self.buffer_size);
            self.driver.queues[RX].offer(&[(address, self.buffer_size, true)]);
        }
        self.kick(RX_QUEUE);
    }

    /// Puts a frame with its header on the wire to the guest.
    fn host_sends(&self, frame: &[u8]) {
        let host = self.host.as_ref().unwrap().as_raw_fd();
        assert_eq!(send(host, frame, MsgFlags::empty()).unwrap(), frame.len());
    }

    /// The next frame from the guest, header included.
    fn host_receives(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        let len = recv(self.host.as_ref().unwrap().as_raw_fd(), &mut frame, MsgFlags::empty()).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    fn send(&mut self, frame: &[u8]) {
        self.driver.write(TX_BUFFER, frame);
        self.driver.queues[TX].offer(&[(TX_BUFFER, frame.len() as u32, false)]);
        self.kick(TX_QUEUE);
    }

    /// The next frame the guest got, put together from its buffers, which are offered again.
    fn receive(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.driver.queues[RX].used_chain()?;
        let mut frame = self.take(head, len);
        let count = u16::from_le_bytes([frame[10], frame[11]]);
        for _ in 1..count {
            let (head, len) = self.driver.queues[RX].used_chain().expect("the rest of the frame");
            frame.extend(self.take(head, len));
        }
        Some(frame)
    }

    fn take(&mut self, head: u16, len: u32) -> Vec<u8> {
        let address = RX_BUFFERS + u64::from(head) * u64::from(self.buffer_size);
        self.driver.queues[RX].publish(head);
        self.driver.read(address, len as usize)
    }
}

/// A frame of `len` bytes with its header, which leaves the number of buffers open.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let body = (0..len).map(|i| (i * 5 + i / 253) as u8 ^ seed);
    [0; 12].into_iter().chain(body).collect()
}

fn body(frame: &[u8]) -> &[u8] {
    &frame[12..]
}

#[test]
fn the_guest_sees_what_is_configured() {
    let guest = Guest::new();
    let device = lock(&guest.device);
    let mut space = [0xff; 14];
    space.fill(0);
    device.read_config(0, &mut space);
    assert_eq!(space, [6, 0, 0xac, 0x10, 0, 2, 1, 0, 1, 0, 0x78, 0x05, 0, 0]);
    let features = device.features();
    assert_ne!(features & feature::MAC, 0);
    assert_ne!(features & feature::MTU, 0);
    let anonymous = NetworkInterfaceConfig { guest_mac: None, mtu: None, ..config() };
    let other = Guest::with(&anonymous, 0);
    assert_eq!(lock(&other.device).features() & (feature::MAC | feature::MTU), 0);
}

#[test]
fn frames_leave_and_arrive() {
    for features in [0, F_RING_EVENT_IDX, feature::MRG_RXBUF, F_RING_EVENT_IDX | feature::MRG_RXBUF] {
        let mut guest = Guest::with(&config(), features);
        guest.offer_rx(200);
        guest.send(&frame(60, 1));
        assert_eq!(guest.host_receives().unwrap(), frame(60, 1));
        assert_eq!(guest.driver.queues[TX].used_chain(), Some((0, 0)));
        assert!(guest.driver.interrupted());
        guest.host_sends(&frame(1000, 2));
        guest.settle();
        let got = guest.receive().unwrap();
        assert_eq!(body(&got), body(&frame(1000, 2)));
        assert_eq!(got[10..12], [1, 0], "one buffer");
        assert!(guest.driver.interrupted());
        assert_eq!(guest.receive(), None);
        let metrics = lock(&guest.device).metrics().clone();
        assert_eq!((metrics.tx_packets_count.total(), metrics.tx_bytes_count.total()), (1, 60));
        assert_eq!((metrics.rx_packets_count.total(), metrics.rx_bytes_count.total()), (1, 1000));
    }
}

#[test]
fn frames_may_be_scattered_and_indirect() {
    let mut guest = Guest::new();
    let sent = frame(100, 3);
    guest.driver.write(TX_BUFFER, &sent);
    let buffers = [
        (TX_BUFFER, 5, false),
        (TX_BUFFER + 5, 30, false),
        (TX_BUFFER + 35, 0, false),
        (TX_BUFFER + 35, 77, false),
    ];
    guest.driver.queues[TX].offer(&buffers);
    guest.driver.queues[TX].offer_indirect(&buffers);
    guest.kick(TX_QUEUE);
    assert_eq!(guest.host_receives().unwrap(), sent);
    assert_eq!(guest.host_receives().unwrap(), sent);

    // Receive buffers too, one of them too small even for the header's last bytes to be in one piece.
    let mut guest = Guest::with(&config(), 0);
    guest.driver.queues[RX].offer(&[(RX_BUFFERS, 11, true), (RX_BUFFERS + 100, 2000, true)]);
    guest.kick(RX_QUEUE);
    guest.host_sends(&sent);
    guest.settle();
    assert_eq!(guest.driver.queues[RX].used_chain(), Some((0, 112)));
    assert_eq!(guest.driver.read(RX_BUFFERS + 100, 101)[1..], sent[12..]);
    assert_eq!(guest.driver.read(RX_BUFFERS + 10, 1), [1]);
    assert_eq!(guest.driver.read(RX_BUFFERS + 100, 1), [0]);
}

#[test]
fn large_frames_fill_many_buffers_and_appear_whole() {
    let mut guest = Guest::new();
    guest.offer_rx(255);
    for round in 0..200u32 {
        let len = [65_550, 1, 2036, 2037, 30_000, 4084][round as usize % 6];
        guest.host_sends(&frame(len, round as u8));
        guest.settle_quickly();
        let got = guest.receive().unwrap();
        assert!(body(&got) == body(&frame(len, round as u8)), "round {round}");
        assert_eq!(usize::from(u16::from_le_bytes([got[10], got[11]])), (len + 12).div_ceil(2048));
    }
}

impl Guest {
    fn settle_quickly(&mut self) {
        self.event_loop.run_once(100).unwrap();
    }
}

#[test]
fn a_guest_short_of_buffers_gets_its_frames_later() {
    let mut guest = Guest::new();
    guest.offer_rx(10);
    for i in 0..20 {
        guest.host_sends(&frame(500, i));
    }
    guest.settle();
    assert_eq!(guest.receive(), None, "the largest frame would not fit");
    assert_eq!(lock(&guest.device).metrics().no_rx_avail_buffer.total(), 1);
    for i in 10..60 {
        guest.driver.queues[RX].offer(&[(RX_BUFFERS + i * 2048, 2048, true)]);
    }
    guest.kick(RX_QUEUE);
    for i in 0..20 {
        assert_eq!(body(&guest.receive().unwrap()), body(&frame(500, i)));
        guest.kick(RX_QUEUE);
    }
}

#[test]
fn a_tiny_queue_still_gets_what_fits() {
    let mut guest = Guest::new();
    guest.driver = Driver::new(&[4, 4]);
    lock(&guest.device).reset();
    lock(&guest.device).activate(guest.driver.activation(guest.features)).unwrap();
    guest.offer_rx(2);
    guest.host_sends(&frame(3000, 9));
    guest.settle();
    assert_eq!(body(&guest.receive().unwrap()), body(&frame(3000, 9)));
}

#[test]
fn interrupts_are_only_sent_where_wanted() {
    let mut guest = Guest::new();
    guest.offer_rx(200);
    guest.driver.interrupted();
    // A driver that polls: its wish is far behind.
    for i in 0..5 {
        guest.host_sends(&frame(60, i));
        guest.settle_quickly();
    }
    assert!(guest.driver.interrupted());
    for i in 0..5 {
        guest.host_sends(&frame(60, i));
        guest.settle_quickly();
    }
    assert!(!guest.driver.interrupted());
    while guest.receive().is_some() {}
    guest.host_sends(&frame(60, 0));
    guest.settle_quickly();
    assert!(guest.driver.interrupted());
}

#[test]
fn limits_delay_and_may_change() {
    let limited =
        NetworkInterfaceConfig { rx_rate_limiter: ops(2, 40), tx_rate_limiter: ops(2, 40), ..config() };
    let mut guest = Guest::with(&limited, F_RING_EVENT_IDX | feature::MRG_RXBUF);
    guest.offer_rx(200);
    let start = Instant::now();
    for i in 0..4 {
        guest.driver.queues[TX].offer(&[(TX_BUFFER, 72, false)]);
        guest.host_sends(&frame(60, i));
    }
    guest.kick(TX_QUEUE);
    guest.settle_quickly();
    let (mut received, mut sent) = (0, 0);
    while received < 4 || sent < 4 {
        while let Some(got) = guest.receive() {
            assert_eq!(body(&got), body(&frame(60, received)));
            received += 1;
        }
        while guest.host_receives().is_some() {
            sent += 1;
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{received} received, {sent} sent");
        if received == 4 || sent == 4 {
            assert!(start.elapsed() >= Duration::from_millis(38), "{:?}", start.elapsed());
        }
        guest.event_loop.run_once(50).unwrap();
    }
    // Longer than the test may take, then none at all.
    let update = |limit| NetworkInterfaceUpdate {
        iface_id: "eth0".into(),
        rx_rate_limiter: limit,
        tx_rate_limiter: limit,
    };
    lock(&guest.device).update(&update(ops(1, 3_600_000)));
    for i in 0..2 {
        guest.send(&frame(60, i));
        guest.host_sends(&frame(60, i));
    }
    guest.settle();
    assert!(guest.receive().is_some() && guest.receive().is_none());
    assert!(guest.host_receives().is_some() && guest.host_receives().is_none());
    lock(&guest.device).update(&update(ops(0, 0)));
    guest.settle();
    assert!(guest.receive().is_some());
    assert!(guest.host_receives().is_some());
}

#[test]
fn much_work_is_done_in_turns_and_completely() {
    let mut guest = Guest::new();
    for _ in 0..100 {
        guest.driver.queues[TX].offer(&[(TX_BUFFER, 60_000, false)]);
    }
    guest.kick(TX_QUEUE);
    let mut turns = 0;
    // The socket that stands in for the tap is full soon; what it does not take is lost as on a wire.
    while lock(&guest.device).resume.read().is_ok() {
        guest.kick(CONTINUE);
        turns += 1;
    }
    assert_eq!(turns, 2);
    assert_eq!(std::iter::from_fn(|| guest.driver.queues[TX].used_chain()).count(), 100);
}

#[test]
fn a_dead_tap_takes_the_link_down_and_nothing_else() {
    for by_guest in [false, true] {
        let mut guest = Guest::new();
        guest.offer_rx(100);
        guest.host = None;
        if by_guest {
            guest.send(&frame(60, 0));
        }
        guest.settle();
        assert!(guest.driver.interrupted() && !guest.driver.broken());
        let mut status = [0; 2];
        lock(&guest.device).read_config(6, &mut status);
        assert_eq!(status, [0, 0]);
        for _ in 0..3 {
            guest.send(&frame(60, 0));
            assert!(guest.driver.queues[TX].used_chain().is_some());
        }
        // Nothing spins.
        guest.settle();
        let start = Instant::now();
        guest.event_loop.run_once(30).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(25));
        // A driver that starts anew finds the link down.
        lock(&guest.device).reset();
        guest.driver = Driver::new(&QUEUE_SIZES);
        lock(&guest.device).activate(guest.driver.activation(guest.features)).unwrap();
        guest.send(&frame(60, 0));
        assert!(guest.driver.queues[TX].used_chain().is_some());
    }
}

#[test]
fn frames_that_are_none_are_dropped() {
    let mut guest = Guest::new();
    guest.driver.queues[TX].offer(&[(0, MAX_TX_FRAME as u32 + 1, false)]);
    guest.driver.queues[TX].offer(&[(0, 0x80_0000, false)]);
    guest.driver.queues[TX].offer(&[(TX_BUFFER, 12, false)]);
    guest.send(&frame(60, 7));
    assert_eq!(std::iter::from_fn(|| guest.driver.queues[TX].used_chain()).count(), 4);
    assert_eq!(guest.host_receives().unwrap().len(), 12);
    assert_eq!(guest.host_receives().unwrap(), frame(60, 7));
    assert_eq!(lock(&guest.device).metrics().tx_malformed_frames.total(), 2);
}

#[test]
fn broken_rings_stop_the_device_until_reset() {
    type Break = fn(&mut Guest);
    let breaks: [(&str, Break); 12] = [
        ("frame shorter than a header", |g| _ = g.driver.queues[TX].offer(&[(TX_BUFFER, 11, false)])),
        ("empty chain", |g| _ = g.driver.queues[TX].offer(&[(TX_BUFFER, 0, false)])),
        ("outside memory", |g| _ = g.driver.queues[TX].offer(&[(MEMORY_SIZE - 10, 60, false)])),
        ("wrapping address", |g| _ = g.driver.queues[TX].offer(&[(u64::MAX - 10, 60, false)])),
        ("writable frame", |g| _ = g.driver.queues[TX].offer(&[(TX_BUFFER, 60, true)])),
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
        ("receive buffer outside memory", |g| _ = g.driver.queues[RX].offer(&[(MEMORY_SIZE, 4096, true)])),
        ("receive buffer too small", |g| _ = g.driver.queues[RX].offer(&[(RX_BUFFERS, 11, true)])),
        ("readable receive buffer", |g| _ = g.driver.queues[RX].offer(&[(RX_BUFFERS, 2048, false)])),
    ];
    for (what, break_it) in breaks {
        let mut guest = Guest::new();
        guest.host_sends(&frame(60, 0));
        break_it(&mut guest);
        guest.kick(TX_QUEUE);
        guest.settle();
        assert!(guest.driver.broken(), "{what}");
        assert!(guest.driver.interrupted(), "{what}");
        for token in [RX_QUEUE, TX_QUEUE, TAP, RX_LIMITER, TX_LIMITER, CONTINUE, 77, u32::MAX] {
            guest.kick(token);
        }
        while guest.host_receives().is_some() {}
        lock(&guest.device).reset();
        guest.driver = Driver::new(&QUEUE_SIZES);
        lock(&guest.device).activate(guest.driver.activation(guest.features)).unwrap();
        guest.offer_rx(100);
        guest.host_sends(&frame(60, 1));
        guest.send(&frame(60, 2));
        guest.settle();
        assert_eq!(guest.host_receives().unwrap(), frame(60, 2), "{what}");
        let got: Vec<_> = std::iter::from_fn(|| guest.receive()).collect();
        assert_eq!(body(got.last().unwrap()), body(&frame(60, 1)), "{what}");
    }
}

#[test]
fn a_chain_of_very_many_pieces_is_no_harm() {
    let mut guest = Guest::new();
    // 255 pieces of a byte each, and tables of more pieces than a system call takes.
    let tiny: Vec<_> = (0..255).map(|i| (TX_BUFFER + i, 1, false)).collect();
    guest.driver.queues[TX].offer(&tiny);
    guest.kick(TX_QUEUE);
    assert_eq!(guest.host_receives().unwrap().len(), 255);
    let many: Vec<_> = (0..1025).map(|i| (TX_BUFFER + i, 1, false)).collect();
    guest.driver.queues[TX].offer_indirect(&many);
    guest.kick(TX_QUEUE);
    assert!(guest.driver.broken());

    let mut guest = Guest::new();
    for part in 0..4 {
        let tiny: Vec<_> = (0..1000).map(|i| (RX_BUFFERS + part * 1000 + i, 1, true)).collect();
        // Each needs its own table.
        let table = guest.driver.queues[RX].scratch() + 0x1_0000 * (part + 2);
        let head = guest.driver.queues[RX].offer_indirect(&tiny);
        let bytes = guest.driver.read(guest.driver.queues[RX].scratch(), 16_000);
        guest.driver.write(table, &bytes);
        guest.driver.queues[RX].descriptor(head, table, 16_000, 4, 0);
    }
    guest.host_sends(&frame(500, 4));
    guest.settle();
    assert!(!guest.driver.broken());
    assert_eq!(body(&guest.receive().unwrap()), body(&frame(500, 4)));
}

#[test]
fn nothing_reaches_guest_memory_during_a_pause_and_nothing_is_lost() {
    let mut guest = Guest::new();
    guest.offer_rx(200);
    guest.host_sends(&frame(60, 0));
    guest.settle();
    assert!(guest.receive().is_some());
    lock(&guest.device).pause();
    let state = guest.driver.read(RX_BUFFERS, 200 * 2048);
    guest.host_sends(&frame(60, 1));
    guest.send(&frame(60, 2));
    guest.settle();
    assert_eq!(guest.receive(), None);
    assert_eq!(guest.host_receives(), None);
    assert!(state == guest.driver.read(RX_BUFFERS, 200 * 2048));
    lock(&guest.device).resume();
    guest.settle();
    assert_eq!(body(&guest.receive().unwrap()), body(&frame(60, 1)));
    assert_eq!(guest.host_receives().unwrap(), frame(60, 2));
}

#[test]
fn the_metadata_service_is_on_the_link_and_the_rest_passes_by() {
    let address = std::net::Ipv4Addr::new(169, 254, 169, 254);
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (host, tap) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let service = MmdsNetwork::new(address, Arc::new(Mutex::new(mmds::Mmds::new(100))), 1);
    // Limits are for what goes to the tap.
    let limited = NetworkInterfaceConfig { tx_rate_limiter: ops(1, 3_600_000), ..config() };
    let device = Net::with_tap(&limited, Tap::from_socket(tap), Some(service)).unwrap();
    let mut guest = Guest::over(device, F_RING_EVENT_IDX | feature::MRG_RXBUF, Some(host));
    guest.offer_rx(200);
    let arp = |target: [u8; 4]| {
        let ethernet = [&[0xff; 6][..], &[6, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
        [&[0; 12][..], &ethernet, &[6, 0, 0, 0, 0, 2], &[172, 16, 0, 2], &[0; 6], &target].concat()
    };
    for _ in 0..3 {
        guest.driver.interrupted();
        guest.send(&arp([169, 254, 169, 254]));
        assert_eq!(guest.host_receives(), None);
        let reply = guest.receive().unwrap();
        assert_eq!(
            (reply.len(), &reply[12..18], &reply[33..34]),
            (12 + 42, &[6, 0, 0, 0, 0, 2][..], &[2][..])
        );
        assert!(guest.driver.interrupted());
    }
    guest.send(&arp([172, 16, 0, 1]));
    assert_eq!(guest.host_receives().unwrap(), arp([172, 16, 0, 1]));
    // Both kinds, to a guest that offers buffers late.
    lock(&guest.device).reset();
    guest.driver = Driver::new(&QUEUE_SIZES);
    lock(&guest.device).activate(guest.driver.activation(guest.features)).unwrap();
    guest.send(&arp([169, 254, 169, 254]));
    guest.host_sends(&frame(60, 1));
    guest.settle();
    guest.offer_rx(200);
    assert_eq!(guest.receive().unwrap().len(), 12 + 42);
    assert_eq!(body(&guest.receive().unwrap()), body(&frame(60, 1)));
    // A frame to the service that is longer than anything it takes, and one cut short.
    let mut long = frame(60_000, 0);
    long[24..26].copy_from_slice(&[8, 0]);
    long[42..46].copy_from_slice(&address.octets());
    guest.send(&long);
    guest.send(&long[..46]);
    assert_eq!(guest.host_receives(), None);
    assert!(guest.driver.queues[TX].used_chain().is_some() && !guest.driver.broken());
}

#[test]
fn taps_that_cannot_be_used_are_named() {
    let open = |name: &str| Tap::open(name).err().unwrap().to_string();
    assert!(open("nosuchtap0").starts_with("there is no interface nosuchtap0"));
    assert!(open("a-name-of-sixteen").starts_with("there is no interface"));
    let missing = NetworkInterfaceConfig { host_dev_name: "nosuchtap0".into(), ..config() };
    let error = Net::new(&missing, None).err().unwrap().to_string();
    assert!(error.starts_with("host_dev_name of network interface eth0: there is no"), "{error}");
}

/// A network namespace of the test's own with a tap that is up, where the host lets the test have one.
fn real_tap() -> Option<OwnedFd> {
    // SAFETY: no pointers; only this thread changes its namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return None;
    }
    let run = |args: &[&str]| std::process::Command::new("ip").args(args).status().is_ok_and(|s| s.success());
    (run(&["tuntap", "add", "test0", "mode", "tap"]) && run(&["link", "set", "test0", "up"])).then_some(())?;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0x0300) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send_on_wire(wire: &OwnedFd, frame: &[u8]) {
    // SAFETY: all zeroes are a valid `sockaddr_ll`; the name is NUL-terminated; address and frame live
    // through the call.
    let sent = unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = libc::if_nametoindex(c"test0".as_ptr()) as i32;
        let size = size_of_val(&address) as u32;
        let frame_at = frame.as_ptr().cast();
        libc::sendto(wire.as_raw_fd(), frame_at, frame.len(), 0, (&raw const address).cast(), size)
    };
    assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
}

#[test]
fn a_real_tap_moves_frames_until_it_is_deleted() {
    let test = || {
        let Some(wire) = real_tap() else {
            return eprintln!("skipped: no network namespaces, no tap driver, or no ip program");
        };
        let config = NetworkInterfaceConfig { host_dev_name: "test0".into(), ..config() };
        let device = Net::new(&config, None).unwrap();
        let busy = Net::new(&config, None).err().unwrap().to_string();
        assert!(busy.contains("cannot attach to test0 (another process uses it)"), "{busy}");
        let features = device.features();
        let mut guest = Guest::over(device, features, Some(wire));
        guest.offer_rx(255);

        // An Ethernet broadcast of an experimental type, seen by the packet socket.
        let ethernet = |seed| [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1, 0x88, 0xb5], &[seed; 50]].concat();
        guest.send(&[&[0; 12][..], &ethernet(1)].concat());
        let start = Instant::now();
        let seen =
            |guest: &Guest, wanted: &[u8]| std::iter::from_fn(|| guest.host_receives()).any(|f| f == wanted);
        while !seen(&guest, &ethernet(1)) {
            assert!(start.elapsed() < Duration::from_secs(5));
        }
        // The host drops frames until it has noticed that the link is up.
        let start = Instant::now();
        loop {
            send_on_wire(guest.host.as_ref().unwrap(), &ethernet(2));
            guest.settle();
            if std::iter::from_fn(|| guest.receive()).any(|f| body(&f) == ethernet(2)) {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(10));
        }

        std::process::Command::new("ip").args(["link", "delete", "test0"]).status().unwrap();
        guest.settle();
        let mut status = [0; 2];
        lock(&guest.device).read_config(6, &mut status);
        assert_eq!(status, [0, 0]);
        guest.send(&[&[0; 12][..], &ethernet(3)].concat());
        assert!(!guest.driver.broken());
        let start = Instant::now();
        guest.event_loop.run_once(30).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(25), "it spins");
    };
    // A thread of its own, because the network namespace is the thread's.
    std::thread::spawn(test).join().unwrap();
}
