//! The network device (virtio 1.2, section 5.1) over a tap device of the host.
//!
//! Frames move by one `readv` or `writev` each between the tap and the guest's buffers. Checksums and
//! segmentation are left to the end of the path (CSUM, TSO, USO on both sides), so that most frames of a
//! busy connection are 64 KiB long; receive buffers are merged for them. Whatever one wake-up of the event
//! loop brings is shown to the driver in one go with at most one interrupt, and the driver notifies only
//! when the device has nothing to do.
//!
//! There is one pair of queues. More would pay only with a thread for each: one event loop serves all
//! queues of a VM, and it moves more than the copies of one vCPU make or take. A second pair would cost
//! every guest its buffers and its part of the boot all the same.
//!
//! The guest can address anybody: which frames may leave is a matter of the host's firewall. The device
//! looks into frames only to find those for the metadata service.
//!
//! A tap that is deleted under a running VM takes the link down; frames of the guest are dropped then, and
//! the VM lives on.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use self::rx::RxQueue;
use self::tap::{HEADER_SIZE, Tap, TapError, offload};
use super::buffers::{BrokenDriver, Direction, GuestBuffers};
use super::used::UsedBatch;
use super::{
    ActivateError, Activation, F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, FIRST_DEVICE_TOKEN, Interrupt,
    VirtioDevice,
};
use crate::config::{NetworkInterfaceConfig, NetworkInterfaceUpdate};
use crate::event_loop::{EventSet, Events, Subscriber};
use crate::memory::Memory;
use crate::metrics;
use crate::mmds::{self, MmdsNetwork};
use crate::rate_limiter::RateLimiter;

mod rx;
pub mod tap;

/// Device type (virtio 1.2, section 5).
pub const DEVICE_TYPE: u32 = 1;

const RX_QUEUE: u32 = 0;
const TX_QUEUE: u32 = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

const TAP: u32 = FIRST_DEVICE_TOKEN;
const RX_LIMITER: u32 = FIRST_DEVICE_TOKEN + 1;
const TX_LIMITER: u32 = FIRST_DEVICE_TOKEN + 2;
const CONTINUE: u32 = FIRST_DEVICE_TOKEN + 3;
const MMDS_TIMER: u32 = FIRST_DEVICE_TOKEN + 4;

/// Bytes in one direction before others in the event loop get their turn; a frame counts as at least
/// [`FRAME_COST`].
const BUDGET: usize = 2 << 20;
const FRAME_COST: usize = 2 << 10;
/// Bytes after which the driver is shown what was done so far, so that it works at the same time.
const SHOW: usize = 128 << 10;

/// Longest frame taken from the guest, header included: an IPv4 or IPv6 packet of 64 KiB with two VLAN tags.
const MAX_TX_FRAME: usize = HEADER_SIZE + 22 + 65535;

/// Feature bits (5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
}

/// Which feature of the guest's side stands for which of the tap's.
const OFFLOADS: [(u64, libc::c_uint); 6] = [
    (feature::GUEST_CSUM, offload::CSUM),
    (feature::GUEST_TSO4, offload::TSO4),
    (feature::GUEST_TSO6, offload::TSO6),
    (feature::GUEST_ECN, offload::TSO_ECN),
    (feature::GUEST_USO4, offload::USO4),
    (feature::GUEST_USO6, offload::USO6),
];

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// See [`TapError`].
    #[error("host_dev_name of network interface {id}: {source}")]
    Tap {
        /// The interface's name in the API.
        id: String,
        /// Why not.
        source: TapError,
    },
    /// The host gave no descriptors.
    #[error("network interface {id}: {source}")]
    Host {
        /// The interface's name in the API.
        id: String,
        /// Why not.
        source: io::Error,
    },
}

metrics::group! {
    /// What an interface has done.
    pub struct NetMetrics {
        /// Bytes given to the guest.
        rx_bytes_count: Counter,
        /// Frames given to the guest.
        rx_packets_count: Counter,
        /// Times the guest offered new receive buffers after it had run out of them.
        rx_queue_event_count: Counter,
        /// Times the tap had frames.
        rx_tap_event_count: Counter,
        /// Times a frame had to wait for receive buffers.
        no_rx_avail_buffer: Counter,
        /// Times the limit on received data was reached.
        rx_rate_limiter_throttled: Counter,
        /// Frames that could not be read from the tap.
        tap_read_fails: Counter,
        /// Bytes taken from the guest.
        tx_bytes_count: Counter,
        /// Frames taken from the guest.
        tx_packets_count: Counter,
        /// Notifications of the transmit queue.
        tx_queue_event_count: Counter,
        /// Times the limit on sent data was reached.
        tx_rate_limiter_throttled: Counter,
        /// Frames of the guest that were none.
        tx_malformed_frames: Counter,
        /// Frames that could not be written to the tap.
        tap_write_fails: Counter,
    }
}

/// See the module's text.
pub struct Net {
    id: String,
    tap: Tap,
    /// The tap is gone.
    dead: bool,
    features: u64,
    mac: [u8; 6],
    mtu: u16,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    events: Option<Events>,
    resume: EventFd,
    mmds: Option<Mmds>,
    active: Option<Active>,
    paused: bool,
    metrics: Arc<NetMetrics>,
}

/// The metadata service's end of the interface.
struct Mmds {
    network: MmdsNetwork,
    timer: TimerFd,
}

struct Active {
    rx: RxQueue,
    tx: Queue,
    tx_used: UsedBatch,
    frame: GuestBuffers,
    memory: Arc<Memory>,
    interrupt: Interrupt,
    /// The tap may have something.
    readable: bool,
    /// The driver offers too few buffers.
    starved: bool,
    /// A frame of this length lies in the places taken and waits for the limiter.
    held: Option<usize>,
}

impl Net {
    /// Attaches to the tap that `config` names. `mmds` is the metadata service's end of the interface, if it
    /// is to have one.
    pub fn new(config: &NetworkInterfaceConfig, mmds: Option<MmdsNetwork>) -> Result<Self, NetError> {
        let tap = Tap::open(&config.host_dev_name)
            .map_err(|source| NetError::Tap { id: config.iface_id.clone(), source })?;
        Self::with_tap(config, tap, mmds)
    }

    /// The device that `config` describes, but over `tap`.
    pub fn with_tap(
        config: &NetworkInterfaceConfig,
        tap: Tap,
        mmds: Option<MmdsNetwork>,
    ) -> Result<Self, NetError> {
        use feature::*;
        let host = |source| NetError::Host { id: config.iface_id.clone(), source };
        let mmds = match mmds {
            Some(network) => Some(Mmds { network, timer: TimerFd::new().map_err(|e| host(e.into()))? }),
            None => None,
        };
        let mut features = F_RING_EVENT_IDX
            | F_RING_INDIRECT_DESC
            | (CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN)
            | (MRG_RXBUF | STATUS);
        if tap.can_segment_udp() {
            features |= GUEST_USO4 | GUEST_USO6 | HOST_USO;
        }
        if config.guest_mac.is_some() {
            features |= MAC;
        }
        if config.mtu.is_some() {
            features |= MTU;
        }
        let metrics = Arc::new(NetMetrics::new());
        metrics::register("net", Some(&config.iface_id), metrics.clone());
        Ok(Self {
            id: config.iface_id.clone(),
            tap,
            dead: false,
            features,
            mac: config.guest_mac.map_or([0; 6], |mac| mac.0),
            mtu: config.mtu.unwrap_or(0),
            rx_limiter: RateLimiter::from_config(config.rx_rate_limiter.as_ref()).map_err(host)?,
            tx_limiter: RateLimiter::from_config(config.tx_rate_limiter.as_ref()).map_err(host)?,
            events: None,
            resume: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host)?,
            mmds,
            active: None,
            paused: false,
            metrics,
        })
    }

    /// Its name in the API.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the interface has done so far.
    pub fn metrics(&self) -> &Arc<NetMetrics> {
        &self.metrics
    }

    /// Changes the limits, also while the guest runs.
    pub fn update(&mut self, update: &NetworkInterfaceUpdate) {
        if let Some(limits) = &update.rx_rate_limiter {
            self.rx_limiter.update(limits);
        }
        if let Some(limits) = &update.tx_rate_limiter {
            self.tx_limiter.update(limits);
        }
    }

    fn work(&mut self, token: u32, events: EventSet) -> Result<(), BrokenDriver> {
        let mut transmit = false;
        match token {
            RX_QUEUE => self.metrics.rx_queue_event_count.inc(),
            TX_QUEUE => {
                self.metrics.tx_queue_event_count.inc();
                transmit = true;
            }
            TAP if events.contains(EventSet::ERROR) => self.lose_tap("it is gone"),
            TAP => self.metrics.rx_tap_event_count.inc(),
            RX_LIMITER => self.rx_limiter.unblock(),
            TX_LIMITER => {
                self.tx_limiter.unblock();
                transmit = true;
            }
            CONTINUE => transmit = true,
            MMDS_TIMER => {}
            _ => return Ok(()),
        }
        let Some(active) = &mut self.active else { return Ok(()) };
        active.readable |= token == TAP;
        active.starved &= !matches!(token, RX_QUEUE | CONTINUE);
        if self.paused {
            return Ok(());
        }
        let mut unfinished = transmit && self.transmit()?;
        unfinished |= self.receive()?;
        if unfinished {
            // Edge-triggered, as the queues' own descriptors.
            let _ = self.resume.write(1);
        }
        if let Some(mmds) = &mut self.mmds {
            mmds.arm(&self.id);
        }
        let Some(active) = &mut self.active else { return Ok(()) };
        // One interrupt for both: there is only one line.
        let sent = active.tx_used.needs_interrupt(&active.tx, &active.memory)?;
        if active.rx.needs_interrupt()? || sent {
            active.interrupt.queue();
        }
        Ok(())
    }

    /// Takes frames from the guest; true if some are left that could go at once.
    fn transmit(&mut self) -> Result<bool, BrokenDriver> {
        let Some(active) = &mut self.active else { return Ok(false) };
        if self.tx_limiter.is_blocked() {
            return Ok(false);
        }
        let (tx, memory) = (&mut active.tx, &*active.memory);
        tx.disable_notification(memory)?;
        let mut lost = None;
        let mut done = 0;
        let mut shown = 0;
        while done < BUDGET {
            let Some(chain) = tx.iter(memory)?.next() else {
                // The driver may wait for room in the ring before it offers more.
                active.tx_used.publish(tx, memory)?;
                if tx.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            active.frame.clear();
            let len = active.frame.push_chain(chain, Direction::Read)?;
            let Some(payload) = len.checked_sub(HEADER_SIZE) else {
                return Err(BrokenDriver::TooShort(len));
            };
            if let Some(mmds) = &mut self.mmds
                && mmds.take(&mut active.frame)
            {
                done += len.clamp(FRAME_COST, MAX_TX_FRAME);
                active.tx_used.add(tx, memory, head, 0)?;
                continue;
            }
            if !self.tx_limiter.admit(payload as u64) {
                self.metrics.tx_rate_limiter_throttled.inc();
                tx.go_to_previous_position();
                break;
            }
            done += len.clamp(FRAME_COST, MAX_TX_FRAME);
            if len > MAX_TX_FRAME {
                self.metrics.tx_malformed_frames.inc();
            } else if !self.dead {
                match self.tap.write(&active.frame) {
                    Ok(_) => {
                        self.metrics.tx_packets_count.inc();
                        self.metrics.tx_bytes_count.add(payload as u64);
                    }
                    Err(e) if is_gone(&e) => lost = Some(e),
                    // The interface is down, or the frame is not one: what a wire would do.
                    Err(_) => self.metrics.tap_write_fails.inc(),
                }
            }
            active.tx_used.add(tx, memory, head, 0)?;
            if done - shown > SHOW {
                shown = done;
                active.tx_used.publish(tx, memory)?;
            }
        }
        active.tx_used.publish(tx, memory)?;
        if let Some(e) = lost {
            self.lose_tap(e);
        }
        Ok(done >= BUDGET)
    }

    /// Gives frames to the guest; true if there may be more that it has room for.
    fn receive(&mut self) -> Result<bool, BrokenDriver> {
        let Some(active) = &mut self.active else { return Ok(false) };
        if active.readable {
            active.rx.wait_for_nothing()?;
        }
        let mut lost = None;
        let mut done = 0;
        let mut shown = 0;
        while (active.readable || self.mmds.is_some()) && !active.starved && done < BUDGET {
            let len = match active.held.take() {
                Some(len) => len,
                None => {
                    let Some(places) = active.rx.places()? else {
                        self.metrics.no_rx_avail_buffer.inc();
                        active.starved = true;
                        break;
                    };
                    if let Some(frame) = self.mmds.as_mut().and_then(|m| m.network.next_frame(Instant::now()))
                    {
                        places.write_at(0, &[0; HEADER_SIZE]);
                        let len = HEADER_SIZE + places.write_at(HEADER_SIZE, &frame);
                        active.rx.finish(len)?;
                        done += FRAME_COST;
                        continue;
                    }
                    if !active.readable {
                        break;
                    }
                    match self.tap.read(places) {
                        Ok(len) if len >= HEADER_SIZE => len,
                        Ok(_) => {
                            lost = Some(io::Error::from(io::ErrorKind::UnexpectedEof));
                            break;
                        }
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                            active.readable = false;
                            break;
                        }
                        Err(e) if is_gone(&e) => {
                            lost = Some(e);
                            break;
                        }
                        Err(_) => {
                            self.metrics.tap_read_fails.inc();
                            done += FRAME_COST;
                            continue;
                        }
                    }
                }
            };
            let payload = (len - HEADER_SIZE) as u64;
            if !self.rx_limiter.admit(payload) {
                self.metrics.rx_rate_limiter_throttled.inc();
                active.held = Some(len);
                break;
            }
            active.rx.finish(len)?;
            self.metrics.rx_packets_count.inc();
            self.metrics.rx_bytes_count.add(payload);
            done += len.max(FRAME_COST);
            if done - shown > SHOW {
                shown = done;
                active.rx.publish()?;
            }
        }
        active.rx.publish()?;
        if let Some(e) = lost {
            self.lose_tap(e);
        }
        Ok(done >= BUDGET)
    }

    /// The tap is gone: the link is down from now on.
    fn lose_tap(&mut self, why: impl std::fmt::Display) {
        if self.dead {
            return;
        }
        warn!("network interface {}: its tap cannot be used any more ({why}); the link is down", self.id);
        self.dead = true;
        if let Some(events) = &self.events {
            events.remove(&self.tap);
        }
        let space = self.config_space();
        if let Some(active) = &mut self.active {
            active.readable = false;
            active.interrupt.config(&space);
        }
    }

    fn config_space(&self) -> [u8; 12] {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac);
        // VIRTIO_NET_S_LINK_UP; then max_virtqueue_pairs, which means something with other features only.
        space[6] = u8::from(!self.dead);
        space[8] = 1;
        space[10..].copy_from_slice(&self.mtu.to_le_bytes());
        space
    }
}

impl Mmds {
    /// Takes the frame if it is for the service.
    fn take(&mut self, frame: &mut GuestBuffers) -> bool {
        let mut prefix = [0; mmds::PREFIX];
        let len = frame.read_at(HEADER_SIZE, &mut prefix);
        if !self.network.is_for_service(&prefix[..len]) {
            return false;
        }
        frame.skip(HEADER_SIZE);
        if frame.len() <= mmds::MAX_FRAME {
            let mut copy = vec![0; frame.len()];
            frame.read_at(0, &mut copy);
            // The guest may have changed it since.
            if self.network.is_for_service(&copy) {
                self.network.take(&copy, Instant::now());
            }
        }
        true
    }

    /// Has the timer say when the service has something to say unasked.
    fn arm(&mut self, id: &str) {
        if let Some(delay) = self.network.delay(Instant::now())
            && let Err(e) = self.timer.reset(delay.max(Duration::from_millis(1)), None)
        {
            warn!("network interface {id}: timer of the metadata service: {e}");
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::EPIPE | libc::ECONNRESET))
}

impl Subscriber for Net {
    fn process(&mut self, token: u32, events: EventSet) {
        if let Err(e) = self.work(token, events) {
            warn!("network interface {}: {e}; stopped until the driver resets the device", self.id);
            if let Some(active) = self.active.take() {
                active.interrupt.needs_reset();
            }
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn attach(&mut self, events: Events) {
        self.events = Some(events);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let [rx, tx] = <[Queue; 2]>::try_from(queues).map_err(|q| ActivateError::QueueMissing(q.len()))?;
        for (index, queue) in [&rx, &tx].into_iter().enumerate() {
            if !queue.ready() {
                return Err(ActivateError::QueueMissing(index));
            }
        }
        let offloads = OFFLOADS.iter().filter(|(f, _)| features & f != 0).fold(0, |all, (_, o)| all | o);
        if let Err(e) = self.tap.set_offload(offloads) {
            if !is_gone(&e) {
                return Err(ActivateError::Host("tap offloads", e));
            }
            self.lose_tap(e);
        }
        self.rx_limiter.unblock();
        self.tx_limiter.unblock();
        if let Some(events) = &self.events {
            self.watch(events).map_err(|e| ActivateError::Host("network events", e))?;
        }
        self.active = Some(Active {
            rx: RxQueue::new(rx, memory.clone(), features & feature::MRG_RXBUF != 0),
            tx_used: UsedBatch::new(&tx),
            tx,
            frame: GuestBuffers::new(memory.clone()),
            memory,
            interrupt,
            readable: false,
            starved: false,
            held: None,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        if let Some(mmds) = &mut self.mmds {
            mmds.network.reset();
        }
        if let Some(events) = &self.events {
            self.unwatch(events);
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        let Some(active) = &self.active else { return Vec::new() };
        vec![active.rx.state(), active.tx.state()]
    }

    /// Buffers taken ahead go back to the ring, so that the queues are as the driver knows them; a frame
    /// that the limiter holds is lost, as on a wire.
    fn pause(&mut self) {
        self.paused = true;
        if let Some(active) = &mut self.active {
            active.held = None;
            active.rx.put_back();
        }
    }

    fn resume(&mut self) {
        self.paused = false;
        let _ = self.resume.write(1);
    }
}

impl Net {
    fn watch(&self, events: &Events) -> io::Result<()> {
        self.unwatch(events);
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.rx_limiter.register(events, RX_LIMITER)?;
        self.tx_limiter.register(events, TX_LIMITER)?;
        events.add(&self.resume, CONTINUE, edge)?;
        if let Some(mmds) = &self.mmds {
            events.add(&mmds.timer, MMDS_TIMER, edge)?;
        }
        if !self.dead {
            events.add(&self.tap, TAP, edge)?;
        }
        Ok(())
    }

    fn unwatch(&self, events: &Events) {
        self.rx_limiter.unregister(events);
        self.tx_limiter.unregister(events);
        events.remove(&self.resume);
        events.remove(&self.tap);
        if let Some(mmds) = &self.mmds {
            events.remove(&mmds.timer);
        }
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
