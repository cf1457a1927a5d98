//! Placing file contents into guest memory by private mapping where pages allow it, by reading elsewhere.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::Memory;

/// Page size of the host, in bytes.
pub const PAGE: u64 = 4096;

/// Puts `len` bytes of `file` from `offset` at guest physical `start`. The caller has checked that the
/// file has them and that the range lies within one region of guest memory.
pub fn place(file: &File, offset: u64, memory: &Memory, start: u64, len: u64) -> io::Result<()> {
    let end = start + len;
    let (map_start, map_end) = (start.next_multiple_of(PAGE), end & !(PAGE - 1));
    let congruent = offset % PAGE == start % PAGE;
    if !congruent
        || map_start >= map_end
        || is_huge(memory, start)
        || !map(file, offset + (map_start - start), memory, map_start, map_end - map_start)?
    {
        return read(file, offset, memory, start, len);
    }
    read(file, offset, memory, start, map_start - start)?;
    read(file, offset + (map_end - start), memory, map_end, end - map_end)
}

fn is_huge(memory: &Memory, address: u64) -> bool {
    memory.find_region(GuestAddress(address)).is_some_and(|r| r.is_hugetlbfs() == Some(true))
}

/// Maps whole pages; `false` where the file cannot be mapped (a pipe, some network file systems).
fn map(file: &File, offset: u64, memory: &Memory, start: u64, len: u64) -> io::Result<bool> {
    let host = memory.get_host_address(GuestAddress(start)).map_err(io::Error::other)?;
    // SAFETY: the caller checked that start..start + len lies within one region of guest memory, so the
    // host range is ours entirely; guest memory is only ever accessed as volatile bytes, and replacing
    // pages of it with others of the same protection keeps every such access valid.
    let result = unsafe {
        libc::mmap(
            host.cast(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if result != libc::MAP_FAILED {
        // SAFETY: the range was just mapped; the call changes no contents.
        unsafe { libc::madvise(host.cast(), len as usize, libc::MADV_DONTDUMP) };
        return Ok(true);
    }
    // A failed MAP_FIXED may have removed the old mapping only for errors that leave no address space at
    // all to a VMM; ENODEV is decided before anything is unmapped.
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        e => Err(e),
    }
}

fn read(file: &File, offset: u64, memory: &Memory, start: u64, len: u64) -> io::Result<()> {
    use std::io::{Seek, SeekFrom};
    if len == 0 {
        return Ok(());
    }
    let mut file = file;
    file.seek(SeekFrom::Start(offset))?;
    let len = usize::try_from(len).map_err(io::Error::other)?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file.try_clone()?, len)
        .map_err(io::Error::other)
}
