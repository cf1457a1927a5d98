//! ACPI tables (ACPI 6.5, hardware-reduced) so that an ordinary kernel finds its processors, its virtio
//! devices, the serial port, and how to power off, without any firmware.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path,
    ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::devices::power;
use crate::memory::Memory;

const OEM_ID: [u8; 6] = *b"PULAU ";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

/// A virtio-mmio device for the DSDT.
#[derive(Debug, Clone, Copy)]
pub struct VirtioWindow {
    /// Guest physical address of its registers.
    pub address: u64,
    /// Interrupt line.
    pub irq: u32,
}

/// What the tables describe.
pub struct Platform<'a> {
    /// Number of vCPUs.
    pub cpus: u8,
    /// virtio devices in order.
    pub virtio: &'a [VirtioWindow],
    /// Interrupt line by which the guest hears of a new VM generation.
    pub vmgenid_irq: u32,
}

#[derive(Default)]
struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytecode::default();
    aml.to_aml_bytes(&mut sink);
    sink.0
}

/// Writes all tables and returns the address of the root pointer.
pub fn write_tables(memory: &Memory, platform: &Platform) -> Result<u64, GuestMemoryError> {
    let mut next = layout::RSDP + Rsdp::len().next_multiple_of(16) as u64;
    let mut put = |table: &[u8]| {
        let at = next;
        next = (at + table.len() as u64).next_multiple_of(16);
        if next > layout::VMGENID {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(next)));
        }
        memory.write_slice(table, GuestAddress(at)).map(|()| at)
    };
    let dsdt = put(dsdt(platform).as_slice())?;
    let fadt = put(&bytes(&fadt(dsdt)))?;
    let madt = put(&bytes(&madt(platform.cpus)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(layout::RSDP))?;
    Ok(layout::RSDP)
}

fn port(port: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    // Boot architecture flags: no VGA, no MSI, no PCIe ASPM, no CMOS clock; an 8042 controller is there.
    const BOOT_ARCH: u16 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.sleep_control_reg = port(layout::PORT_POWER + power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::PORT_POWER + power::SLEEP_STATUS);
    fadt.reset_reg = port(layout::PORT_POWER + power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let lapic = LocalInterruptController::Address(layout::LAPIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE, OEM_REVISION, lapic);
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    madt
}

fn dsdt(platform: &Platform) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE, OEM_REVISION);
    // Soft-off is sleep state 5; the type is what the guest writes into the sleep control register.
    let s5: u8 = power::SLEEP_TYPE_OFF;
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &Package::new(vec![&s5, &ZERO]))));
    dsdt.append_slice(&serial());
    dsdt.append_slice(&keyboard());
    dsdt.append_slice(&pvpanic());
    dsdt.append_slice(&vmgenid(platform.vmgenid_irq));
    for (index, window) in platform.virtio.iter().enumerate() {
        dsdt.append_slice(&virtio(index, window));
    }
    dsdt
}

fn system_bus_device(name: &str, children: Vec<&dyn Aml>) -> Vec<u8> {
    let device = Device::new(name.into(), children);
    bytes(&Scope::new("_SB_".into(), vec![&device]))
}

fn virtio(index: usize, window: &VirtioWindow) -> Vec<u8> {
    let uid = index as u32;
    system_bus_device(
        &format!("V{index:03}"),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window.address as u32, crate::virtio::mmio::WINDOW as u32),
                    &Interrupt::new(true, true, false, false, window.irq),
                ]),
            ),
        ],
    )
}

fn serial() -> Vec<u8> {
    let base = layout::PORT_SERIAL as u16;
    system_bus_device(
        "COM1",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, layout::IRQ_SERIAL),
                    &IO::new(base, base, 1, 8),
                ]),
            ),
        ],
    )
}

fn keyboard() -> Vec<u8> {
    let (data, command) = (layout::PORT_I8042 as u16, layout::PORT_I8042 as u16 + 4);
    system_bus_device(
        "PS2K",
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0303")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(data, data, 1, 1),
                    &IO::new(command, command, 1, 1),
                    &Interrupt::new(true, true, false, false, layout::IRQ_KEYBOARD),
                ]),
            ),
        ],
    )
}

/// QEMU's panic notification device (docs/specs/pvpanic): the guest kernel writes here when it panics.
fn pvpanic() -> Vec<u8> {
    let base = layout::PORT_PVPANIC as u16;
    system_bus_device(
        "PEVT",
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &0x0fu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(base, base, 1, 1)])),
        ],
    )
}

/// The VM generation identifier (Microsoft's "Virtual Machine Generation ID") and the generic event
/// device that announces a change of it.
fn vmgenid(irq: u32) -> Vec<u8> {
    let address = layout::VMGENID as u32;
    let mut both = system_bus_device(
        "VGEN",
        vec![
            &Name::new("_HID".into(), &"PULU0001"),
            &Name::new("_CID".into(), &"VMGENCTR"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&address, &ZERO])),
        ],
    );
    let device = Path::new("VGEN");
    let notify = Notify::new(&device, &0x80u8);
    let handler = Method::new("_EVT".into(), 1, true, vec![&notify]);
    both.extend(system_bus_device(
        "GED0",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, irq)]),
            ),
            &handler,
        ],
    ));
    both
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn checked(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
        let mut table = vec![0; len];
        memory.read_slice(&mut table, GuestAddress(at)).unwrap();
        assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0, "checksum at {at:#x}");
        table
    }

    fn table(memory: &Memory, at: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        checked(memory, at, len as usize)
    }

    #[test]
    fn the_root_pointer_leads_to_every_table() {
        let memory = memory::create(2, false).unwrap();
        let virtio: Vec<_> = (0..19)
            .map(|i| VirtioWindow { address: layout::VIRTIO_MMIO + i * 0x1000, irq: 5 + i as u32 })
            .collect();
        let root = write_tables(&memory, &Platform { cpus: 32, virtio: &virtio, vmgenid_irq: 9 }).unwrap();
        let rsdp = checked(&memory, root, 36);
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let entries: Vec<_> =
            xsdt[36..].chunks(8).map(|c| table(&memory, u64::from_le_bytes(c.try_into().unwrap()))).collect();
        assert_eq!(&entries[0][..4], b"FACP");
        assert_eq!(&entries[1][..4], b"APIC");
        // 32 local APICs of 8 bytes and one IOAPIC of 12 behind a header of 44.
        assert_eq!(entries[1].len(), 44 + 32 * 8 + 12);
        let dsdt = table(&memory, u64::from_le_bytes(entries[0][140..148].try_into().unwrap()));
        let text = String::from_utf8_lossy(dsdt.as_slice()).into_owned();
        assert_eq!(text.matches("LNRO0005").count(), 19);
    }
}
