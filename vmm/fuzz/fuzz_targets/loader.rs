//! The kernel loader: any file as a kernel (ELF with or without the PVH note, bzImage) and as an initrd.
//! What is accepted lies in guest memory, and what a kernel must not touch stays as it was.

#![no_main]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use pulau_vmm::arch::boot::{self, BootInfo};
use pulau_vmm::arch::layout;
use pulau_vmm::loader::{Entry, load_initrd, load_kernel};
use pulau_vmm::memory::Memory;
use pulau_vmm_fuzz::Input;
use vm_memory::{Bytes, GuestAddress};

/// Two regions, as around the hole for devices.
const LOW: u64 = 4 << 20;
const HIGH: u64 = 8 << 20;
const HIGH_LEN: u64 = 1 << 20;

/// A file in memory with these contents, then a hole up to `len` bytes.
fn file(bytes: &[u8], len: u64) -> File {
    // SAFETY: the name is a NUL-terminated string; the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC)) };
    file.write_all_at(bytes, 0).expect("room");
    if len > bytes.len() as u64 {
        // Too long for a file is as long as it is.
        let _ = file.set_len(len);
    }
    file
}

fn is_memory(address: u64) -> bool {
    address < LOW || (HIGH..HIGH + HIGH_LEN).contains(&address)
}

fuzz_target!(|data: &[u8]| {
    let input = &mut Input(data);
    // How long the kernel is beyond what is given of it: mostly a little, so that segments are complete.
    let len = match input.u8() {
        n @ 0..=200 => u64::from(n) << 12,
        n => 1 << (n % 64),
    };
    let initrd_len = u64::from(input.u16()) << 8;
    let ranges = [(GuestAddress(0), LOW as usize), (GuestAddress(HIGH), HIGH_LEN as usize)];
    let memory = Memory::from_ranges(&ranges).expect("a few MiB");
    let loaded = match load_kernel(&file(input.0, len), &memory) {
        Ok(loaded) => loaded,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    let mut low = [0; 0x1000];
    for address in (0..layout::HIGH_MEMORY).step_by(low.len()) {
        memory.read_slice(&mut low, GuestAddress(address)).expect("it is memory");
        assert_eq!(low, [0; 0x1000], "something was loaded to {address:#x}");
    }
    assert!(loaded.end > layout::HIGH_MEMORY && is_memory(loaded.end - 1), "ends at {:#x}", loaded.end);
    let (Entry::Pvh { address } | Entry::Linux64 { address, .. }) = loaded.entry;
    assert!(is_memory(address), "entered at {address:#x}");
    let limit = match &loaded.entry {
        Entry::Linux64 { header: Some(header), .. } => header.initrd_limit(),
        _ => layout::MMIO_HOLE_START,
    };
    let initrd = load_initrd(&file(b"initrd", initrd_len), &memory, loaded.end, limit);
    if let Ok((start, size)) = &initrd {
        assert!(*start >= loaded.end && start + size <= limit.min(LOW), "initrd at {start:#x}+{size:#x}");
        let mut begin = [0; 6];
        memory.read_slice(&mut begin, GuestAddress(*start)).expect("it is memory");
        assert_eq!(&begin, b"initrd");
    }
    let info = BootInfo { entry: &loaded.entry, cmdline: "quiet", initrd: initrd.ok(), rsdp: None };
    boot::write_gdt(&memory, &loaded.entry).expect("low memory is there");
    boot::write_boot_info(&memory, &info).expect("low memory is there");
});
