//! The memory file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{self, Memory};

/// The unit in which memory is zero or not.
const PAGE: usize = 4096;
/// Most bytes of one write.
const RUN: usize = 4 << 20;

/// Writes all of `memory` to `file`, which is empty: pages that are zero become holes. Nothing may write to
/// memory meanwhile. Returns how many bytes are no holes.
pub fn write_full(memory: &Memory, file: &File) -> io::Result<u64> {
    let swap = has_swap();
    let mut written = write(memory, file, swap)?;
    if !swap && has_swap() {
        // Turned on meanwhile, and pages may have gone there unseen.
        written = write(memory, file, true)?;
    }
    file.sync_data()?;
    Ok(written)
}

fn write(memory: &Memory, file: &File, swap: bool) -> io::Result<u64> {
    let (mut at, mut written) = (0, 0);
    for region in memory.iter() {
        let len = region.len() as usize;
        // Of fresh memory, what was never touched is zero, and looking at it would have the host make page tables for
        // it. What has been swapped out is not there either.
        let there =
            if swap || region.file_offset().is_some() { None } else { Some(resident(region.as_ptr(), len)?) };
        let is_there = |page: usize| there.as_ref().is_none_or(|there| there[page] & 1 != 0);
        let is_data = |page: usize| is_there(page) && !is_zero(region.as_ptr(), page);
        let pages = len / PAGE;
        let mut page = 0;
        while page < pages {
            if !is_data(page) {
                page += 1;
                continue;
            }
            let first = page;
            while page < pages && (page - first) * PAGE < RUN && is_data(page) {
                page += 1;
            }
            let (start, count) = (first * PAGE, (page - first) * PAGE);
            // SAFETY: the bytes are those of whole pages of the region, which is mapped for as long as `memory`, and
            // nothing writes to them now.
            let run = unsafe { std::slice::from_raw_parts(region.as_ptr().add(start), count) };
            file.write_all_at(run, at + start as u64)?;
            written += count as u64;
        }
        at += region.len();
    }
    file.set_len(at)?;
    Ok(written)
}

/// Whether a page is zero.
fn is_zero(start: *const u8, page: usize) -> bool {
    let words = start.wrapping_add(page * PAGE).cast::<[u64; 8]>();
    (0..PAGE / 64).all(|at| {
        // SAFETY: the caller's page is mapped and aligned; nothing writes to it now, and a torn read would be no
        // harm.
        let words = unsafe { words.add(at).read_volatile() };
        words.iter().fold(0, |all, word| all | word) == 0
    })
}

/// For each page of a mapping, whether it is in memory.
fn resident(start: *mut u8, len: usize) -> io::Result<Vec<u8>> {
    let mut there = vec![0; len / PAGE];
    // SAFETY: the range is a mapping's, and there is a byte for each of its pages.
    let answer = unsafe { libc::mincore(start.cast(), len, there.as_mut_ptr()) };
    if answer == 0 { Ok(there) } else { Err(io::Error::last_os_error()) }
}

/// Whether the host may have put memory anywhere else.
fn has_swap() -> bool {
    memory::of_host().is_none_or(|info| info.totalswap != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIB;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn what_is_zero_is_a_hole_and_everything_comes_back() {
        let memory = memory::create(3 * 1024 + 8, false).unwrap();
        let places = [0, 0x5000, 2 << 30, (1 << 32) + 4096, (1 << 32) + 8 * MIB - 8];
        for place in places {
            memory.write_obj(place | 1, GuestAddress(place)).unwrap();
        }
        memory.write_obj(0u64, GuestAddress(0x9000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert_eq!(write_full(&memory, &file).unwrap(), 5 * PAGE as u64);
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), (3 * 1024 + 8) * MIB);
        assert!(metadata.blocks() * 512 <= 20 * PAGE as u64, "{} blocks", metadata.blocks());
        let mut word = [0; 8];
        file.read_exact_at(&mut word, (3 << 30) + 8 * MIB - 8).unwrap();
        assert_eq!(u64::from_ne_bytes(word), (1 << 32) + 8 * MIB - 7, "above the hole of the address space");

        let again = memory::map(&file, 3 * 1024 + 8).unwrap();
        for place in places {
            assert_eq!(again.read_obj::<u64>(GuestAddress(place)).unwrap(), place | 1);
        }
        again.write_obj(7u64, GuestAddress(0x7000)).unwrap();
        let second = tempfile::tempfile().unwrap();
        assert_eq!(write_full(&again, &second).unwrap(), 6 * PAGE as u64);
        file.read_exact_at(&mut word, 0x7000).unwrap();
        assert_eq!(word, [0; 8], "the first file is as it was");
    }

    #[test]
    fn a_file_of_another_length_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * MIB - 1).unwrap();
        let error = memory::map(&file, 8).unwrap_err().to_string();
        assert!(error.contains("8388607 bytes"), "{error}");
    }
}
