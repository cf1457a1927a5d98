//! The receive queue: buffers the driver offers for packets to the guest, filled in order.
//!
//! Chains are taken from the ring before it is known whether there is something for them; those left
//! over go back. Several chains taken together receive one read from a socket.

use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};

use super::packet::{HEADER_SIZE, Header};
use crate::memory::Memory;
use crate::virtio::buffers::{BrokenDriver, Direction, GuestBuffers};

/// The queue and the chains taken from it.
pub struct RxRing {
    queue: Queue,
    memory: Arc<Memory>,
    /// Taken chains, in ring order: head and room for payload in bytes.
    taken: Vec<(u16, usize)>,
    /// The headers' places of all taken chains, [`HEADER_SIZE`] bytes each.
    headers: GuestBuffers,
    /// The payloads' places of all taken chains.
    payload: GuestBuffers,
    /// Where a chain is taken apart.
    scratch: GuestBuffers,
    used: bool,
}

impl RxRing {
    /// Takes over `queue`, whose buffers lie in `memory`.
    pub fn new(queue: Queue, memory: Arc<Memory>) -> Self {
        let empty = || GuestBuffers::new(memory.clone());
        Self {
            queue,
            taken: Vec::new(),
            headers: empty(),
            payload: empty(),
            scratch: empty(),
            memory,
            used: false,
        }
    }

    /// Makes sure `chains` are taken, and returns how many are: fewer when the driver offers no more.
    pub fn take(&mut self, chains: usize) -> Result<usize, BrokenDriver> {
        while self.taken.len() < chains {
            let Some(chain) = self.queue.iter(&*self.memory)?.next() else { break };
            let head = chain.head_index();
            self.scratch.clear();
            let len = self.scratch.push_chain(chain, Direction::Write)?;
            let room = match len.checked_sub(HEADER_SIZE) {
                Some(room) if room > 0 => room,
                _ => return Err(BrokenDriver::TooShort(len)),
            };
            if !self.scratch.move_front(&mut self.headers, HEADER_SIZE) {
                self.queue.go_to_previous_position();
                break;
            }
            if !self.scratch.move_front(&mut self.payload, room) {
                // Cut into so many pieces that it does not fit beside the others.
                self.headers.truncate(self.taken.len() * HEADER_SIZE);
                self.queue.go_to_previous_position();
                break;
            }
            self.taken.push((head, room));
        }
        Ok(self.taken.len())
    }

    /// The payloads' places of the taken chains, at most `max` bytes of them: what is beyond goes back.
    pub fn payload(&mut self, max: usize) -> &GuestBuffers {
        let mut end = 0;
        let needed = self.taken.iter().take_while(|(_, room)| {
            let more = end < max;
            end += room;
            more
        });
        let needed = needed.count();
        self.put_back_from(needed);
        if let Some((_, room)) = self.taken.last_mut() {
            *room -= self.payload.len().saturating_sub(max);
        }
        self.payload.truncate(max);
        &self.payload
    }

    /// Sends a packet without payload in the first taken chain.
    pub fn send(&mut self, header: Header) -> Result<(), BrokenDriver> {
        self.send_front(header, 0)
    }

    /// Sends `len` bytes that lie in the payloads' places, as packets headed like `header`.
    pub fn send_data(&mut self, mut header: Header, mut len: usize) -> Result<(), BrokenDriver> {
        while len > 0 && !self.taken.is_empty() {
            let part = self.taken[0].1.min(len);
            // A chain is less than 4 GiB.
            header.len = part as u32;
            self.send_front(header, part)?;
            len -= part;
        }
        Ok(())
    }

    fn send_front(&mut self, header: Header, payload: usize) -> Result<(), BrokenDriver> {
        if self.taken.is_empty() {
            return Ok(());
        }
        let (head, room) = self.taken.remove(0);
        self.headers.write_at(0, &header.to_bytes());
        self.headers.skip(HEADER_SIZE);
        self.payload.skip(room);
        self.add_used(head, (HEADER_SIZE + payload) as u32)
    }

    fn add_used(&mut self, head: u16, len: u32) -> Result<(), BrokenDriver> {
        self.used = true;
        Ok(self.queue.add_used(&*self.memory, head, len)?)
    }

    /// The queue as it stands, with nothing taken ahead.
    pub fn state(&self) -> QueueState {
        debug_assert!(self.taken.is_empty());
        self.queue.state()
    }

    /// Gives all taken chains back to the ring, as if they had never been taken.
    pub fn put_back(&mut self) {
        self.put_back_from(0);
    }

    fn put_back_from(&mut self, first: usize) {
        for _ in first..self.taken.len() {
            self.queue.go_to_previous_position();
        }
        self.taken.truncate(first);
        self.headers.truncate(first * HEADER_SIZE);
        self.payload.truncate(self.taken.iter().map(|(_, room)| room).sum());
    }

    /// Asks to be notified when the driver offers more; true if it already has.
    pub fn wait_for_more(&mut self) -> Result<bool, BrokenDriver> {
        Ok(self.queue.enable_notification(&*self.memory)?)
    }

    /// No notifications: nothing is waiting for buffers.
    pub fn wait_for_nothing(&mut self) -> Result<(), BrokenDriver> {
        Ok(self.queue.disable_notification(&*self.memory)?)
    }

    /// Whether the driver wants an interrupt for what was sent since the last call.
    pub fn needs_interrupt(&mut self) -> Result<bool, BrokenDriver> {
        Ok(std::mem::take(&mut self.used) && self.queue.needs_notification(&*self.memory)?)
    }
}
