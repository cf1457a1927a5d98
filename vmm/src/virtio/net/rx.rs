//! The receive queue: frames for the guest, read straight into the buffers it offers.
//!
//! Buffers are taken from the ring ahead of the frame they are for, enough for the largest one, and stay
//! taken until one comes. A frame that fills several is given to the driver whole.

use std::collections::VecDeque;
use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use super::tap::HEADER_SIZE;
use crate::memory::Memory;
use crate::virtio::buffers::{BadChain, BrokenDriver, Direction, GuestBuffers};
use crate::virtio::used::UsedBatch;

/// Largest frame a tap gives, with its header, when it may give it unsegmented (virtio 1.2, 5.1.6.3.1).
pub const MAX_FRAME: usize = 65562;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

/// See the module's text.
pub struct RxQueue {
    queue: Queue,
    memory: Arc<Memory>,
    used: UsedBatch,
    /// Whether one frame may fill several buffers.
    mergeable: bool,
    /// Taken chains: head and room in bytes.
    taken: VecDeque<(u16, u32)>,
    places: GuestBuffers,
}

impl RxQueue {
    /// Takes over `queue`.
    pub fn new(queue: Queue, memory: Arc<Memory>, mergeable: bool) -> Self {
        let used = UsedBatch::new(&queue);
        let places = GuestBuffers::new(memory.clone());
        Self { queue, memory, used, mergeable, taken: VecDeque::new(), places }
    }

    /// Takes buffers until the largest frame fits. `None`: there are too few, and the driver will notify
    /// when it offers more.
    pub fn places(&mut self) -> Result<Option<&GuestBuffers>, BrokenDriver> {
        loop {
            if self.take()? || self.enough() {
                return Ok(Some(&self.places));
            }
            // What is used has to be seen before more can be expected.
            self.publish()?;
            if !self.queue.enable_notification(&*self.memory)? {
                return Ok(None);
            }
        }
    }

    /// Takes what there is and is needed; true if no more can be taken at a time, so that what is taken has
    /// to do.
    fn take(&mut self) -> Result<bool, BrokenDriver> {
        let most = if self.mergeable { usize::from(self.queue.size()) } else { 1 };
        while self.taken.len() < most && self.places.len() < MAX_FRAME {
            let Some(chain) = self.queue.iter(&*self.memory)?.next() else { break };
            let head = chain.head_index();
            match self.places.push_chain(chain, Direction::Write) {
                Ok(len) if len >= HEADER_SIZE => self.taken.push_back((head, len as u32)),
                Ok(len) => return Err(BrokenDriver::TooShort(len)),
                Err(BadChain::TooManyPieces) if !self.taken.is_empty() => {
                    self.queue.go_to_previous_position();
                    return Ok(true);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(false)
    }

    fn enough(&self) -> bool {
        if self.mergeable {
            // A driver with a queue so small that the largest frame never fits gets what fits.
            self.places.len() >= MAX_FRAME || self.taken.len() >= usize::from(self.queue.size()).div_ceil(2)
        } else {
            !self.taken.is_empty()
        }
    }

    /// The frame in the places taken is `len` bytes long, header included: gives its buffers back.
    pub fn finish(&mut self, len: usize) -> Result<(), BrokenDriver> {
        let len = len.min(self.places.len());
        let (mut count, mut covered) = (0u16, 0);
        for (_, room) in &self.taken {
            count += 1;
            covered += *room as usize;
            if covered >= len {
                break;
            }
        }
        self.places.write_at(NUM_BUFFERS, &count.to_le_bytes());
        let mut left = len;
        for (head, room) in self.taken.drain(..usize::from(count)) {
            let part = left.min(room as usize);
            self.used.add(&self.queue, &self.memory, head, part as u32)?;
            left -= part;
        }
        self.places.skip(covered);
        Ok(())
    }

    /// The queue as it stands, with nothing taken ahead.
    pub fn state(&self) -> QueueState {
        debug_assert!(self.taken.is_empty());
        self.queue.state()
    }

    /// Shows the driver all frames finished.
    pub fn publish(&mut self) -> Result<(), BrokenDriver> {
        Ok(self.used.publish(&mut self.queue, &self.memory)?)
    }

    /// Whether the driver wants an interrupt for what it was shown since the last call.
    pub fn needs_interrupt(&mut self) -> Result<bool, BrokenDriver> {
        Ok(self.used.needs_interrupt(&self.queue, &self.memory)?)
    }

    /// Tells the driver that notifications are not needed, where it can be told.
    pub fn wait_for_nothing(&mut self) -> Result<(), BrokenDriver> {
        Ok(self.queue.disable_notification(&*self.memory)?)
    }

    /// Gives buffers taken ahead back to the ring, as if they had never been taken.
    pub fn put_back(&mut self) {
        for _ in self.taken.drain(..) {
            self.queue.go_to_previous_position();
        }
        self.places.clear();
    }
}
