//! Giving guest memory back to the host.

use std::io;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

use crate::memory::Memory;

/// Bytes in a page, of the balloon and of the host.
pub const PAGE: u64 = 4096;

/// Why a range was not given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// It is not (all) memory.
    #[error("{len} bytes at {start:#x} are not guest memory")]
    Outside { start: u64, len: u64 },
    /// The host refused.
    #[error("madvise: {0}")]
    Host(#[source] io::Error),
}

/// Gives the whole pages in `len` bytes from `start` on back to the host; what the guest finds there next is
/// zeroes, or what a file mapped there says. Returns how many bytes that were.
pub fn discard(memory: &Memory, start: u64, len: u64) -> Result<u64, DiscardError> {
    let outside = || DiscardError::Outside { start, len };
    let end = start.checked_add(len).ok_or_else(outside)? / PAGE * PAGE;
    let first = start.checked_next_multiple_of(PAGE).ok_or_else(outside)?;
    if first >= end {
        return Ok(0);
    }
    let count = usize::try_from(end - first).map_err(|_| outside())?;
    let slice = memory.get_slice(GuestAddress(first), count).map_err(|_| outside())?;
    let pages = slice.ptr_guard_mut();
    // SAFETY: the range is `count` bytes of mapped guest memory, to which no Rust reference exists. The guest,
    // and what it lets devices do, may find other contents there, as it asked for.
    match unsafe { libc::madvise(pages.as_ptr().cast(), count, libc::MADV_DONTNEED) } {
        0 => Ok(end - first),
        _ => Err(DiscardError::Host(io::Error::last_os_error())),
    }
}

/// Page frame numbers as ranges (first, count), in ascending order, none of which touch or overlap. Sorts
/// `frames`.
pub fn ranges(frames: &mut [u32]) -> impl Iterator<Item = (u32, u64)> {
    frames.sort_unstable();
    let mut rest = &*frames;
    std::iter::from_fn(move || {
        let (&first, _) = rest.split_first()?;
        let mut last = first;
        let mut taken = 0;
        for &frame in rest {
            // Equal, or the next one. `last` is never greater.
            if frame - last > 1 {
                break;
            }
            last = frame;
            taken += 1;
        }
        rest = &rest[taken..];
        Some((first, u64::from(last - first) + 1))
    })
}

/// The address of a page frame.
pub fn address(frame: u32) -> GuestAddress {
    GuestAddress(0).unchecked_add(u64::from(frame) * PAGE)
}
