//! The driver's side of a device, for tests: queues in memory that a test fills as a guest would, well or
//! maliciously.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, F_RING_EVENT_IDX, Interrupt};
use crate::memory::Memory;

/// Bytes of memory of a test's guest; rings lie at the end.
pub const MEMORY_SIZE: u64 = 16 << 20;
const RINGS: u64 = MEMORY_SIZE - (1 << 20);
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One buffer of a chain: address, length, and whether the device may write it.
pub type Buffer = (u64, u32, bool);

/// One queue as the driver sees it.
pub struct DriverQueue {
    memory: Arc<Memory>,
    base: u64,
    size: u16,
    next_descriptor: u16,
    avail_idx: u16,
    used_idx: u16,
}

/// A guest without CPUs: memory, queues, and the interrupt's descriptor.
pub struct Driver {
    pub memory: Arc<Memory>,
    pub queues: Vec<DriverQueue>,
    pub interrupt: Interrupt,
}

impl Driver {
    pub fn new(queue_sizes: &[u16]) -> Self {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE as usize)]).unwrap());
        let queues = (0..)
            .zip(queue_sizes)
            .map(|(index, size)| DriverQueue {
                memory: memory.clone(),
                base: RINGS + index * 0x1_0000,
                size: *size,
                next_descriptor: 0,
                avail_idx: 0,
                used_idx: 0,
            })
            .collect();
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        Self { memory, queues, interrupt }
    }

    /// What a device is activated with, for queues that have not been used yet.
    pub fn activation(&self, features: u64) -> Activation {
        let event_idx = features & F_RING_EVENT_IDX != 0;
        let queues = self.queues.iter().map(|q| q.device_queue(event_idx)).collect();
        Activation { memory: self.memory.clone(), queues, features, interrupt: self.interrupt.clone() }
    }

    /// Whether an interrupt came since the last call.
    pub fn interrupted(&self) -> bool {
        self.interrupt.irqfd().read().is_ok()
    }

    pub fn broken(&self) -> bool {
        self.interrupt.is_broken()
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

impl DriverQueue {
    fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// Where a test may put indirect tables.
    pub fn scratch(&self) -> u64 {
        self.base + 0x8000
    }

    fn device_queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used() as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        queue
    }

    /// Writes one raw descriptor.
    pub fn descriptor(&mut self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(&self.memory, self.base + 16 * u64::from(index), address, len, flags, next);
    }

    /// Makes the chain that starts at `head` available.
    pub fn publish(&mut self, head: u16) {
        let slot = self.avail() + 4 + 2 * u64::from(self.avail_idx % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index to anything.
    pub fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.memory.write_obj(index, GuestAddress(self.avail() + 2)).unwrap();
    }

    /// Offers a chain of `buffers` from fresh descriptors (they are used round and round) and returns
    /// its head.
    pub fn offer(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor % self.size;
        for (i, (address, len, writable)) in buffers.iter().enumerate() {
            let index = self.next_descriptor % self.size;
            self.next_descriptor = (index + 1) % self.size;
            let more = i + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if *writable { WRITE } else { 0 };
            self.descriptor(index, *address, *len, flags, if more { self.next_descriptor } else { 0 });
        }
        self.publish(head);
        head
    }

    /// Offers `buffers` through an indirect table at [`Self::scratch`].
    pub fn offer_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let table = self.scratch();
        for (i, (address, len, writable)) in (0u16..).zip(buffers) {
            let more = usize::from(i) + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if *writable { WRITE } else { 0 };
            write_descriptor(&self.memory, table + 16 * u64::from(i), *address, *len, flags, i + 1);
        }
        let head = self.next_descriptor % self.size;
        self.next_descriptor = (head + 1) % self.size;
        self.descriptor(head, table, 16 * buffers.len() as u32, INDIRECT, 0);
        self.publish(head);
        head
    }

    /// The next used chain: its head and the bytes written.
    pub fn used_chain(&mut self) -> Option<(u16, u32)> {
        let idx: u16 = self.memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if idx == self.used_idx {
            return None;
        }
        let element = self.used() + 4 + 8 * u64::from(self.used_idx % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        self.used_idx = self.used_idx.wrapping_add(1);
        // Interrupt again for the next one, as a driver that saw everything asks with event index.
        self.memory
            .write_obj(self.used_idx, GuestAddress(self.avail() + 4 + 2 * u64::from(self.size)))
            .unwrap();
        Some((head as u16, len))
    }

    /// Forgets everything, as a driver that starts anew.
    pub fn restart(&mut self) {
        for address in [self.avail(), self.used()] {
            self.memory.write_obj(0u32, GuestAddress(address)).unwrap();
        }
        (self.next_descriptor, self.avail_idx, self.used_idx) = (0, 0, 0);
    }
}

fn write_descriptor(memory: &Memory, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}
