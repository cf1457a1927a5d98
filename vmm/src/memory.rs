//! Guest physical memory: where it lies, how it is backed, and the one type every device uses for it.
//!
//! Memory is anonymous and private, taken lazily from the host (no reservation), with transparent
//! huge pages where the host grants them, or explicit 2 MiB pages from hugetlbfs on request; or it is a private
//! mapping of a snapshot's memory file. This module never touches what is inside.

use std::fs::File;
use std::io;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::arch::layout;

/// Guest physical memory as every part of the VMM sees it.
pub type Memory = GuestMemoryMmap<()>;

/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size does not fit the address space.
    #[error("mem_size_mib: {0} MiB does not fit the address space")]
    TooLarge(u64),
    /// The host refused the mapping.
    #[error("mem_size_mib: cannot map {size_mib} MiB of guest memory{}: {source}", if *.huge { " from 2 MiB huge pages (see /proc/sys/vm/nr_hugepages)" } else { "" })]
    Map {
        /// Size asked for, in MiB.
        size_mib: u64,
        /// Whether explicit huge pages were asked for.
        huge: bool,
        /// The host's answer.
        source: io::Error,
    },
    /// The memory file is not one of this machine.
    #[error(
        "the memory file has {found} bytes, and the microVM {size_mib} MiB of memory: it belongs to another"
    )]
    FileLength {
        /// Length of the file, in bytes.
        found: u64,
        /// Memory of the machine, in MiB.
        size_mib: u64,
    },
    /// The regions do not form an address space.
    #[error("guest memory regions: {0}")]
    Regions(#[from] vm_memory::region::GuestRegionCollectionError),
}

/// Creates guest memory of `size_mib` MiB, split around the hole for memory-mapped devices below 4 GiB.
///
/// With `huge` the backing is explicit 2 MiB pages (`MAP_HUGETLB`), reserved at once so that a guest
/// cannot run out of them later.
pub fn create(size_mib: u64, huge: bool) -> Result<Memory, MemoryError> {
    let size = size_mib.checked_mul(MIB).ok_or(MemoryError::TooLarge(size_mib))?;
    let mut regions = Vec::with_capacity(2);
    for (start, len) in ranges(size) {
        let len = usize::try_from(len).map_err(|_| MemoryError::TooLarge(size_mib))?;
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        flags |= if huge { libc::MAP_HUGETLB | libc::MAP_HUGE_2MB } else { libc::MAP_NORESERVE };
        let mapping = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_hugetlbfs(huge)
            .build()
            .map_err(|e| MemoryError::Map { size_mib, huge, source: io::Error::other(e) })?;
        regions.push(region(mapping, start, size_mib)?);
    }
    Ok(Memory::from_regions(regions)?)
}

/// Maps guest memory of `size_mib` MiB out of a snapshot's memory file: privately, so that what the guest writes
/// is its own and what it only reads is shared with all who have the file mapped. Nothing is read yet.
pub fn map(file: &File, size_mib: u64) -> Result<Memory, MemoryError> {
    let size = size_mib.checked_mul(MIB).ok_or(MemoryError::TooLarge(size_mib))?;
    let failed = |source| MemoryError::Map { size_mib, huge: false, source };
    let found = file.metadata().map_err(failed)?.len();
    if found != size {
        return Err(MemoryError::FileLength { found, size_mib });
    }
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for (start, len) in ranges(size) {
        let bytes = usize::try_from(len).map_err(|_| MemoryError::TooLarge(size_mib))?;
        let mapping = MmapRegionBuilder::new(bytes)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file.try_clone().map_err(failed)?, offset))
            .build()
            .map_err(|e| failed(io::Error::other(e)))?;
        regions.push(region(mapping, start, size_mib)?);
        offset += len;
    }
    Ok(Memory::from_regions(regions)?)
}

fn region(mapping: MmapRegion, start: u64, size_mib: u64) -> Result<GuestRegionMmap, MemoryError> {
    // Guest memory must not end up in a core file.
    // SAFETY: the range is the mapping just made; the call changes no contents.
    unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_DONTDUMP) };
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(MemoryError::TooLarge(size_mib))
}

/// Asks the host to back guest memory with transparent huge pages; a host that does not is no error.
pub fn advise_huge(memory: &Memory) {
    for region in memory.iter() {
        // SAFETY: the range is the region's own mapping; the call changes no contents.
        unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
    }
}

/// What the host says of its memory; none if it does not.
pub fn of_host() -> Option<libc::sysinfo> {
    let mut info = std::mem::MaybeUninit::<libc::sysinfo>::uninit();
    // SAFETY: the pointer is to memory for what the call writes, all of it if it succeeds.
    unsafe { (libc::sysinfo(info.as_mut_ptr()) == 0).then(|| info.assume_init()) }
}

/// Guest physical ranges (start, length in bytes) that hold `size` bytes of memory.
pub fn ranges(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = size.min(layout::MMIO_HOLE_START);
    let high = size - low;
    [(0, low), (layout::HIGH_MEMORY_START, high)].into_iter().filter(|(_, len)| *len > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_below_the_hole_is_one_range() {
        assert_eq!(ranges(128 * MIB).collect::<Vec<_>>(), [(0, 128 * MIB)]);
    }

    #[test]
    fn memory_beyond_the_hole_continues_above_4_gib() {
        let size = 4096 * MIB;
        let all: Vec<_> = ranges(size).collect();
        assert_eq!(all, [(0, 3072 * MIB), (1 << 32, 1024 * MIB)]);
    }

    #[test]
    fn created_memory_has_the_asked_size() {
        let memory = create(3 * 1024 + 16, false).unwrap();
        let total: u64 = memory.iter().map(|r| r.len()).sum();
        assert_eq!(total, (3 * 1024 + 16) * MIB);
        assert_eq!(memory.last_addr().0, (1 << 32) + 16 * MIB - 1);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(matches!(create(u64::MAX, false), Err(MemoryError::TooLarge(_))));
        assert!(create(1 << 43, false).is_err());
    }
}
