//! Guest buffers as scatter-gather lists for the host's system calls: what a descriptor chain names,
//! translated and bounds-checked once, so that data moves between a file descriptor and guest memory
//! without a copy in between.
//!
//! The list never points outside guest memory. What lies there may change at any time, because the
//! guest's CPUs run: read a value once, check the copy, use the copy.

use std::ops::Deref;
use std::sync::Arc;

use libc::iovec;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

use crate::memory::Memory;

/// Most pieces in one list: what `readv`, `sendmsg` and their kin take (`IOV_MAX`).
pub const MAX_PIECES: usize = 1024;

/// A descriptor chain cannot be used. The guest wrote it, so this is no fault of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// A buffer lies (partly) outside guest memory.
    #[error("buffer of {len} bytes at {address:#x} is not in guest memory")]
    OutsideMemory {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// More pieces than a system call takes.
    #[error("more than {MAX_PIECES} buffers")]
    TooManyPieces,
    /// A buffer that should be readable by the device is writable, or the other way round.
    #[error("buffer has the wrong direction")]
    Direction,
}

/// Checks that `chain` has no more buffers than a list takes. No driver may make one longer than its queue
/// (virtio 1.2, 2.7.5.3.1), and walking one of the 65,535 descriptors an indirect table has room for takes time.
pub fn check_length<M>(chain: &DescriptorChain<M>) -> Result<(), BadChain>
where
    M: Deref + Clone,
    M::Target: vm_memory::GuestMemory,
{
    if chain.clone().nth(MAX_PIECES).is_some() { Err(BadChain::TooManyPieces) } else { Ok(()) }
}

/// The driver does what no working driver does: nothing it says can be believed any more.
#[derive(Debug, thiserror::Error)]
pub enum BrokenDriver {
    /// The ring's own structure is wrong.
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// A chain cannot be used at all.
    #[error("chain: {0}")]
    Chain(#[from] BadChain),
    /// A buffer without room for what must be in it, or a packet shorter than it says.
    #[error("chain of {0} bytes is too short")]
    TooShort(usize),
}

/// Which way the device uses a chain's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads them.
    Read,
    /// The device writes them.
    Write,
}

/// A list of pieces of guest memory. Reused from request to request so that it allocates only once.
pub struct GuestBuffers {
    memory: Arc<Memory>,
    /// Those before `first` are used up.
    pieces: Vec<iovec>,
    first: usize,
    len: usize,
}

// SAFETY: the pointers in `pieces` point into `memory`, which the value keeps alive and which may be used
// from any thread.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// An empty list of pieces of `memory`.
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { memory, pieces: Vec::new(), first: 0, len: 0 }
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.first = 0;
        self.len = 0;
    }

    /// Total length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces, for a system call. They stay in guest memory for as long as `self` lives.
    pub fn pieces(&self) -> &[iovec] {
        &self.pieces[self.first..]
    }

    /// Appends all buffers of `chain`, which must all have `direction`, and returns their bytes. On an
    /// error the list is as it was.
    pub fn push_chain<M>(
        &mut self,
        chain: DescriptorChain<M>,
        direction: Direction,
    ) -> Result<usize, BadChain>
    where
        M: Deref,
        M::Target: vm_memory::GuestMemory,
    {
        self.compact();
        let (pieces, before) = (self.pieces.len(), self.len);
        for (count, descriptor) in chain.enumerate() {
            // Also where the buffers are empty: a chain takes time to walk, whatever is in it.
            let pushed = match count {
                MAX_PIECES => Err(BadChain::TooManyPieces),
                _ => self.push_descriptor(descriptor, direction),
            };
            if let Err(e) = pushed {
                self.pieces.truncate(pieces);
                self.len = before;
                return Err(e);
            }
        }
        Ok(self.len - before)
    }

    /// Forgets pieces used up, before more are added: mostly all are, and then it costs nothing.
    fn compact(&mut self) {
        if self.first == self.pieces.len() || self.first > MAX_PIECES {
            self.pieces.drain(..self.first);
            self.first = 0;
        }
    }

    fn push_descriptor(&mut self, descriptor: Descriptor, direction: Direction) -> Result<(), BadChain> {
        if descriptor.is_write_only() != (direction == Direction::Write) {
            return Err(BadChain::Direction);
        }
        self.push(descriptor.addr(), descriptor.len())
    }

    /// Appends `len` bytes at `address`. On an error some of them may have been appended.
    pub fn push(&mut self, address: GuestAddress, len: u32) -> Result<(), BadChain> {
        let outside = BadChain::OutsideMemory { address: address.raw_value(), len };
        // A buffer may run over the border of two regions; it then becomes several pieces.
        for slice in GuestMemoryBackend::get_slices(&*self.memory, address, len as usize) {
            let slice = slice.map_err(|_| outside)?;
            if slice.is_empty() {
                continue;
            }
            if self.pieces().len() == MAX_PIECES {
                return Err(BadChain::TooManyPieces);
            }
            let base = slice.ptr_guard_mut().as_ptr().cast();
            self.pieces.push(iovec { iov_base: base, iov_len: slice.len() });
            // A chain holds less than 4 GiB and a list at most 1024 of them.
            self.len += slice.len();
        }
        Ok(())
    }

    /// What is left, from byte `offset` on, of the piece that holds that byte.
    pub fn piece_from(&self, offset: usize) -> Option<iovec> {
        let mut skip = offset;
        for piece in &self.pieces {
            if skip < piece.iov_len {
                let base = piece.iov_base.cast::<u8>().wrapping_add(skip).cast();
                return Some(iovec { iov_base: base, iov_len: piece.iov_len - skip });
            }
            skip -= piece.iov_len;
        }
        None
    }

    /// Moves the first `count` bytes to the end of `to`, which must be of the same memory. Moves nothing
    /// and returns false when there are fewer, or `to` has no room for more pieces.
    pub fn move_front(&mut self, to: &mut Self, count: usize) -> bool {
        let mut rest = count;
        let mut needed = 0;
        for piece in self.pieces() {
            if rest == 0 {
                break;
            }
            rest = rest.saturating_sub(piece.iov_len);
            needed += 1;
        }
        if rest > 0 || to.pieces().len() + needed > MAX_PIECES || !Arc::ptr_eq(&self.memory, &to.memory) {
            return false;
        }
        to.compact();
        let all = to.len + count;
        let moved = &self.pieces()[..needed];
        to.pieces.extend_from_slice(moved);
        to.len += moved.iter().map(|p| p.iov_len).sum::<usize>();
        to.truncate(all);
        self.skip(count);
        true
    }

    /// Drops the first `count` bytes.
    pub fn skip(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        let mut rest = count;
        for piece in &mut self.pieces[self.first..] {
            if rest < piece.iov_len {
                // SAFETY: `rest` is less than the piece's length.
                piece.iov_base = unsafe { piece.iov_base.byte_add(rest) };
                piece.iov_len -= rest;
                break;
            }
            rest -= piece.iov_len;
            self.first += 1;
        }
    }

    /// Drops what lies beyond the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.len = len;
        let mut rest = len;
        let mut kept = self.first;
        for piece in &mut self.pieces[self.first..] {
            if rest == 0 {
                break;
            }
            piece.iov_len = piece.iov_len.min(rest);
            rest -= piece.iov_len;
            kept += 1;
        }
        self.pieces.truncate(kept);
    }

    /// Copies up to `to.len()` bytes from `offset` on into `to`; returns how many there were.
    pub fn read_at(&self, offset: usize, to: &mut [u8]) -> usize {
        let len = to.len();
        self.each_part(offset, len, |guest, done, part| {
            // SAFETY: `guest` points to `part` bytes of guest memory, which `self` keeps alive, and
            // `done + part <= to.len()`. The guest may write at the same time: the copy then holds some
            // mixture of bytes, each of which is a valid `u8`.
            unsafe { std::ptr::copy_nonoverlapping(guest, to[done..].as_mut_ptr(), part) }
        })
    }

    /// Copies up to `from.len()` bytes to `offset` on; returns how many fitted.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> usize {
        self.each_part(offset, from.len(), |guest, done, part| {
            // SAFETY: as in `read_at`; guest memory is mapped writable, and no Rust reference to it exists.
            unsafe { std::ptr::copy_nonoverlapping(from[done..].as_ptr(), guest, part) }
        })
    }

    /// Calls `copy(guest pointer, bytes already copied, bytes to copy)` for each piece that `len` bytes
    /// from `offset` on touch.
    fn each_part(&self, offset: usize, len: usize, mut copy: impl FnMut(*mut u8, usize, usize)) -> usize {
        let mut skip = offset;
        let mut done = 0;
        for piece in self.pieces() {
            if done == len {
                break;
            }
            if skip >= piece.iov_len {
                skip -= piece.iov_len;
                continue;
            }
            let part = (piece.iov_len - skip).min(len - done);
            // SAFETY: `skip` is less than the piece's length.
            copy(unsafe { piece.iov_base.cast::<u8>().add(skip) }, done, part);
            skip = 0;
            done += part;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    /// Two adjacent regions of 64 KiB, then a hole.
    fn buffers() -> GuestBuffers {
        let ranges = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        GuestBuffers::new(Arc::new(Memory::from_ranges(&ranges).unwrap()))
    }

    fn fill(buffers: &GuestBuffers, address: u64, bytes: &[u8]) {
        buffers.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    #[test]
    fn pieces_follow_the_guest_addresses_over_region_borders() {
        let mut b = buffers();
        fill(&b, 0xfffe, b"abcd");
        fill(&b, 0x100, b"ef");
        b.push(GuestAddress(0xfffe), 4).unwrap();
        b.push(GuestAddress(0x100), 2).unwrap();
        assert_eq!((b.pieces().len(), b.len()), (3, 6));
        let mut got = [0; 8];
        assert_eq!(b.read_at(0, &mut got), 6);
        assert_eq!(&got[..6], b"abcdef");
        assert_eq!(b.read_at(5, &mut got), 1);
        assert_eq!(b.read_at(6, &mut got), 0);
        assert_eq!(b.write_at(1, b"XYZ"), 3);
        assert_eq!(b.read_at(0, &mut got), 6);
        assert_eq!(&got[..6], b"aXYZef");
    }

    #[test]
    fn skip_and_truncate_keep_the_middle() {
        let mut b = buffers();
        fill(&b, 0, b"abcdefghij");
        b.push(GuestAddress(0), 3).unwrap();
        b.push(GuestAddress(3), 3).unwrap();
        b.push(GuestAddress(6), 4).unwrap();
        b.skip(4);
        b.truncate(3);
        let mut got = [0; 3];
        assert_eq!((b.read_at(0, &mut got), b.len(), b.pieces().len()), (3, 3, 2));
        assert_eq!(&got, b"efg");
        b.truncate(2);
        assert_eq!(b.pieces().len(), 1);
        b.skip(100);
        assert!(b.is_empty() && b.pieces().is_empty());
    }

    #[test]
    fn the_front_moves_whole_or_not_at_all() {
        let (mut a, mut b) = (buffers(), buffers());
        b.memory = a.memory.clone();
        fill(&a, 0, b"abcdefgh");
        a.push(GuestAddress(0), 3).unwrap();
        a.push(GuestAddress(3), 5).unwrap();
        assert!(!a.move_front(&mut b, 9) && b.is_empty() && a.len() == 8);
        assert!(a.move_front(&mut b, 4));
        assert!(a.move_front(&mut b, 1));
        let mut got = [0; 8];
        assert_eq!((b.read_at(0, &mut got), &got[..5]), (5, &b"abcde"[..]));
        assert_eq!((a.read_at(0, &mut got), &got[..3]), (3, &b"fgh"[..]));
        let mut other = buffers();
        assert!(!a.move_front(&mut other, 1));
    }

    #[test]
    fn used_up_pieces_make_room_for_others() {
        let mut b = buffers();
        let mut driver = crate::virtio::testing::Driver::new(&[16]);
        b.memory = driver.memory.clone();
        let mut queue = driver.activation(0).queues.remove(0);
        for i in 0..3 * MAX_PIECES as u64 {
            driver.write(8 * i, &i.to_le_bytes());
            driver.queues[0].offer(&[(8 * i, 8, true)]);
            let chain = virtio_queue::QueueOwnedT::iter(&mut queue, &*driver.memory).unwrap().next().unwrap();
            assert_eq!(b.push_chain(chain, Direction::Write), Ok(8));
            if i >= 4 {
                let mut got = [0; 8];
                b.read_at(0, &mut got);
                assert_eq!(u64::from_le_bytes(got), i - 4);
                b.skip(8);
                assert_eq!(b.len(), 32);
            }
        }
        assert!(b.pieces.len() <= MAX_PIECES + 16);
    }

    #[test]
    fn chains_of_empty_buffers_are_bounded_too() {
        for (count, refused) in [(MAX_PIECES, false), (MAX_PIECES + 1, true)] {
            let mut b = buffers();
            let mut driver = crate::virtio::testing::Driver::new(&[16]);
            b.memory = driver.memory.clone();
            let mut queue = driver.activation(0).queues.remove(0);
            driver.queues[0].offer_indirect(&vec![(0x1000, 0, true); count]);
            let chain = virtio_queue::QueueOwnedT::iter(&mut queue, &*driver.memory).unwrap().next().unwrap();
            assert_eq!(check_length(&chain).is_err(), refused);
            assert_eq!(b.push_chain(chain, Direction::Write).is_err(), refused);
        }
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        let mut b = buffers();
        for (address, len) in
            [(0x20000, 1), (0x1ffff, 2), (u64::MAX, 1), (u64::MAX - 1, u32::MAX), (0, u32::MAX)]
        {
            assert_eq!(
                b.push(GuestAddress(address), len),
                Err(BadChain::OutsideMemory { address, len }),
                "{address:#x}"
            );
        }
    }
}
