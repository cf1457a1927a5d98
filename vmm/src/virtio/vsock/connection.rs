//! One connection between a port of the guest and a Unix socket of the host.
//!
//! ```text
//!  host client says CONNECT                      guest sends REQUEST, host listens
//!          │                                                │
//!          ▼                                                ▼
//!      REQUESTED ──guest: RESPONSE ("OK <port>" to host)──▶ OPEN ──▶ both directions ended ──▶ gone
//!          │                                                │
//!          └──guest: RST, or 10 s pass──▶ gone              ├──guest: RST, or breaks the protocol──▶ gone
//!                                                           └──guest: RST/SHUTDOWN, host still reading
//!                                                                 ──▶ ORPHAN ──all written──▶ gone
//! ```
//! An *orphan* is a connection the guest is through with while the host has not yet taken everything the
//! guest sent; only its backlog is left.
//!
//! Each direction has a credit: the guest may have [`Connection::buf_alloc`] bytes under way that the host's
//! socket has not taken (they wait in the backlog), and it tells how much it is willing to buffer itself.
//! The two directions end apart from each other, as `shutdown(2)` allows on both sides.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::debug;

use super::packet::{HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::rx::RxRing;
use super::socket;
use crate::event_loop::EventSet;
use crate::virtio::buffers::{BrokenDriver, GuestBuffers};

/// How long the guest may take to answer a host client's request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to agree that a connection is over.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Most receive buffers filled by one read from the socket.
const MAX_BATCH: usize = 32;

/// What tells a connection from all others of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest has yet to answer; the flag says that it was asked.
    Requested {
        sent: bool,
    },
    Open,
    Orphan,
}

/// What is to become of a connection after it dealt with something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Live,
    /// The guest forgets it, the backlog remains to be written: see the module's text.
    Orphaned {
        /// Whether the guest is told so with a reset.
        reset: bool,
    },
    /// It is over.
    Gone {
        /// Whether the guest is told so with a reset.
        reset: bool,
    },
}

/// See the module's text.
pub struct Connection {
    /// Its ports.
    pub key: Key,
    /// Whether it stands in the list of those with something for the guest.
    pub queued: bool,
    /// When it is given up.
    pub deadline: Option<Instant>,
    /// What the event loop waits for on its socket now.
    pub interest: EventSet,
    stream: UnixStream,
    guest_cid: u64,
    phase: Phase,

    // Guest to host.
    buf_alloc: u32,
    backlog: VecDeque<u8>,
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    told_forwarded: u32,
    guest_done_sending: bool,
    host_done_receiving: bool,

    // Host to guest.
    guest_buf_alloc: u32,
    guest_forwarded: u32,
    sent: u32,
    readable: bool,
    /// The host's end was closed, at least for sending: the end of the stream is near.
    hung_up: bool,
    host_done_sending: bool,
    guest_done_receiving: bool,
    batch: usize,

    // What to tell the guest as soon as there is a buffer.
    send_response: bool,
    send_credit: bool,
    /// The guest was asked for credit since it last had some.
    asked_credit: bool,
    /// Flags of `SHUTDOWN` told so far.
    told_shutdown: u32,
}

impl Connection {
    fn new(stream: UnixStream, key: Key, guest_cid: u64, buf_alloc: u32, phase: Phase) -> Self {
        Self {
            key,
            queued: false,
            deadline: None,
            interest: EventSet::empty(),
            stream,
            guest_cid,
            phase,
            buf_alloc,
            backlog: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            guest_done_sending: false,
            host_done_receiving: false,
            guest_buf_alloc: 0,
            guest_forwarded: 0,
            sent: 0,
            // Edges seen before now are lost: look once.
            readable: true,
            hung_up: false,
            host_done_sending: false,
            guest_done_receiving: false,
            batch: 1,
            send_response: false,
            send_credit: false,
            asked_credit: false,
            told_shutdown: 0,
        }
    }

    /// A host client asks for a port of the guest.
    pub fn from_host(stream: UnixStream, key: Key, guest_cid: u64, buf_alloc: u32, now: Instant) -> Self {
        let mut new = Self::new(stream, key, guest_cid, buf_alloc, Phase::Requested { sent: false });
        new.deadline = Some(now + REQUEST_TIMEOUT);
        new
    }

    /// The guest asked for a port of the host with `request`, and `stream` leads to it.
    pub fn from_guest(stream: UnixStream, request: &Header, guest_cid: u64, buf_alloc: u32) -> Self {
        let key = Key { host_port: request.dst_port, guest_port: request.src_port };
        let mut new = Self::new(stream, key, guest_cid, buf_alloc, Phase::Open);
        new.guest_buf_alloc = request.buf_alloc;
        new.guest_forwarded = request.fwd_cnt;
        new.send_response = true;
        new
    }

    /// Its end on the host.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What to wait for on the socket: space only while something waits to be written, because every
    /// read on the other side would wake the event loop.
    pub fn wanted_events(&self) -> EventSet {
        let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if !self.backlog.is_empty() {
            events |= EventSet::OUT;
        }
        events
    }

    fn header(&mut self, op: u16, flags: u32) -> Header {
        // Every packet tells the credit.
        self.told_forwarded = self.forwarded;
        self.send_credit = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len: 0,
            type_: TYPE_STREAM,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded,
        }
    }

    /// Bytes the guest is still willing to take.
    fn credit(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buf_alloc.saturating_sub(under_way) as usize
    }

    /// Whether the guest should be asked for credit: once per drought, since it says by itself when
    /// there is room again, and a guest that always answers would otherwise be asked for ever.
    fn due_credit_request(&self) -> bool {
        self.can_read() && self.credit() == 0 && !self.asked_credit
    }

    fn can_read(&self) -> bool {
        self.readable && !self.host_done_sending && !self.guest_done_receiving
    }

    /// Flags of `SHUTDOWN` that are due and not told yet.
    fn due_shutdown(&self) -> u32 {
        let mut flags = 0;
        if self.host_done_sending {
            flags |= SHUTDOWN_SEND;
        }
        // The guest hears that nobody reads any more only when it has got all that was written.
        if self.host_done_receiving && (self.host_done_sending || self.guest_done_receiving) {
            flags |= SHUTDOWN_RECEIVE;
        }
        if flags & !self.told_shutdown == 0 { 0 } else { flags }
    }

    /// Whether there is something for the guest now.
    pub fn has_something(&self) -> bool {
        match self.phase {
            Phase::Requested { sent } => !sent,
            Phase::Orphan => false,
            Phase::Open => {
                self.send_response
                    || self.send_credit
                    || self.due_credit_request()
                    || self.due_shutdown() != 0
                    || (self.can_read() && self.credit() > 0)
            }
        }
    }

    /// Gives the guest the next packet or packets; at least one receive buffer is taken.
    pub fn produce(&mut self, rx: &mut RxRing, now: Instant) -> Result<(), BrokenDriver> {
        if let Phase::Requested { sent: false } = self.phase {
            self.phase = Phase::Requested { sent: true };
            let header = self.header(op::REQUEST, 0);
            rx.send(header)?;
        } else if self.send_response {
            self.send_response = false;
            let header = self.header(op::RESPONSE, 0);
            rx.send(header)?;
        } else if !self.read_from_host(rx)? {
            let due = self.due_shutdown();
            if due != 0 {
                self.told_shutdown = due;
                if due == SHUTDOWN_BOTH {
                    self.deadline = Some(now + CLOSE_TIMEOUT);
                }
                let header = self.header(op::SHUTDOWN, due);
                rx.send(header)?;
            } else if self.due_credit_request() {
                self.asked_credit = true;
                let header = self.header(op::CREDIT_REQUEST, 0);
                rx.send(header)?;
            } else if self.send_credit {
                let header = self.header(op::CREDIT_UPDATE, 0);
                rx.send(header)?;
            }
        }
        Ok(())
    }

    /// Reads from the socket straight into receive buffers; false if nothing was there or nothing is
    /// allowed.
    fn read_from_host(&mut self, rx: &mut RxRing) -> Result<bool, BrokenDriver> {
        let credit = self.credit();
        if self.phase != Phase::Open || !self.can_read() || credit == 0 {
            return Ok(false);
        }
        rx.take(self.batch)?;
        let places = rx.payload(credit);
        let room = places.len();
        let received = match socket::receive_guest(&self.stream, places) {
            Ok(received) => received,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                self.batch = 1;
                return Ok(false);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(false),
            // Closed by the other side with something of ours unread: the same as the end for us.
            Err(_) => socket::Received { len: 0, truncated: false },
        };
        if received.len == 0 {
            self.host_done_sending = true;
            return Ok(false);
        }
        if received.len == room {
            self.batch = (self.batch * 2).min(MAX_BATCH);
        } else {
            self.batch = 1;
            // A short read took all there was; what came since is a new edge. Not so when something
            // that is no data ended it, or when the edge of the hang-up is already behind us.
            self.readable = received.truncated || self.hung_up;
        }
        // No more than the credit, a 32-bit number.
        self.sent = self.sent.wrapping_add(received.len as u32);
        let header = self.header(op::RW, 0);
        rx.send_data(header, received.len)?;
        Ok(true)
    }

    /// Something happened on the socket.
    pub fn socket_event(&mut self, events: EventSet) -> Fate {
        if events.contains(EventSet::HANG_UP) || events.contains(EventSet::ERROR) {
            self.stop_writing();
        }
        if events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.hung_up = true;
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.readable = true;
        }
        if matches!(self.phase, Phase::Requested { .. }) && self.host_done_receiving {
            // The client left before the guest answered.
            return self.give_up();
        }
        if events.contains(EventSet::OUT) {
            self.write_backlog();
        }
        self.fate()
    }

    /// Its deadline has passed.
    pub fn give_up(&self) -> Fate {
        Fate::Gone { reset: self.phase != Phase::Requested { sent: false } && self.phase != Phase::Orphan }
    }

    fn fate(&self) -> Fate {
        if self.phase == Phase::Orphan && self.backlog.is_empty() {
            Fate::Gone { reset: false }
        } else {
            Fate::Live
        }
    }

    /// A packet from the guest, with its payload.
    pub fn take_packet(&mut self, header: &Header, payload: &GuestBuffers) -> Fate {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_credit = false;
        }
        match (self.phase, header.op) {
            (_, op::RST) => self.end_by_guest(false),
            (Phase::Requested { sent: true }, op::RESPONSE) => self.open(),
            (Phase::Open, op::RW) if !self.guest_done_sending => self.write_to_host(payload),
            (Phase::Open, op::CREDIT_UPDATE) => Fate::Live,
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.send_credit = true;
                Fate::Live
            }
            (Phase::Open, op::SHUTDOWN) => self.shut_down_by_guest(header.flags),
            // Nothing a working driver sends now.
            _ => Fate::Gone { reset: true },
        }
    }

    /// The guest accepts: tell the host client, and let data flow.
    fn open(&mut self) -> Fate {
        let line = format!("OK {}\n", self.key.host_port);
        match socket::send(&self.stream, [line.as_bytes(), &[]]) {
            Ok(sent) if sent == line.len() => {
                self.phase = Phase::Open;
                self.deadline = None;
                Fate::Live
            }
            // An empty socket takes a line, unless the client has gone.
            _ => Fate::Gone { reset: true },
        }
    }

    fn write_to_host(&mut self, payload: &GuestBuffers) -> Fate {
        let mut written = 0;
        if self.host_done_receiving {
            written = payload.len();
        } else if self.backlog.is_empty() {
            match socket::send_guest(&self.stream, payload) {
                Ok(sent) => written = sent,
                Err(e) if would_block(&e) => {}
                Err(_) => {
                    self.stop_writing();
                    written = payload.len();
                }
            }
        }
        self.count_forwarded(written);
        let rest = payload.len() - written;
        if rest > 0 {
            let before = self.backlog.len();
            if rest > (self.buf_alloc as usize).saturating_sub(before) {
                debug!("vsock: {:?}: more data than credit", self.key);
                return Fate::Gone { reset: true };
            }
            self.backlog.resize(before + rest, 0);
            let (first, second) = self.backlog.as_mut_slices();
            let in_first = first.len().saturating_sub(before).min(rest);
            let first_end = before.min(first.len());
            payload.read_at(written, &mut first[first_end..]);
            let second_start = before.saturating_sub(first.len());
            payload.read_at(written + in_first, &mut second[second_start..]);
        }
        Fate::Live
    }

    /// Counts bytes the host took, and tells the guest when it may come to think there is no room.
    fn count_forwarded(&mut self, bytes: usize) {
        self.forwarded = self.forwarded.wrapping_add(bytes as u32);
        if self.forwarded.wrapping_sub(self.told_forwarded) >= self.buf_alloc / 2 {
            self.send_credit = true;
        }
    }

    fn write_backlog(&mut self) {
        while !self.backlog.is_empty() {
            let (first, second) = self.backlog.as_slices();
            match socket::send(&self.stream, [first, second]) {
                Ok(sent) => {
                    self.backlog.drain(..sent);
                    self.count_forwarded(sent);
                }
                Err(e) if would_block(&e) => return,
                Err(_) => self.stop_writing(),
            }
        }
        // Give the memory back: most connections never need it.
        self.backlog = VecDeque::new();
        if self.guest_done_sending {
            self.stop_writing();
        }
    }

    /// The host takes no more, or the guest sends no more and everything is written.
    fn stop_writing(&mut self) {
        if !self.host_done_receiving {
            self.host_done_receiving = true;
            let _ = self.stream.shutdown(Shutdown::Write);
            self.count_forwarded(self.backlog.len());
            self.backlog = VecDeque::new();
        }
    }

    fn shut_down_by_guest(&mut self, flags: u32) -> Fate {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_done_receiving {
            self.guest_done_receiving = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 && !self.guest_done_sending {
            self.guest_done_sending = true;
            if self.backlog.is_empty() {
                self.stop_writing();
            }
        }
        // Only when one packet says both, or both were said, has the guest closed its end.
        if self.guest_done_receiving && self.guest_done_sending {
            self.end_by_guest(true)
        } else {
            Fate::Live
        }
    }

    /// The guest is through with the connection.
    fn end_by_guest(&mut self, reset: bool) -> Fate {
        self.guest_done_sending = true;
        self.guest_done_receiving = true;
        if self.phase != Phase::Open || self.backlog.is_empty() {
            return Fate::Gone { reset };
        }
        self.phase = Phase::Orphan;
        self.deadline = None;
        Fate::Orphaned { reset }
    }
}

fn would_block(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
