//! All connections of one VM: accepts host clients, connects for the guest, finds the connection a packet
//! belongs to, and decides which connection may speak to the guest next (in turn, one read each).
//!
//! Never waits for anybody: a host program that does not read fills only its own connection's backlog.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::{debug, warn};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Fate, Key};
use super::handshake::{self, Progress};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use super::rx::RxRing;
use super::socket;
use crate::event_loop::{EventSet, Events};
use crate::virtio::FIRST_DEVICE_TOKEN;
use crate::virtio::buffers::{BrokenDriver, GuestBuffers};

/// Most connections at a time, handshakes included.
pub const MAX_CONNECTIONS: usize = 1024;
/// How long a host client may take to say where to.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes a connection holds for a slow host program; less for each when there are many, so that the sum
/// stays below 72 MiB.
const BUF_ALLOC: u32 = 256 << 10;
const BUF_ALLOC_MANY: u32 = 64 << 10;
const MANY: usize = 32;

/// Packets are taken from the guest only while fewer resets than this wait for receive buffers.
const MAX_RESETS: usize = 256;
/// Reads from sockets, or packets, before others in the event loop get their turn.
const DELIVERY_BUDGET: usize = 64;
const ACCEPT_BUDGET: usize = 64;

/// First port given to host clients, as in Firecracker.
const FIRST_HOST_PORT: u32 = 1 << 30;

const LISTENER: u32 = FIRST_DEVICE_TOKEN;
const TIMER: u32 = FIRST_DEVICE_TOKEN + 1;
/// Tokens of connections have this bit, then a generation, then the slot.
const CONNECTION: u32 = 1 << 31;
const SLOT_BITS: u32 = 11;
const SLOT_MASK: u32 = (1 << SLOT_BITS) - 1;
const _: () = assert!(MAX_CONNECTIONS <= SLOT_MASK as usize);

/// How a delivery ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Delivered {
    /// Everything there was.
    All,
    /// The driver offers no more buffers, and will say when it does.
    NoBuffers,
    /// It took long enough: call again after others had their turn.
    EnoughForNow,
}

enum Entry {
    Free,
    Handshake(UnixStream, Instant),
    Connection(Box<Connection>),
}

struct Slot {
    /// Distinguishes an event meant for what was here before.
    generation: u32,
    entry: Entry,
}

/// See the module's text.
pub struct Muxer {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode of the listening socket's file, to remove no other.
    file: (u64, u64),
    events: Option<Events>,
    accept_again: bool,
    /// Accepting failed, mostly for want of descriptors: to be tried again when a connection has ended.
    accept_failed: bool,
    timer: TimerFd,
    armed: Option<Instant>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    by_key: HashMap<Key, u32>,
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    last_host_port: u32,
}

impl Muxer {
    /// Listens on `path`, which must not exist; host clients wait there until the driver is ready.
    pub fn new(guest_cid: u64, path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        let metadata = std::fs::symlink_metadata(&path)?;
        Ok(Self {
            guest_cid,
            path,
            listener,
            file: (metadata.dev(), metadata.ino()),
            events: None,
            accept_again: false,
            accept_failed: false,
            timer: TimerFd::new().map_err(io::Error::from)?,
            armed: None,
            slots: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            last_host_port: FIRST_HOST_PORT - 1,
        })
    }

    /// Where host clients connect.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Starts to accept.
    pub fn start(&mut self, events: Events) -> io::Result<()> {
        events.add(&self.listener, LISTENER, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        events.add(&self.timer, TIMER, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        self.events = Some(events);
        Ok(())
    }

    /// Ends all connections and accepts no more until started again.
    pub fn stop(&mut self) {
        if let Some(events) = self.events.take() {
            events.remove(&self.listener);
            events.remove(&self.timer);
        }
        self.drop_connections();
    }

    /// Ends all connections without telling the guest.
    pub fn drop_connections(&mut self) {
        for index in 0..self.slots.len() {
            self.remove(index);
        }
        self.by_key.clear();
        self.ready.clear();
        self.resets.clear();
    }

    /// Connections at the moment, handshakes included.
    pub fn connections(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Connections that stand in line for the guest's buffers, those that are over included.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.ready.len()
    }

    /// Something happened on the descriptor with `token`.
    pub fn event(&mut self, token: u32, events: EventSet, now: Instant) {
        match token {
            LISTENER => self.accept(now),
            TIMER => self.expire(now),
            _ => {
                let Some(index) = self.find(token) else { return };
                match &mut self.slots[index].entry {
                    Entry::Free => {}
                    Entry::Handshake(..) => self.shake_hands(index, events, now),
                    Entry::Connection(connection) => {
                        let fate = connection.socket_event(events);
                        self.settle(index, fate);
                    }
                }
            }
        }
    }

    fn find(&self, token: u32) -> Option<usize> {
        find(&self.slots, token)
    }

    fn insert(&mut self, entry: Entry) -> Option<usize> {
        if let Some(index) = self.free.pop() {
            self.slots[index].entry = entry;
            return Some(index);
        }
        if self.slots.len() >= MAX_CONNECTIONS {
            return None;
        }
        self.slots.push(Slot { generation: 0, entry });
        Some(self.slots.len() - 1)
    }

    fn remove(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let token = token_of(index, slot.generation);
        // Closing the socket also takes it out of the event loop.
        match std::mem::replace(&mut slot.entry, Entry::Free) {
            Entry::Free => return,
            Entry::Handshake(..) => {}
            Entry::Connection(connection) => {
                // An orphan's key may belong to another connection already.
                if self.by_key.get(&connection.key) == Some(&token) {
                    self.by_key.remove(&connection.key);
                }
            }
        }
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        self.accept_again |= std::mem::take(&mut self.accept_failed);
    }

    fn accept(&mut self, now: Instant) {
        self.accept_again = false;
        for _ in 0..ACCEPT_BUDGET {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    self.accept_failed = true;
                    warn!("vsock: cannot accept on {}: {e}", self.path.display());
                    return;
                }
            };
            let deadline = now + HANDSHAKE_TIMEOUT;
            let Some(index) = self.insert(Entry::Handshake(stream, deadline)) else {
                warn!("vsock: {MAX_CONNECTIONS} connections already, host client refused");
                continue;
            };
            let token = token_of(index, self.slots[index].generation);
            let wanted = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            let (Entry::Handshake(stream, _), Some(events)) = (&self.slots[index].entry, &self.events) else {
                continue;
            };
            if let Err(e) = events.add(stream, token, wanted) {
                warn!("vsock: cannot watch a connection: {e}");
                self.remove(index);
                continue;
            }
            self.arm(deadline, now);
            // The line is mostly there already.
            self.shake_hands(index, EventSet::empty(), now);
        }
        self.accept_again = true;
    }

    /// Whether host clients wait to be accepted though no event will say so.
    pub fn more_to_accept(&self) -> bool {
        self.accept_again
    }

    /// Accepts those.
    pub fn accept_rest(&mut self, now: Instant) {
        if self.accept_again {
            self.accept(now);
        }
    }

    fn shake_hands(&mut self, index: usize, events: EventSet, now: Instant) {
        let generation = self.slots[index].generation;
        let Entry::Handshake(stream, _) = &mut self.slots[index].entry else { return };
        let port = match handshake::read(stream) {
            Progress::Waiting if events.contains(EventSet::READ_HANG_UP) => return self.remove(index),
            Progress::Waiting => return,
            Progress::Failed => {
                debug!("vsock: host client said no CONNECT");
                return self.remove(index);
            }
            Progress::Port(port) => port,
        };
        let key = self.free_key(port);
        let buf_alloc = buf_alloc(self.connections() - 1);
        let slot = &mut self.slots[index];
        let Entry::Handshake(stream, _) = std::mem::replace(&mut slot.entry, Entry::Free) else { return };
        let mut connection = Connection::from_host(stream, key, self.guest_cid, buf_alloc, now);
        connection.interest = connection.wanted_events();
        slot.entry = Entry::Connection(Box::new(connection));
        self.by_key.insert(key, token_of(index, generation));
        if events.contains(EventSet::READ_HANG_UP) {
            // This edge will not come again.
            let Entry::Connection(connection) = &mut self.slots[index].entry else { return };
            let fate = connection.socket_event(events);
            return self.settle(index, fate);
        }
        self.settle(index, Fate::Live);
    }

    fn free_key(&mut self, guest_port: u32) -> Key {
        // There are far more ports than connections, so this ends.
        loop {
            self.last_host_port = (self.last_host_port + 1) % FIRST_HOST_PORT + FIRST_HOST_PORT;
            let key = Key { host_port: self.last_host_port, guest_port };
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    /// Whether packets from the guest may be handled; if not, after the next delivery they may.
    pub fn takes_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Takes a packet from the guest with its payload.
    pub fn take_packet(&mut self, header: &Header, payload: &GuestBuffers) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return debug!("vsock: packet from {} to {} dropped", header.src_cid, header.dst_cid);
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let connection = self.by_key.get(&key).copied().and_then(|token| self.find(token));
        if let Some(index) = connection
            && header.type_ == TYPE_STREAM
            && let Entry::Connection(connection) = &mut self.slots[index].entry
        {
            let fate = connection.take_packet(header, payload);
            self.settle(index, fate);
        } else if header.op == op::REQUEST && header.type_ == TYPE_STREAM {
            if let Err(e) = self.connect_to_host(key, header) {
                debug!("vsock: guest's connection to port {} refused: {e}", key.host_port);
                self.push_reset(key, header.type_);
            }
        } else if header.op != op::RST {
            self.push_reset(key, header.type_);
        }
    }

    fn connect_to_host(&mut self, key: Key, request: &Header) -> io::Result<()> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key.host_port));
        let stream = socket::connect(Path::new(&path))?;
        let connection =
            Connection::from_guest(stream, request, self.guest_cid, buf_alloc(self.connections()));
        let index = self
            .insert(Entry::Connection(Box::new(connection)))
            .ok_or_else(|| io::Error::other("too many connections"))?;
        let token = token_of(index, self.slots[index].generation);
        let (Entry::Connection(connection), Some(events)) = (&mut self.slots[index].entry, &self.events)
        else {
            return Ok(());
        };
        connection.interest = connection.wanted_events();
        if let Err(e) = events.add(connection.stream(), token, connection.interest) {
            self.remove(index);
            return Err(e);
        }
        self.by_key.insert(key, token);
        self.settle(index, Fate::Live);
        Ok(())
    }

    fn push_reset(&mut self, key: Key, type_: u16) {
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len: 0,
            type_,
            op: op::RST,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        });
    }

    /// Draws the consequences of whatever a connection just went through.
    fn settle(&mut self, index: usize, fate: Fate) {
        let Slot { generation, entry: Entry::Connection(connection) } = &mut self.slots[index] else {
            return;
        };
        let token = token_of(index, *generation);
        let key = connection.key;
        match fate {
            Fate::Gone { reset } => {
                self.remove(index);
                if reset {
                    self.push_reset(key, TYPE_STREAM);
                }
                return;
            }
            Fate::Orphaned { reset } => {
                self.by_key.remove(&key);
                if reset {
                    self.push_reset(key, TYPE_STREAM);
                }
            }
            Fate::Live => {}
        }
        // Borrowed anew: resets live beside the slots.
        let Entry::Connection(connection) = &mut self.slots[index].entry else { return };
        if connection.has_something() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(token);
            self.prune_ready();
        }
        let Entry::Connection(connection) = &mut self.slots[index].entry else { return };
        let wanted = connection.wanted_events();
        if wanted != connection.interest {
            connection.interest = wanted;
            let changed = self.events.as_ref().map(|e| e.modify(connection.stream(), token, wanted));
            if let Some(Err(e)) = changed {
                warn!("vsock: cannot watch a connection: {e}");
                self.remove(index);
                return self.push_reset(key, TYPE_STREAM);
            }
        }
        if let Some(deadline) = connection.deadline {
            self.arm(deadline, Instant::now());
        }
    }

    /// Forgets those in `ready` that are over. They would be passed over in time, but a guest that offers no
    /// buffers could have them grow without end.
    fn prune_ready(&mut self) {
        if self.ready.len() > 2 * MAX_CONNECTIONS {
            let slots = &self.slots;
            self.ready.retain(|token| find(slots, *token).is_some());
        }
    }

    /// Makes sure the timer goes off by `deadline`.
    fn arm(&mut self, deadline: Instant, now: Instant) {
        if self.armed.is_none_or(|armed| deadline < armed) {
            self.armed = Some(deadline);
            // Zero would disarm it.
            let wait = deadline.saturating_duration_since(now).max(Duration::from_millis(1));
            if let Err(e) = self.timer.reset(wait, None) {
                warn!("vsock: timer: {e}");
            }
        }
    }

    /// Gives up what has waited too long.
    pub fn expire(&mut self, now: Instant) {
        self.armed = None;
        let mut next: Option<Instant> = None;
        for index in 0..self.slots.len() {
            let (deadline, fate) = match &self.slots[index].entry {
                Entry::Handshake(_, deadline) => (Some(*deadline), None),
                Entry::Connection(connection) => (connection.deadline, Some(connection.give_up())),
                Entry::Free => continue,
            };
            match (deadline, fate) {
                (Some(deadline), _) if deadline > now => {
                    next = Some(next.map_or(deadline, |n| n.min(deadline)))
                }
                (Some(_), Some(fate)) => self.settle(index, fate),
                (Some(_), None) => self.remove(index),
                (None, _) => {}
            }
        }
        if let Some(next) = next {
            self.arm(next, now);
        }
    }

    /// Gives the guest what there is for it. `sent` is called after each step that may want an interrupt.
    pub fn deliver(
        &mut self,
        rx: &mut RxRing,
        now: Instant,
        mut sent: impl FnMut(&mut RxRing) -> Result<(), BrokenDriver>,
    ) -> Result<Delivered, BrokenDriver> {
        for _ in 0..DELIVERY_BUDGET {
            if self.resets.is_empty() && self.ready.is_empty() {
                return Ok(Delivered::All);
            }
            if rx.take(1)? == 0 {
                if rx.wait_for_more()? {
                    continue;
                }
                return Ok(Delivered::NoBuffers);
            }
            if let Some(reset) = self.resets.pop_front() {
                rx.send(reset)?;
            } else if let Some(index) = self.ready.pop_front().and_then(|token| self.find(token))
                && let Entry::Connection(connection) = &mut self.slots[index].entry
            {
                connection.queued = false;
                if connection.has_something() {
                    connection.produce(rx, now)?;
                    self.settle(index, Fate::Live);
                }
            }
            sent(rx)?;
        }
        Ok(Delivered::EnoughForNow)
    }
}

impl Drop for Muxer {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.file);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The slot `token` stands for, unless it has a new tenant since.
fn find(slots: &[Slot], token: u32) -> Option<usize> {
    let index = (token & SLOT_MASK) as usize;
    let slot = slots.get(index)?;
    (token == token_of(index, slot.generation) && !matches!(slot.entry, Entry::Free)).then_some(index)
}

fn token_of(index: usize, generation: u32) -> u32 {
    // The generation loses its upper bits; 2^20 tenants of one slot later an event may be mistaken, and
    // an event is only ever a hint to look.
    CONNECTION | (generation << SLOT_BITS) & !CONNECTION | index as u32
}

/// Credit of a new connection beside `others`.
fn buf_alloc(others: usize) -> u32 {
    if others < MANY { BUF_ALLOC } else { BUF_ALLOC_MANY }
}
