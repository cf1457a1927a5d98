//! The vsock device (virtio 1.2, section 5.10): stream sockets between guest and host programs, without a
//! network. On the host every port is a Unix socket, as in Firecracker:
//!
//! * a host program connects to the device's socket, sends `CONNECT <port>\n`, and when a program in the
//!   guest accepts on that port it receives `OK <host port>\n`; from then on the stream is the
//!   connection. If nobody listens the stream just ends. Clients that come before the guest's driver is
//!   ready wait;
//! * a guest program that connects to port P of the host (context identifier 2) reaches whoever listens
//!   on the Unix socket `<device's socket>_P`, and is refused if nobody does.
//!
//! [`packet`] is the wire format, [`connection`] one connection with its credit and its two directions,
//! [`muxer`] all of them, [`rx`] the queue to the guest; here is the device that drives them.
//!
//! It never lets one connection hold up another, never holds more than a bounded amount for any, and never
//! trusts a length, a port or a credit from the guest. It resolves no names and knows no other transport.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use log::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use self::muxer::{Delivered, Muxer};
use self::packet::{HEADER_SIZE, Header};
use self::rx::RxRing;
use super::buffers::{BrokenDriver, Direction, GuestBuffers};
use super::{ActivateError, Activation, F_RING_EVENT_IDX, FIRST_DEVICE_TOKEN, Interrupt, VirtioDevice};
use crate::event_loop::{EventSet, Events, Subscriber};
use crate::memory::Memory;

mod connection;
mod handshake;
mod muxer;
mod packet;
mod rx;
mod socket;

/// Device type (virtio 1.2, section 5).
pub const DEVICE_TYPE: u32 = 19;

const RX_QUEUE: u32 = 0;
const TX_QUEUE: u32 = 1;
const EVENT_QUEUE: u32 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Work is left over: the muxer's own tokens start at `FIRST_DEVICE_TOKEN`.
const CONTINUE: u32 = FIRST_DEVICE_TOKEN + 0x80;

/// Packets taken from the guest before others in the event loop get their turn.
const TX_BUDGET: usize = 256;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// 0 to 2 and 2^32 - 1 mean something else (virtio 1.2, 5.10.4).
    #[error("guest_cid: {0} is reserved or too large, use 3 to 4294967294")]
    Cid(u64),
    /// The host socket could not be made.
    #[error("uds_path: cannot listen on {path}: {source}")]
    Listen {
        /// As configured.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// An event descriptor could not be made.
    #[error("vsock: {0}")]
    Host(#[from] io::Error),
}

/// See the module's text.
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    events: Option<Events>,
    resume: EventFd,
    active: Option<Active>,
    paused: bool,
}

struct Active {
    rx: RxRing,
    tx: Queue,
    event: Queue,
    memory: Arc<Memory>,
    interrupt: Interrupt,
    packet: GuestBuffers,
    /// Packets from the guest wait until it makes room for the answers.
    tx_held: bool,
    /// A transport reset was sent, and the driver has not dealt with it: it would take connections made
    /// now for old ones.
    reset_pending: bool,
}

impl Vsock {
    /// A device for the guest with context identifier `guest_cid`, with its host socket at `uds_path`,
    /// which is made here (it must not exist) and removed when the device is dropped.
    pub fn new(guest_cid: u64, uds_path: impl Into<PathBuf>) -> Result<Self, VsockError> {
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let path = uds_path.into();
        let muxer =
            Muxer::new(guest_cid, path.clone()).map_err(|source| VsockError::Listen { path, source })?;
        let resume = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { guest_cid, muxer, events: None, resume, active: None, paused: false })
    }

    /// Where host programs connect.
    pub fn uds_path(&self) -> &Path {
        self.muxer.path()
    }

    /// Connections at the moment.
    pub fn connections(&self) -> usize {
        self.muxer.connections()
    }

    /// Ends all connections, and tells the driver to do so too and to read its identifier anew: for a
    /// guest whose peers are not those it knew, as after a restore.
    pub fn reset_connections(&mut self) {
        self.muxer.drop_connections();
        if let Some(active) = &mut self.active
            && let Err(e) = active.send_transport_reset()
        {
            self.fail(e);
        }
    }

    fn fail(&mut self, error: BrokenDriver) {
        warn!("vsock: {error}; stopped until the driver resets the device");
        if let Some(active) = self.active.take() {
            active.interrupt.needs_reset();
        }
        self.muxer.stop();
    }

    fn work(&mut self, token: u32, events: EventSet) -> Result<(), BrokenDriver> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let mut unfinished = false;
        match token {
            RX_QUEUE => {}
            TX_QUEUE if self.paused => {}
            TX_QUEUE => unfinished = active.process_tx(&mut self.muxer)?,
            CONTINUE => {
                self.muxer.accept_rest(Instant::now());
                if !self.paused {
                    unfinished = active.process_tx(&mut self.muxer)?;
                }
            }
            EVENT_QUEUE => active.reset_pending = false,
            _ => self.muxer.event(token, events, Instant::now()),
        }
        if !self.paused {
            unfinished |= active.process_rx(&mut self.muxer)?;
        }
        if unfinished || self.muxer.more_to_accept() {
            // Edge-triggered, as the queues' own descriptors.
            let _ = self.resume.write(1);
        }
        Ok(())
    }
}

impl Active {
    /// Takes packets from the guest; true if some are left.
    fn process_tx(&mut self, muxer: &mut Muxer) -> Result<bool, BrokenDriver> {
        let mut left = TX_BUDGET;
        self.tx.disable_notification(&*self.memory)?;
        let unfinished = loop {
            self.tx_held = !muxer.takes_packets();
            if left == 0 || self.tx_held {
                break left == 0;
            }
            let Some(chain) = self.tx.iter(&*self.memory)?.next() else {
                if self.tx.enable_notification(&*self.memory)? {
                    continue;
                }
                break false;
            };
            left -= 1;
            let head = chain.head_index();
            self.packet.clear();
            self.packet.push_chain(chain, Direction::Read)?;
            let mut bytes = [0; HEADER_SIZE];
            let len = self.packet.read_at(0, &mut bytes);
            let header = Header::from_bytes(&bytes);
            self.packet.skip(HEADER_SIZE);
            if len < HEADER_SIZE || self.packet.len() < header.len as usize {
                return Err(BrokenDriver::TooShort(len + self.packet.len()));
            }
            self.packet.truncate(header.len as usize);
            muxer.take_packet(&header, &self.packet);
            self.tx.add_used(&*self.memory, head, 0)?;
        };
        if left < TX_BUDGET && self.tx.needs_notification(&*self.memory)? {
            self.interrupt.queue();
        }
        Ok(unfinished)
    }

    /// Gives packets to the guest; true if some are left that it has room for.
    fn process_rx(&mut self, muxer: &mut Muxer) -> Result<bool, BrokenDriver> {
        if self.reset_pending {
            return Ok(false);
        }
        self.rx.wait_for_nothing()?;
        let interrupt = &self.interrupt;
        let delivered = muxer.deliver(&mut self.rx, Instant::now(), |rx| {
            if rx.needs_interrupt()? {
                interrupt.queue();
            }
            Ok(())
        })?;
        self.rx.put_back();
        Ok(delivered == Delivered::EnoughForNow || self.tx_held && muxer.takes_packets())
    }

    /// Asks to be notified of the next event buffer that the driver offers, behind those that are there: not of
    /// the next that is not taken, which is what the queue itself would ask for (virtio 1.2, 2.7.7).
    fn want_next_event_buffer(&mut self) -> Result<(), BrokenDriver> {
        self.event.enable_notification(&*self.memory)?;
        if self.event.event_idx_enabled() {
            let offered = self.event.avail_idx(&*self.memory, Ordering::Acquire)?.0;
            let place = 4 + 8 * u64::from(self.event.size());
            let place = GuestAddress(self.event.used_ring()).checked_add(place);
            let place = place.ok_or(virtio_queue::Error::AddressOverflow)?;
            let written = self.memory.store(offered.to_le(), place, Ordering::Release);
            written.map_err(virtio_queue::Error::GuestMemory)?;
        }
        Ok(())
    }

    fn send_transport_reset(&mut self) -> Result<(), BrokenDriver> {
        if !self.event.ready() {
            return Ok(());
        }
        let Some(chain) = self.event.iter(&*self.memory)?.next() else {
            warn!("vsock: the driver offers no event buffer, old connections stay as they are for it");
            return Ok(());
        };
        let head = chain.head_index();
        self.packet.clear();
        self.packet.push_chain(chain, Direction::Write)?;
        let len = self.packet.write_at(0, &EVENT_TRANSPORT_RESET.to_le_bytes());
        self.event.add_used(&*self.memory, head, len as u32)?;
        // The driver offers the buffer again when it is through.
        self.want_next_event_buffer()?;
        self.reset_pending = true;
        self.event.needs_notification(&*self.memory)?;
        self.interrupt.queue();
        Ok(())
    }
}

impl Subscriber for Vsock {
    fn process(&mut self, token: u32, events: EventSet) {
        if let Err(e) = self.work(token, events) {
            self.fail(e);
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn attach(&mut self, events: Events) {
        self.events = Some(events);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let [rx, tx, event] =
            <[Queue; 3]>::try_from(queues).map_err(|q| ActivateError::QueueMissing(q.len()))?;
        for (index, queue) in [&rx, &tx].into_iter().enumerate() {
            if !queue.ready() {
                return Err(ActivateError::QueueMissing(index));
            }
        }
        if let Some(events) = &self.events {
            let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
            events.remove(&self.resume);
            events.add(&self.resume, CONTINUE, edge).map_err(|e| ActivateError::Host("vsock", e))?;
            self.muxer.start(events.clone()).map_err(|e| ActivateError::Host("vsock", e))?;
        }
        self.active = Some(Active {
            rx: RxRing::new(rx, memory.clone()),
            tx,
            event,
            packet: GuestBuffers::new(memory.clone()),
            memory,
            interrupt,
            tx_held: false,
            reset_pending: false,
        });
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        let Some(active) = &self.active else { return Vec::new() };
        vec![active.rx.state(), active.tx.state(), active.event.state()]
    }

    fn reset(&mut self) {
        self.active = None;
        self.muxer.stop();
    }

    /// Sockets are still served, as far as that needs no guest memory: their events come only once.
    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        let _ = self.resume.write(1);
    }
}

#[cfg(test)]
#[path = "vsock_tests.rs"]
mod tests;
