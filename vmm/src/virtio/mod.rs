//! Virtio devices and the MMIO transport that carries them (virtio 1.2, sections 2 to 5).
//!
//! A device implements [`VirtioDevice`] and is driven from two sides, one at a time because a mutex
//! guards it: the *transport* on a vCPU thread (features, configuration space, activation, reset) and the
//! *event loop* (queue notifications and the device's own descriptors, through
//! [`Subscriber::process`]). Data moves only on the event loop.
//!
//! What a device must hold to:
//! * everything in the rings, the descriptors and the configuration space is written by a hostile guest:
//!   no panic, no unbounded loop, no unchecked arithmetic; a broken ring ends in
//!   [`Interrupt::needs_reset`], never in the death of the VMM;
//! * between `reset` and the next `activate` it touches no guest memory: whatever is in flight is waited
//!   for or thrown away in `reset`;
//! * a notification may come for nothing, and one notification may stand for many.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_queue::{Queue, QueueState};
use vmm_sys_util::eventfd::EventFd;

use crate::event_loop::{Events, Subscriber};
use crate::memory::Memory;
use registers::{Acknowledgements, Registers};

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod disk;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod registers;
pub mod rng;
pub mod state;
#[cfg(test)]
pub mod testing;
pub mod used;
pub mod vsock;

/// `VIRTIO_F_VERSION_1` (bit 32): offered by the transport for every device.
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_RING_F_INDIRECT_DESC` (bit 28).
pub const F_RING_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX` (bit 29): the transport sets it up on each queue when negotiated.
pub const F_RING_EVENT_IDX: u64 = 1 << 29;

/// Tokens below this are queue indices (the queue's notification arrived); a device uses the rest for
/// descriptors of its own.
pub const FIRST_DEVICE_TOKEN: u32 = 0x100;

/// Tells the guest that a device has something for it.
#[derive(Clone)]
pub struct Interrupt(Arc<InterruptInner>);

struct InterruptInner {
    irqfd: EventFd,
    /// The device's window, in which the interrupt's status is.
    registers: Arc<Registers>,
    acknowledgements: Arc<Acknowledgements>,
    needs_reset: AtomicBool,
}

const ISR_QUEUE: u32 = 1;
const ISR_CONFIG: u32 = 2;

impl Interrupt {
    /// An interrupt raised through `irqfd`, acknowledged through the transport only.
    pub fn new(irqfd: EventFd) -> Self {
        Self::acknowledged_by(irqfd, Arc::default())
    }

    /// An interrupt raised through `irqfd`, acknowledged through the transport or `acknowledgements`.
    pub fn acknowledged_by(irqfd: EventFd, acknowledgements: Arc<Acknowledgements>) -> Self {
        Self(Arc::new(InterruptInner {
            irqfd,
            registers: Registers::new().into(),
            acknowledgements,
            needs_reset: AtomicBool::new(false),
        }))
    }

    /// The registers of the device whose interrupt it is.
    pub fn registers(&self) -> &Arc<Registers> {
        &self.0.registers
    }

    fn raise(&self, bit: u32) {
        // What is acknowledged after this belongs to what the driver is told now.
        self.0.acknowledgements.take();
        self.status().fetch_or(bit, Ordering::SeqCst);
        // The counter only overflows after 2^64 - 2 unread interrupts, and KVM reads it at once.
        let _ = self.0.irqfd.write(1);
    }

    /// Used buffers are waiting. Ask the queue's `needs_notification` first.
    pub fn queue(&self) {
        self.raise(ISR_QUEUE);
    }

    /// The configuration space changed, and is `space` now.
    pub fn config(&self, space: &[u8]) {
        let generation = self.0.registers.at(mmio::CONFIG_GENERATION);
        // Before and after: a driver that read while it was written sees two numbers.
        generation.fetch_add(1, Ordering::SeqCst);
        self.0.registers.write(mmio::CONFIG_SPACE, space);
        generation.fetch_add(1, Ordering::SeqCst);
        self.raise(ISR_CONFIG);
    }

    /// The guest broke the device's protocol: `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1.2). The device must do
    /// nothing more until it is reset.
    pub fn needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::SeqCst);
        self.0.registers.at(mmio::STATUS).fetch_or(mmio::NEEDS_RESET, Ordering::SeqCst);
        self.raise(ISR_CONFIG);
    }

    fn status(&self) -> &AtomicU32 {
        self.0.registers.at(mmio::INTERRUPT_STATUS)
    }

    fn acknowledge(&self, bits: u32) {
        // Those that came before.
        self.0.acknowledgements.take();
        self.status().fetch_and(!bits, Ordering::SeqCst);
    }

    fn is_broken(&self) -> bool {
        self.0.needs_reset.load(Ordering::SeqCst)
    }

    /// What interrupts were for that the driver has not acknowledged.
    fn pending(&self) -> u32 {
        self.0.acknowledgements.take();
        self.status().load(Ordering::SeqCst)
    }

    /// What interrupts were for that the driver has not acknowledged, in a device put back into a state. None is
    /// raised.
    fn set_pending(&self, bits: u32) {
        self.status().store(bits, Ordering::SeqCst);
    }

    /// Raises again what the driver has not acknowledged: the interrupt itself may not have reached the guest.
    fn raise_again(&self) {
        let bits = self.pending();
        if bits != 0 {
            self.raise(bits);
        }
    }

    fn clear(&self) {
        self.0.acknowledgements.take();
        self.status().store(0, Ordering::SeqCst);
        self.0.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The descriptor KVM listens to, for registering it.
    pub fn irqfd(&self) -> &EventFd {
        &self.0.irqfd
    }
}

/// What a device gets when the driver has finished setting it up (`DRIVER_OK`).
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// The queues by index, valid and with event index set as negotiated. A queue the driver left
    /// unused is not `ready()`.
    pub queues: Vec<Queue>,
    /// Features the driver accepted, a subset of those offered.
    pub features: u64,
    /// To notify the driver.
    pub interrupt: Interrupt,
}

/// A device could not start; the driver sees `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue the device cannot do without is missing.
    #[error("driver left queue {0} unused")]
    QueueMissing(usize),
    /// Something of the host failed.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] std::io::Error),
}

/// A virtio device, without its transport. See the module's text for the rules.
pub trait VirtioDevice: Subscriber {
    /// Device type (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Features offered; the transport adds `VIRTIO_F_VERSION_1`. May change only while not active.
    fn features(&self) -> u64;

    /// Maximum size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Takes the handle to the event loop, once, before the VM starts. The queues' notification
    /// descriptors are added by the transport; a device adds its own on `activate` or later.
    fn attach(&mut self, events: Events);

    /// Reads configuration space. `data` arrives zeroed; what lies outside the space stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. Most devices have nothing writable and ignore it.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: start work.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops work so that the device and guest memory stand still: what is in flight is completed, and
    /// nothing is begun, whatever is notified, until `resume`. For devices that do nothing by themselves
    /// while vCPUs stand still and that may go on with a notification, doing nothing will do.
    fn pause(&mut self) {}

    /// Goes on after `pause`, with what was notified meanwhile too.
    fn resume(&mut self) {}

    /// Its queues by index as they stand: what an activation needs to go on from here. Empty if it is not active
    /// or has broken down. Called only while paused.
    fn queues(&self) -> Vec<QueueState>;

    /// Stop and forget the activation. Called only when active; when it returns, the device no longer
    /// touches guest memory.
    fn reset(&mut self);
}

/// Copies the part of a configuration `space` that a read of `data.len()` bytes at `offset` asks for.
pub fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    let Some(rest) = usize::try_from(offset).ok().and_then(|o| space.get(o..)) else { return };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
