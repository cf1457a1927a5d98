//! The guest's physical address map and interrupt lines.
//!
//! ```text
//! 0x0000_0000          boot page tables, GDT, zero page / PVH start info, command line
//! 0x0009_fc00          end of low memory: MP table
//! 0x000e_0000          ACPI: RSDP, then the other tables
//! 0x0010_0000          kernel
//!   … memory …         initrd at the top of low memory
//! 0xc000_0000          boot timer (one page), then virtio-mmio windows of 4 KiB
//! 0xfec0_0000          IOAPIC;  0xfee0_0000 local APIC;  0xfffb_c000 KVM's own pages
//! 0x1_0000_0000        the rest of memory; persistent memory devices above it
//! ```

/// GDT for the 64-bit boot protocol.
pub const GDT: u64 = 0x500;
/// IDT (empty) for the 64-bit boot protocol.
pub const IDT: u64 = 0x520;
/// PVH start info structure.
pub const PVH_INFO: u64 = 0x6000;
/// Linux boot parameters ("zero page").
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Top page table; the two lower levels follow.
pub const PML4: u64 = 0x9000;
/// Second level page table.
pub const PDPT: u64 = 0xa000;
/// Third level page table.
pub const PD: u64 = 0xb000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest kernel command line, with its closing zero, in bytes.
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory as the firmware would report it.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// MP table (Intel MultiProcessor Specification 1.4), for kernels without ACPI.
pub const MP_TABLE: u64 = LOW_MEMORY_END;
/// ACPI root pointer; the other tables follow in the same area.
pub const RSDP: u64 = 0xe_0000;
/// VM generation identifier, 16 bytes.
pub const VMGENID: u64 = 0xf_f000;
/// End of the area for firmware tables.
pub const FIRMWARE_END: u64 = 0x10_0000;
/// Where a kernel's protected-mode code is put, and the lowest address an ELF segment may have.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Hole for memory-mapped devices.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// Memory above the hole.
pub const HIGH_MEMORY_START: u64 = 1 << 32;
/// Writing the byte 123 here stops the boot timer.
pub const BOOT_TIMER: u64 = MMIO_HOLE_START;
/// First virtio-mmio window.
pub const VIRTIO_MMIO: u64 = MMIO_HOLE_START + 0x1000;
/// IOAPIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LAPIC: u64 = 0xfee0_0000;
/// Four pages KVM needs for itself on Intel processors: identity map, then the task state segment.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Interrupt line of the keyboard controller.
pub const IRQ_KEYBOARD: u32 = 1;
/// Interrupt line of the first serial port.
pub const IRQ_SERIAL: u32 = 4;
/// First interrupt line of virtio devices.
pub const IRQ_VIRTIO_FIRST: u32 = 5;
/// Last interrupt line of the IOAPIC.
pub const IRQ_LAST: u32 = 23;

/// First serial port (COM1), eight ports.
pub const PORT_SERIAL: u64 = 0x3f8;
/// Keyboard controller: data at +0, command at +4.
pub const PORT_I8042: u64 = 0x60;
/// Panic notification device (QEMU's pvpanic interface).
pub const PORT_PVPANIC: u64 = 0x505;
/// ACPI sleep control and status, and reset register.
pub const PORT_POWER: u64 = 0x600;
