//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): the registers through which a driver
//! finds a device, agrees on features, places its queues and starts it.
//!
//! Registers are a page that always has their present values, which the guest reads by itself (see
//! [`registers`](super::registers)). Writes come from vCPU threads, at any offset and width; those the
//! specification does not know write nowhere. Queue notifications do not come through here: KVM turns a
//! write to `QueueNotify` into a signal on the queue's event descriptor (ioeventfd).
//!
//! ```text
//!  RESET ──ACKNOWLEDGE──▶ ──DRIVER──▶ ──FEATURES_OK──▶ (queues placed) ──DRIVER_OK──▶ ACTIVE
//!    ▲                                                                                  │
//!    └──────────────────── write 0 to Status, from anywhere ────────────────────────────┘
//! ```
//! A driver that skips a step is not believed: the write is ignored, as is everything it sets while it
//! must not. A queue that lies outside memory, or a device that cannot start, sets `DEVICE_NEEDS_RESET`.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use log::warn;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::registers::Registers;
use super::state::{RestoreError, SavedQueue, TransportState};
use super::{Activation, F_RING_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice};
use crate::bus::BusDevice;
use crate::event_loop::{EventLoop, EventSet, Events, Subscriber, lock};
use crate::memory::Memory;

/// Bytes of address space of one device.
pub const WINDOW: u64 = 0x1000;
/// Offset of the register whose writes notify a queue (32 bits wide, value: queue index).
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x554c_5550; // "PULU"
/// Bytes of a configuration space at most: more than any device here has.
const CONFIG_SPACE_MAX: usize = 0x100;

/// Offset of the register that says what interrupts were for.
pub const INTERRUPT_STATUS: u64 = 0x60;
/// Offset of the register whose writes clear bits of [`INTERRUPT_STATUS`].
pub const INTERRUPT_ACK: u64 = 0x64;
/// Offset of the device's status.
pub(super) const STATUS: u64 = 0x70;
/// Bit of the status: the driver has to reset the device.
pub(super) const NEEDS_RESET: u32 = status::NEEDS_RESET;
/// Offset of a number that changes with the configuration space.
pub(super) const CONFIG_GENERATION: u64 = 0xfc;
/// Offset of the configuration space.
pub(super) const CONFIG_SPACE: u64 = 0x100;

mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// The steps a driver goes through, each the status bits that must be set exactly then.
const STEPS: [u32; 5] = {
    use status::*;
    [
        0,
        ACKNOWLEDGE,
        ACKNOWLEDGE | DRIVER,
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ]
};

/// One device behind its registers.
pub struct MmioTransport {
    state: Mutex<State>,
    /// Kept open: the event loop forgets a descriptor that is closed.
    notifiers: Vec<EventFd>,
}

struct State {
    device: Arc<Mutex<dyn VirtioDevice>>,
    device_type: u32,
    memory: Arc<Memory>,
    interrupt: Interrupt,
    queues: Vec<Queue>,
    driver_features: u64,
    feature_page: u32,
    driver_feature_page: u32,
    queue_select: u32,
    status: u32,
    active: bool,
}

/// The event-loop side of a device whose concrete type the transport does not know.
struct Forward(Arc<Mutex<dyn VirtioDevice>>);

impl Subscriber for Forward {
    fn process(&mut self, token: u32, events: EventSet) {
        lock(&self.0).process(token, events);
    }
}

impl MmioTransport {
    /// Puts `device` behind registers, with one notification descriptor per queue added to `event_loop`
    /// under the queue's index as token. The caller binds [`MmioTransport::notifiers`] to
    /// [`QUEUE_NOTIFY`].
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: Arc<Memory>,
        interrupt: Interrupt,
        event_loop: &mut EventLoop,
    ) -> std::io::Result<Self> {
        let events: Events = event_loop.subscribe(Arc::new(Mutex::new(Forward(device.clone()))));
        let (device_type, queues, notifiers) = {
            let mut device = lock(&device);
            device.attach(events.clone());
            let mut queues = Vec::new();
            let mut notifiers = Vec::new();
            for (index, size) in device.queue_sizes().iter().enumerate() {
                queues.push(Queue::new(*size).map_err(std::io::Error::other)?);
                let notifier = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
                // Edge-triggered, so that the device need not read the counter: every write is an edge.
                events.add(&notifier, index as u32, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
                notifiers.push(notifier);
            }
            (device.device_type(), queues, notifiers)
        };
        let state = State {
            device,
            device_type,
            memory,
            interrupt,
            queues,
            driver_features: 0,
            feature_page: 0,
            driver_feature_page: 0,
            queue_select: 0,
            status: 0,
            active: false,
        };
        for (offset, value) in [(0x00, MAGIC), (0x04, VERSION), (0x08, device_type), (0x0c, VENDOR)] {
            state.registers().set(offset, value);
        }
        state.show();
        state.show_config_space();
        Ok(Self { state: Mutex::new(state), notifiers })
    }

    /// What it and its device consist of. Called only while the device is paused and no vCPU runs.
    pub fn save(&self) -> TransportState {
        let state = lock(&self.state);
        let working = lock(&state.device).queues();
        TransportState {
            device_type: state.device_type,
            driver_features: state.driver_features,
            feature_page: state.feature_page,
            driver_feature_page: state.driver_feature_page,
            queue_select: state.queue_select,
            status: state.status,
            active: state.active,
            needs_reset: state.interrupt.is_broken(),
            interrupt_status: state.interrupt.pending(),
            config_generation: state.registers().at(CONFIG_GENERATION).load(Ordering::SeqCst),
            queues: state.queues.iter().map(|queue| queue.state().into()).collect(),
            working: working.into_iter().map(SavedQueue::from).collect(),
        }
    }

    /// Puts a transport and a device that are as they were made into the state that others like them had. The
    /// device begins to work when it is resumed.
    pub fn restore(&self, saved: &TransportState) -> Result<(), RestoreError> {
        let mut state = lock(&self.state);
        if saved.device_type != state.device_type {
            return Err(RestoreError::Type { found: state.device_type, wanted: saved.device_type });
        }
        let sizes = |queues: &[SavedQueue]| queues.iter().map(SavedQueue::max_size).collect::<Vec<_>>();
        if sizes(&saved.queues) != state.queues.iter().map(QueueT::max_size).collect::<Vec<_>>()
            || saved.working.len() > saved.queues.len()
        {
            return Err(RestoreError::Queues);
        }
        let missing = saved.driver_features & !state.features();
        if missing != 0 {
            return Err(RestoreError::Features(missing));
        }
        let queues = |saved: &[SavedQueue]| saved.iter().map(|q| q.to_queue()).collect::<Result<Vec<_>, _>>();
        state.queues = queues(&saved.queues)?;
        state.driver_features = saved.driver_features;
        state.feature_page = saved.feature_page;
        state.driver_feature_page = saved.driver_feature_page;
        state.queue_select = saved.queue_select;
        state.status = saved.status;
        state.registers().at(CONFIG_GENERATION).store(saved.config_generation, Ordering::SeqCst);
        lock(&state.device).pause();
        if saved.needs_reset {
            state.interrupt.needs_reset();
        } else if saved.active && !saved.working.is_empty() {
            let queues = queues(&saved.working)?;
            if queues.iter().any(|queue| queue.ready() && !queue.is_valid(&*state.memory)) {
                return Err(RestoreError::Queue(virtio_queue::Error::InvalidSize));
            }
            let activation = Activation {
                memory: state.memory.clone(),
                queues,
                features: saved.driver_features,
                interrupt: state.interrupt.clone(),
            };
            lock(&state.device).activate(activation)?;
            state.active = true;
        }
        state.show();
        state.show_config_space();
        state.interrupt.set_pending(saved.interrupt_status);
        Ok(())
    }

    /// Interrupts the guest once more for what it may not have heard of. Called once interrupts arrive again.
    pub fn interrupt_again(&self) {
        lock(&self.state).interrupt.raise_again();
    }

    /// The queues' notification descriptors, by index.
    pub fn notifiers(&self) -> &[EventFd] {
        &self.notifiers
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        // Those noted and not done yet.
        state.interrupt.acknowledge(0);
        state.registers().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        if offset >= CONFIG_SPACE {
            lock(&state.device).write_config(offset - CONFIG_SPACE, data);
            state.show_config_space();
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            let was_active = state.active;
            state.write_register(offset, u32::from_le_bytes(word));
            state.show();
            if state.active && !was_active {
                // A driver may notify before DRIVER_OK (Linux's balloon does): what the device could not
                // see then, it looks at now.
                self.notifiers.iter().for_each(|n| drop(n.write(1)));
            }
        }
    }
}

impl State {
    fn features(&self) -> u64 {
        lock(&self.device).features() | F_VERSION_1
    }

    fn registers(&self) -> &Registers {
        self.interrupt.registers()
    }

    /// Puts into the registers what depends on the driver's writes.
    fn show(&self) {
        let queue = self.queues.get(self.queue_select as usize);
        let registers = self.registers();
        registers.set(0x10, page(self.features(), self.feature_page));
        registers.set(0x34, queue.map_or(0, |q| q.max_size().into()));
        registers.set(0x44, queue.is_some_and(|q| q.ready()).into());
        registers.set(STATUS, self.status);
        // In this order: a device that breaks meanwhile sets the bit itself, after what is looked at here.
        if self.interrupt.is_broken() {
            registers.at(STATUS).fetch_or(NEEDS_RESET, Ordering::SeqCst);
        }
    }

    /// Puts the configuration space where the driver reads it.
    fn show_config_space(&self) {
        let mut space = [0; CONFIG_SPACE_MAX];
        // Devices tell of changes under their own lock.
        let device = lock(&self.device);
        device.read_config(0, &mut space);
        self.registers().write(CONFIG_SPACE, &space);
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.feature_page = value,
            0x20 => self.acknowledge_features(value),
            0x24 => self.driver_feature_page = value,
            0x30 => self.queue_select = value,
            0x38 => self.with_queue(|q| {
                if let Ok(size) = u16::try_from(value) {
                    q.set_size(size);
                }
            }),
            0x44 => self.with_queue(|q| q.set_ready(value == 1)),
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            STATUS => {
                self.set_status(value);
                self.show_config_space();
            }
            0x80 => self.with_queue(|q| q.set_desc_table_address(Some(value), None)),
            0x84 => self.with_queue(|q| q.set_desc_table_address(None, Some(value))),
            0x90 => self.with_queue(|q| q.set_avail_ring_address(Some(value), None)),
            0x94 => self.with_queue(|q| q.set_avail_ring_address(None, Some(value))),
            0xa0 => self.with_queue(|q| q.set_used_ring_address(Some(value), None)),
            0xa4 => self.with_queue(|q| q.set_used_ring_address(None, Some(value))),
            _ => {}
        }
    }

    /// Features are accepted in the `DRIVER` step only, and only those offered.
    fn acknowledge_features(&mut self, value: u32) {
        if self.status == STEPS[2] && self.driver_feature_page < 2 {
            let shift = 32 * self.driver_feature_page;
            let bits = u64::from(value) << shift;
            self.driver_features &= !(u64::from(u32::MAX) << shift);
            self.driver_features |= bits & self.features();
        }
    }

    /// Queues are placed after `FEATURES_OK` and before `DRIVER_OK`.
    fn with_queue(&mut self, change: impl FnOnce(&mut Queue)) {
        if self.status == STEPS[3]
            && let Some(queue) = self.queues.get_mut(self.queue_select as usize)
        {
            change(queue);
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if value & status::FAILED != 0 {
            warn!("virtio device type {}: the driver gave up", self.device_type);
            self.status |= status::FAILED;
            return;
        }
        let step = STEPS.iter().position(|s| *s == self.status);
        if step.and_then(|s| STEPS.get(s + 1)) != Some(&value) {
            return;
        }
        // Without VERSION_1 this would be a legacy driver: FEATURES_OK then stays unset, as 2.2.2 asks.
        if value == STEPS[3] && self.driver_features & F_VERSION_1 == 0 {
            return;
        }
        self.status = value;
        if value & status::DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & F_RING_EVENT_IDX != 0;
        for queue in &mut self.queues {
            queue.set_event_idx(event_idx);
            if queue.ready() && !queue.is_valid(&*self.memory) {
                return self.interrupt.needs_reset();
            }
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues: std::mem::take(&mut self.queues),
            features: self.driver_features,
            interrupt: self.interrupt.clone(),
        };
        // Readable again as registers, though the device has the working ones.
        self.queues = activation.queues.iter().map(copy_of).collect();
        match lock(&self.device).activate(activation) {
            Ok(()) => self.active = true,
            Err(e) => {
                warn!("virtio device type {}: {e}", self.device_type);
                self.interrupt.needs_reset();
            }
        }
    }

    fn reset(&mut self) {
        if self.active {
            lock(&self.device).reset();
            self.active = false;
        }
        for queue in &mut self.queues {
            queue.reset();
        }
        self.status = 0;
        self.driver_features = 0;
        self.feature_page = 0;
        self.driver_feature_page = 0;
        self.queue_select = 0;
        self.interrupt.clear();
    }
}

fn copy_of(queue: &Queue) -> Queue {
    // A queue's own state always makes a queue again.
    Queue::try_from(queue.state()).unwrap_or_default()
}

fn page(features: u64, page: u32) -> u32 {
    match page {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
