//! Giving used chains back in batches: the driver sees all of a batch at once, or none.
//!
//! A packet that fills several receive buffers must appear whole (virtio 1.2, 5.1.6.4), and one
//! publication and one interrupt for many chains is less work on both sides. `virtio-queue` publishes every
//! chain by itself, so a queue that works in batches gives back through this type only, and asks it, not the
//! queue, whether the driver wants an interrupt.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6): the driver polls.
const NO_INTERRUPT: u16 = 1;

/// The chains of one queue that are used and not published yet.
#[derive(Debug, Default)]
pub struct UsedBatch {
    waiting: u16,
    /// The queue's `next_used` when the driver's wish for an interrupt was last looked at.
    looked_at: u16,
}

fn at(base: u64, offset: u64) -> Result<GuestAddress, Error> {
    base.checked_add(offset).map(GuestAddress).ok_or(Error::AddressOverflow)
}

impl UsedBatch {
    /// For a `queue` that goes on from where it is.
    pub fn new(queue: &Queue) -> Self {
        Self { waiting: 0, looked_at: queue.next_used() }
    }

    /// Adds the chain that starts at `head`, into which `len` bytes were written.
    pub fn add(&mut self, queue: &Queue, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        if head >= queue.size() {
            return Err(Error::InvalidDescriptorIndex);
        }
        let slot = queue.next_used().wrapping_add(self.waiting) % queue.size();
        let element = u64::from(head) | u64::from(len) << 32;
        let address = at(queue.used_ring(), 4 + 8 * u64::from(slot))?;
        memory.write_obj(element.to_le(), address).map_err(Error::GuestMemory)?;
        self.waiting += 1;
        Ok(())
    }

    /// Chains added since the last publication.
    pub fn waiting(&self) -> u16 {
        self.waiting
    }

    /// Shows the driver everything added.
    pub fn publish(&mut self, queue: &mut Queue, memory: &Memory) -> Result<(), Error> {
        if self.waiting == 0 {
            return Ok(());
        }
        let next = queue.next_used().wrapping_add(std::mem::take(&mut self.waiting));
        queue.set_next_used(next);
        let address = at(queue.used_ring(), 2)?;
        memory.store(next.to_le(), address, Ordering::Release).map_err(Error::GuestMemory)
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    pub fn needs_interrupt(&mut self, queue: &Queue, memory: &Memory) -> Result<bool, Error> {
        let (new, old) = (Wrapping(queue.next_used()), Wrapping(self.looked_at));
        if new == old {
            return Ok(false);
        }
        self.looked_at = new.0;
        // The driver writes its wish, then looks for used chains; here it is the other way round.
        fence(Ordering::SeqCst);
        let load = |offset| -> Result<u16, Error> {
            let address = at(queue.avail_ring(), offset)?;
            memory.load(address, Ordering::Relaxed).map(u16::from_le).map_err(Error::GuestMemory)
        };
        if queue.event_idx_enabled() {
            // Virtio 1.2, 2.7.10: was the driver's index passed?
            let event = Wrapping(load(4 + 2 * u64::from(queue.size()))?);
            Ok(new - event - Wrapping(1) < new - old)
        } else {
            Ok(load(0)? & NO_INTERRUPT == 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::F_RING_EVENT_IDX;
    use crate::virtio::testing::Driver;

    #[test]
    fn a_batch_appears_at_once_and_rings_wrap() {
        let mut driver = Driver::new(&[4]);
        let mut queue = driver.activation(F_RING_EVENT_IDX).queues.remove(0);
        let memory = driver.memory.clone();
        let mut used = UsedBatch::new(&queue);
        for round in 0..20_000u32 {
            for i in 0..3 {
                used.add(&queue, &memory, i, round).unwrap();
                assert_eq!(driver.queues[0].used_chain(), None);
            }
            assert_eq!(used.waiting(), 3);
            used.publish(&mut queue, &memory).unwrap();
            assert!(used.needs_interrupt(&queue, &memory).unwrap());
            assert!(!used.needs_interrupt(&queue, &memory).unwrap());
            for i in 0..3 {
                assert_eq!(driver.queues[0].used_chain(), Some((i, round)));
            }
        }
        assert!(used.add(&queue, &memory, 4, 0).is_err());
    }

    #[test]
    fn interrupts_come_when_the_drivers_index_is_passed() {
        let driver = Driver::new(&[16]);
        let mut queue = driver.activation(F_RING_EVENT_IDX).queues.remove(0);
        let memory = driver.memory.clone();
        let mut used = UsedBatch::new(&queue);
        let event = GuestAddress(queue.avail_ring() + 4 + 2 * 16);
        let mut wants = |event_at: u16, count: u16| {
            memory.write_obj(event_at, event).unwrap();
            for _ in 0..count {
                used.add(&queue, &memory, 0, 0).unwrap();
            }
            used.publish(&mut queue, &memory).unwrap();
            used.needs_interrupt(&queue, &memory).unwrap()
        };
        assert!(wants(0, 1)); // now 1
        assert!(!wants(3, 2)); // now 3
        assert!(wants(3, 1)); // now 4
        assert!(wants(5, 5)); // now 9
        assert!(!wants(5, 5)); // now 14
        assert!(!wants(60_000, 5)); // now 19
    }

    #[test]
    fn without_event_index_a_flag_says_no() {
        let mut driver = Driver::new(&[16]);
        let mut queue = driver.activation(0).queues.remove(0);
        let memory = driver.memory.clone();
        let mut used = UsedBatch::new(&queue);
        for (flags, wanted) in [(0u16, true), (1, false), (0, true)] {
            driver.write(queue.avail_ring(), &flags.to_le_bytes());
            used.add(&queue, &memory, 0, 0).unwrap();
            used.publish(&mut queue, &memory).unwrap();
            assert_eq!(used.needs_interrupt(&queue, &memory).unwrap(), wanted);
            driver.queues[0].used_chain();
        }
    }
}
