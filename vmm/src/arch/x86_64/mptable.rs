//! The MP table (Intel MultiProcessor Specification 1.4): processors and interrupt lines for kernels that
//! are built or told to do without ACPI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::Memory;

const ISA_BUS: u8 = 0;

/// Writes the floating pointer and the configuration table for `cpus` processors.
pub fn write_table(memory: &Memory, cpus: u8) -> Result<(), GuestMemoryError> {
    let ioapic_id = cpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for cpu in 0..cpus {
        let flags = 1 | u8::from(cpu == 0) << 1; // enabled, boot processor
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[0, cpu, 0x14, flags]);
        add(&entry);
    }
    add(&[&[1, ISA_BUS][..], b"ISA   "].concat());
    add(&[&[2, ioapic_id, 0x14, 1][..], &(layout::IOAPIC as u32).to_le_bytes()].concat());
    for irq in 0..=layout::IRQ_LAST as u8 {
        // Vectored interrupt, polarity and trigger as usual for the bus (high, edge).
        add(&[3, 0, 0, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    add(&[4, 3, 0, 0, ISA_BUS, 0, 0, 0]); // ExtINT to LINT0
    add(&[4, 1, 0, 0, ISA_BUS, 0, 0xff, 1]); // NMI to LINT1 of all

    let mut table = Vec::with_capacity(44 + entries.len());
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]); // specification 1.4, checksum follows
    table.extend_from_slice(b"PULAU   MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&(layout::LAPIC as u32).to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(layout::MP_TABLE as u32 + 16).to_le_bytes());
    pointer[8..10].copy_from_slice(&[1, 4]); // one paragraph long, specification 1.4
    pointer[10] = checksum(&pointer);

    memory.write_slice(&pointer, GuestAddress(layout::MP_TABLE))?;
    memory.write_slice(&table, GuestAddress(layout::MP_TABLE + 16))
}

/// The byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn table_for_the_largest_vm_is_consistent_and_fits_its_place() {
        let memory = memory::create(2, false).unwrap();
        write_table(&memory, 32).unwrap();
        let mut pointer = [0; 16];
        memory.read_slice(&mut pointer, GuestAddress(layout::MP_TABLE)).unwrap();
        assert_eq!(checksum(&pointer), 0);
        let len: u16 = memory.read_obj(GuestAddress(layout::MP_TABLE + 20)).unwrap();
        let mut table = vec![0; usize::from(len)];
        memory.read_slice(&mut table, GuestAddress(layout::MP_TABLE + 16)).unwrap();
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(checksum(&table), 0);
        // 32 processors of 20 bytes; one bus, one IOAPIC, 24 lines and 2 local ones of 8.
        assert_eq!(table.len(), 44 + 32 * 20 + 28 * 8);
        assert!(layout::MP_TABLE + 16 + u64::from(len) < layout::RSDP);
    }
}
