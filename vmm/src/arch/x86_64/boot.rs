//! What a kernel finds in memory when it starts: command line, memory map, initrd, tables; and the state
//! of the first vCPU's registers for each of the two boot protocols.
//!
//! * Linux 64-bit: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", with the zero page.
//! * PVH: docs/misc/pvh.pandoc of the Xen sources, with `hvm_start_info`.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::bootparam::boot_e820_entry;
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::layout;
use crate::loader::Entry;
use crate::memory::Memory;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What the kernel is told.
pub struct BootInfo<'a> {
    /// How the kernel is entered.
    pub entry: &'a Entry,
    /// Command line without its closing zero.
    pub cmdline: &'a str,
    /// Initrd: guest physical address and size in bytes.
    pub initrd: Option<(u64, u64)>,
    /// Address of the ACPI root pointer, if there are ACPI tables.
    pub rsdp: Option<u64>,
}

/// The memory map as firmware would report it: (start, length, E820 type).
fn memory_map(memory: &Memory) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, E820_RAM),
        (layout::LOW_MEMORY_END, layout::FIRMWARE_END - layout::LOW_MEMORY_END, E820_RESERVED),
    ];
    for region in memory.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        let first = start.max(layout::HIGH_MEMORY);
        map.push((first, len.saturating_sub(first - start), E820_RAM));
    }
    map
}

/// Writes everything the kernel reads at its start.
pub fn write_boot_info(memory: &Memory, info: &BootInfo) -> Result<(), GuestMemoryError> {
    memory.write_slice(info.cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + info.cmdline.len() as u64))?;
    match info.entry {
        Entry::Linux64 { header, .. } => {
            write_zero_page(memory, info, header.as_ref().map(|h| h.bytes()))?;
            write_page_tables(memory)
        }
        Entry::Pvh { .. } => write_start_info(memory, info),
    }
}

fn write_zero_page(memory: &Memory, info: &BootInfo, header: Option<&[u8]>) -> Result<(), GuestMemoryError> {
    let mut page = boot_params::default();
    if let Some(header) = header {
        const AT: usize = 0x1f1;
        page.as_mut_slice()[AT..AT + header.len()].copy_from_slice(header);
    } else {
        page.hdr.boot_flag = 0xaa55;
        page.hdr.header = u32::from_le_bytes(*b"HdrS");
        page.hdr.kernel_alignment = 0x100_0000;
    }
    page.hdr.type_of_loader = 0xff;
    page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    page.hdr.cmdline_size = info.cmdline.len() as u32;
    if let Some((address, size)) = info.initrd {
        page.hdr.ramdisk_image = address as u32;
        page.hdr.ramdisk_size = size as u32;
    }
    page.acpi_rsdp_addr = info.rsdp.unwrap_or(0);
    let map = memory_map(memory);
    page.e820_entries = map.len() as u8;
    for (slot, (addr, size, type_)) in page.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, r#type: type_ };
    }
    memory.write_obj(page, GuestAddress(layout::ZERO_PAGE))
}

/// Identity map of the first GiB with 2 MiB pages, and the GDT.
fn write_page_tables(memory: &Memory) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    memory.write_obj(layout::PDPT | PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    memory.write_obj(layout::PD | PRESENT_WRITABLE, GuestAddress(layout::PDPT))?;
    let mut directory = [0; 4096];
    for (index, entry) in directory.chunks_exact_mut(8).enumerate() {
        entry.copy_from_slice(&((index as u64) << 21 | PRESENT_WRITABLE | LARGE).to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(layout::PD))
}

fn write_start_info(memory: &Memory, info: &BootInfo) -> Result<(), GuestMemoryError> {
    let mut next = layout::PVH_INFO + size_of::<hvm_start_info>() as u64;
    let mut start = hvm_start_info {
        magic: 0x336e_c578,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: info.rsdp.unwrap_or(0),
        ..Default::default()
    };
    if let Some((paddr, size)) = info.initrd {
        memory.write_obj(hvm_modlist_entry { paddr, size, ..Default::default() }, GuestAddress(next))?;
        start.nr_modules = 1;
        start.modlist_paddr = next;
        next += size_of::<hvm_modlist_entry>() as u64;
    }
    let map = memory_map(memory);
    start.memmap_paddr = next;
    start.memmap_entries = map.len() as u32;
    for (addr, size, type_) in map {
        let entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
        memory.write_obj(entry, GuestAddress(next))?;
        next += size_of::<hvm_memmap_table_entry>() as u64;
    }
    memory.write_obj(start, GuestAddress(layout::PVH_INFO))
}

/// Bits of a segment descriptor's access byte and flags, as in a GDT entry.
const CODE_64: u16 = 0xa09b;
const CODE_32: u16 = 0xc09b;
const DATA: u16 = 0xc093;
const TASK: u16 = 0x808b;

fn segment(flags: u16, index: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if flags == TASK { 0x67 } else { u32::MAX },
        selector: u16::from(index) * 8,
        type_: (flags & 0xf) as u8,
        s: (flags >> 4 & 1) as u8,
        dpl: (flags >> 5 & 3) as u8,
        present: (flags >> 7 & 1) as u8,
        avl: (flags >> 12 & 1) as u8,
        l: (flags >> 13 & 1) as u8,
        db: (flags >> 14 & 1) as u8,
        g: if flags == TASK { 0 } else { (flags >> 15) as u8 },
        unusable: 0,
        padding: 0,
    }
}

/// The GDT entry for flat segment `flags`.
fn descriptor(flags: u16) -> u64 {
    let limit: u64 = if flags == TASK { 0x67 } else { 0xf_ffff };
    let flags = if flags == TASK { flags & 0x0fff } else { flags };
    limit & 0xffff | u64::from(flags) << 40 | (limit >> 16 & 0xf) << 48
}

/// Writes the GDT the segments below were taken from.
pub fn write_gdt(memory: &Memory, entry: &Entry) -> Result<(), GuestMemoryError> {
    let code = match entry {
        Entry::Linux64 { .. } => CODE_64,
        Entry::Pvh { .. } => CODE_32,
    };
    for (index, entry) in [0, descriptor(code), descriptor(DATA), descriptor(TASK)].into_iter().enumerate() {
        memory.write_obj(entry, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    memory.write_obj(0u64, GuestAddress(layout::IDT))
}

/// Registers of the first vCPU at `entry`, starting from its state after reset.
pub fn registers(entry: &Entry, mut sregs: kvm_sregs) -> (kvm_regs, kvm_sregs) {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 0x10;
    const CR0_PG: u64 = 1 << 31;
    const CR4_PAE: u64 = 0x20;
    const EFER_LME: u64 = 0x100;
    const EFER_LMA: u64 = 0x400;

    let code = match entry {
        Entry::Linux64 { .. } => CODE_64,
        Entry::Pvh { .. } => CODE_32,
    };
    sregs.cs = segment(code, 1);
    let data = segment(DATA, 2);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, 3);
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, 4 * 8 - 1);
    (sregs.idt.base, sregs.idt.limit) = (layout::IDT, 7);
    // Bit 1 of the flags register is always set.
    let mut regs = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Linux64 { address, .. } => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = layout::PML4;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = *address;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
            regs.rsi = layout::ZERO_PAGE;
        }
        Entry::Pvh { address } => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            regs.rip = *address;
            regs.rbx = layout::PVH_INFO;
        }
    }
    (regs, sregs)
}
