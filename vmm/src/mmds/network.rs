//! The metadata service's own end of an interface: answers ARP and TCP for the service's address, so that
//! the guest reaches it as it would any web server on the link, and nothing of it ever reaches the host's
//! network.
//!
//! The TCP is smoltcp's. Connections, their buffers and the frames under way to the guest are bounded;
//! when there are too many connections, the one that was silent longest makes room. Replies have a
//! time-to-live of 1, so that nothing behind the guest gets them by accident (Firecracker's and EC2's
//! default).

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Packet};

use super::{GUEST_LIMITS, Served, SharedMmds};
use crate::event_loop::lock;
use crate::metrics::METRICS;

/// The service's address on the link, the same as in Firecracker.
const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
const PORT: u16 = 80;
/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 30;
const RECEIVE_BUFFER: usize = 8 << 10;
const SEND_BUFFER: usize = 8 << 10;
/// Most frames that wait for the guest to take them.
const MAX_FRAMES: usize = 32;
const MTU: usize = 1500;
/// Longest frame that can be anything to the service: its window and headers.
pub const MAX_FRAME: usize = RECEIVE_BUFFER + 256;
/// How long the guest may leave data of the service unacknowledged.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Replies go no further than the guest.
const HOP_LIMIT: u8 = 1;

const ETHERNET_HEADER: usize = 14;
const ARP_SIZE: usize = 28;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet and IPv4 addresses of 6 and 4 bytes; the operation is a request.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
const PROTOCOL_TCP: u8 = 6;

/// Bytes at the beginning of a frame that tell whether it is for the service.
pub const PREFIX: usize = ETHERNET_HEADER + ARP_SIZE;

/// See the module's text.
pub struct MmdsNetwork {
    address: Ipv4Addr,
    guest_mac: [u8; 6],
    mmds: SharedMmds,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    epoch: Instant,
}

struct Connection {
    handle: SocketHandle,
    /// Bytes received of requests not answered yet.
    request: Vec<u8>,
    response: Vec<u8>,
    /// How much of `response` the socket has taken.
    sent: usize,
    /// To be closed when the response is sent.
    last: bool,
    active: Instant,
}

/// IP packets between the stack and the interface.
#[derive(Default)]
struct Wire {
    from_guest: Option<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
}

struct FromGuest(Vec<u8>);
struct ToGuest<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for FromGuest {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for ToGuest<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        // Also what comes from no socket: the stack's own resets and errors.
        if let Ok(mut header) = Ipv4Packet::new_checked(&mut packet) {
            header.set_hop_limit(HOP_LIMIT);
            header.fill_checksum();
        }
        self.0.push_back(packet);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = FromGuest;
    type TxToken<'a> = ToGuest<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(FromGuest, ToGuest<'_>)> {
        let packet = self.from_guest.take()?;
        // Without room for an answer the packet is lost, as on a wire.
        (self.to_guest.len() < MAX_FRAMES).then_some((FromGuest(packet), ToGuest(&mut self.to_guest)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<ToGuest<'_>> {
        (self.to_guest.len() < MAX_FRAMES).then_some(ToGuest(&mut self.to_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut checksum = ChecksumCapabilities::default();
        // The guest leaves checksums out where the device offers to compute them.
        checksum.ipv4 = Checksum::Tx;
        checksum.tcp = Checksum::Tx;
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities.checksum = checksum;
        capabilities
    }
}

impl MmdsNetwork {
    /// The service's end of one interface, answering for `address`.
    pub fn new(address: Ipv4Addr, mmds: SharedMmds, seed: u64) -> Self {
        let epoch = Instant::now();
        let mut wire = Wire::default();
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // A network that everybody is in: whatever the guest's address, it is on this link. There is
            // room for the one address.
            let _ = addresses.push(IpCidr::new(address.into(), 0));
        });
        Self {
            address,
            guest_mac: [0xff; 6],
            mmds,
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            connections: Vec::new(),
            epoch,
        }
    }

    /// Whether a frame that begins with these bytes (up to [`PREFIX`] of them) is for the service.
    pub fn is_for_service(&self, frame: &[u8]) -> bool {
        let at = |from: usize, len: usize| frame.get(from..from + len).unwrap_or_default();
        let address = self.address.octets();
        match <[u8; 2]>::try_from(at(12, 2)) {
            Ok(TYPE_IPV4) => at(ETHERNET_HEADER + 16, 4) == address,
            Ok(TYPE_ARP) => at(ETHERNET_HEADER, 8) == ARP_REQUEST && at(ETHERNET_HEADER + 24, 4) == address,
            _ => false,
        }
    }

    /// Takes a frame for the service.
    pub fn take(&mut self, frame: &[u8], now: Instant) {
        let Some((header, packet)) = frame.split_at_checked(ETHERNET_HEADER) else { return };
        METRICS.mmds.rx_count.inc();
        self.guest_mac.copy_from_slice(&header[6..12]);
        if header[12..14] == TYPE_ARP {
            return self.answer_arp(packet);
        }
        if packet.get(9) != Some(&PROTOCOL_TCP) {
            METRICS.mmds.rx_accepted_unusual.inc();
        } else if opens_connection(packet) {
            self.make_room(now);
        }
        self.wire.from_guest = Some(packet.to_vec());
        self.work(now);
    }

    fn answer_arp(&mut self, request: &[u8]) {
        let (Some(sender), true) = (request.get(8..18), self.wire.to_guest.len() < MAX_FRAMES) else {
            return;
        };
        let mut reply = Vec::with_capacity(ARP_SIZE);
        reply.extend(ARP_REPLY);
        reply.extend(MAC);
        reply.extend(self.address.octets());
        reply.extend(sender);
        self.wire.to_guest.push_back(reply);
    }

    /// Sees to it that a socket listens.
    fn make_room(&mut self, now: Instant) {
        let state = |c: &Connection| self.sockets.get::<Socket>(c.handle).state();
        if self.connections.iter().any(|c| state(c) == State::Listen) {
            return;
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            let oldest = self.connections.iter().enumerate().min_by_key(|(_, c)| c.active);
            if let Some((index, _)) = oldest {
                self.forget(index);
            }
        }
        let buffer = |size: usize| SocketBuffer::new(vec![0; size]);
        let mut socket = Socket::new(buffer(RECEIVE_BUFFER), buffer(SEND_BUFFER));
        socket.set_timeout(Some(TIMEOUT.into()));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        // The port is not zero and the socket is new: this cannot fail.
        if socket.listen(PORT).is_err() {
            return;
        }
        METRICS.mmds.connections_created.inc();
        let handle = self.sockets.add(socket);
        let (request, response) = (Vec::new(), Vec::new());
        self.connections.push(Connection { handle, request, response, sent: 0, last: false, active: now });
    }

    fn forget(&mut self, index: usize) {
        METRICS.mmds.connections_destroyed.inc();
        let connection = self.connections.swap_remove(index);
        self.sockets.remove(connection.handle);
    }

    fn stack_time(&self, now: Instant) -> StackInstant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        StackInstant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    /// Lets the stack and the service do what they can.
    fn work(&mut self, now: Instant) {
        let time = self.stack_time(now);
        // Each round moves data or ends; a buffer's worth per round makes the longest response.
        for _ in 0..64 {
            self.interface.poll(time, &mut self.wire, &mut self.sockets);
            let mut progress = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<Socket>(connection.handle);
                progress |= connection.serve(socket, &self.mmds, now);
            }
            if !progress || self.wire.to_guest.len() >= MAX_FRAMES {
                break;
            }
        }
        for index in (0..self.connections.len()).rev() {
            let state = self.sockets.get::<Socket>(self.connections[index].handle).state();
            if matches!(state, State::Closed | State::TimeWait) {
                self.forget(index);
            }
        }
    }

    /// The next frame for the guest.
    pub fn next_frame(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.wire.to_guest.is_empty() && !self.connections.is_empty() {
            self.work(now);
        }
        let packet = self.wire.to_guest.pop_front()?;
        // All IP packets begin with version 4 or 6, and ARP with its hardware type, 0.
        let ethertype = if packet.first() == Some(&0) { TYPE_ARP } else { TYPE_IPV4 };
        METRICS.mmds.tx_frames.inc();
        METRICS.mmds.tx_count.inc();
        METRICS.mmds.tx_bytes.add((ETHERNET_HEADER + packet.len()) as u64);
        Some([&self.guest_mac[..], &MAC, &ethertype, &packet].concat())
    }

    /// When [`Self::next_frame`] should be asked though no frame was taken: how long from `now`.
    pub fn delay(&mut self, now: Instant) -> Option<Duration> {
        if self.connections.is_empty() {
            return None;
        }
        self.interface.poll_delay(self.stack_time(now), &self.sockets).map(Duration::from)
    }

    /// Ends all connections, as when the guest's driver starts anew.
    pub fn reset(&mut self) {
        while !self.connections.is_empty() {
            self.forget(0);
        }
        self.wire = Wire::default();
    }
}

/// Whether an IPv4 packet with TCP asks for a connection: SYN without ACK.
fn opens_connection(packet: &[u8]) -> bool {
    let header = usize::from(packet.first().unwrap_or(&0) & 0xf) * 4;
    packet.get(header + 13).is_some_and(|flags| flags & 0x12 == 0x02)
}

impl Connection {
    /// Answers requests and moves the answers into the socket; true if anything moved.
    fn serve(&mut self, socket: &mut Socket, mmds: &SharedMmds, now: Instant) -> bool {
        let mut progress = false;
        if socket.can_recv() && self.request.len() < GUEST_LIMITS.head + GUEST_LIMITS.body && !self.last {
            // The error is that of a socket that cannot receive.
            let received = socket.recv(|data| (data.len(), data.to_vec())).unwrap_or_default();
            self.request.extend(received);
            progress = true;
        }
        // Whether what was received is no complete request.
        let mut idle = self.response.is_empty();
        if idle && !self.request.is_empty() && !self.last {
            match lock(mmds).serve(&self.request, now) {
                Served::Incomplete => {}
                Served::Response { consumed, bytes, keep_alive } => {
                    self.request.drain(..consumed.min(self.request.len()));
                    self.response = bytes;
                    self.last = !keep_alive;
                    idle = false;
                    progress = true;
                }
            }
        }
        if !self.response.is_empty() {
            let count = socket.send_slice(&self.response[self.sent..]).unwrap_or(0);
            self.sent += count;
            progress |= count > 0;
            if self.sent == self.response.len() {
                (self.response, self.sent) = (Vec::new(), 0);
            }
        }
        let answered = self.last && self.response.is_empty();
        let ended =
            idle && !socket.may_recv() && !matches!(socket.state(), State::Listen | State::SynReceived);
        if (answered || ended) && socket.may_send() {
            socket.close();
            progress = true;
        }
        if progress {
            self.active = now;
        }
        progress
    }
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
