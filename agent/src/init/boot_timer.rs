//! Telling the VMM that init has begun: a write of the byte 123 to guest physical address 0xC0000000,
//! which no memory is at. The VMM sees the access and stops its boot timer (Firecracker's
//! `--boot-timer` and ours).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

const ADDRESS: libc::off_t = 0xC000_0000;
const BOOT_COMPLETE: u8 = 123;
const PAGE: usize = 4096;

/// Makes the write. Needs `/dev/mem`: `CONFIG_DEVMEM`, and under `CONFIG_STRICT_DEVMEM` that no driver
/// claims the address.
///
/// # Errors
/// The kernel has no `/dev/mem` or does not let it be used so.
pub fn stop() -> io::Result<()> {
    // O_SYNC: an uncached mapping.
    let mem = OpenOptions::new().read(true).write(true).custom_flags(libc::O_SYNC).open("/dev/mem")?;
    // SAFETY: a new mapping, at an address of the kernel's choice, given up before the block ends; it holds
    // nothing that Rust knows of.
    unsafe {
        let (prot, flags) = (libc::PROT_WRITE, libc::MAP_SHARED);
        let page = libc::mmap(ptr::null_mut(), PAGE, prot, flags, mem.as_raw_fd(), ADDRESS);
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        page.cast::<u8>().write_volatile(BOOT_COMPLETE);
        libc::munmap(page, PAGE);
    }
    Ok(())
}
