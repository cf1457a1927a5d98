//! A file mapped into this process in a form that KVM can give to a guest: whole units of 2 MiB, starting at
//! a multiple of that, so that host and guest can use huge pages for it.

use std::io;
use std::os::fd::RawFd;
use std::ptr;

/// Unit of the address and length of persistent memory, in bytes.
pub const ALIGNMENT: u64 = 2 << 20;

/// A mapped file. Dropping it unmaps it.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    len: usize,
    read_only: bool,
}

impl Mapping {
    /// Maps the first `size` bytes of `file`, shared with everybody else who does, and zeroes up to the
    /// next multiple of [`ALIGNMENT`].
    pub(super) fn new(file: RawFd, size: u64, read_only: bool) -> io::Result<Self> {
        let too_large = || io::Error::from_raw_os_error(libc::EFBIG);
        let len = size.checked_next_multiple_of(ALIGNMENT).and_then(|l| usize::try_from(l).ok());
        let len = len.ok_or_else(too_large)?;
        let unit = ALIGNMENT as usize;
        let reserved = len.checked_add(unit).ok_or_else(too_large)?;
        let protection = if read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let base = map(0, reserved, protection, anonymous, -1)?;
        let address = base.next_multiple_of(unit);
        // What was reserved for alignment is given back; from here on the rest is unmapped when dropped.
        unmap(base, address - base);
        unmap(address + len, base + reserved - (address + len));
        let mapping = Self { address, len, read_only };
        map(address, size as usize, protection, libc::MAP_SHARED | libc::MAP_FIXED, file)?;
        // SAFETY: the range is the mapping just made, and the advice changes no contents.
        unsafe { libc::madvise(address as *mut libc::c_void, len, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }

    /// Address in this process of the first byte, a multiple of [`ALIGNMENT`].
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Length in bytes, a multiple of [`ALIGNMENT`] above zero.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether writing to it is a fault.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.address, self.len);
    }
}

fn map(
    address: usize,
    len: usize,
    protection: libc::c_int,
    flags: libc::c_int,
    file: RawFd,
) -> io::Result<usize> {
    let at = ptr::without_provenance_mut(address);
    // SAFETY: with MAP_FIXED the range lies in a mapping of the caller's that nothing refers to yet;
    // otherwise the kernel chooses a free one.
    let got = unsafe { libc::mmap(at, len, protection, flags, file, 0) };
    if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(got as usize) }
}

fn unmap(address: usize, len: usize) {
    if len > 0 {
        // SAFETY: the range is (part of) a mapping of the caller's that nothing in this process refers
        // to; a VM that has it in its address space ends before its devices.
        unsafe { libc::munmap(ptr::without_provenance_mut(address), len) };
    }
}
