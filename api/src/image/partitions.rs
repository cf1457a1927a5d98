//! Finds the root file system in a partitioned disk image.
//!
//! GUID partition tables: UEFI specification 2.10, section 5.3. The type of a root partition: Discoverable
//! Partitions Specification. Every number in a table is the image's maker's choice, so it is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::probe::{self, FileSystem, Format};

const SECTOR: u64 = 512;
/// Linux makes partitions of no more entries than this for a virtio disk, and neither do we look at more.
const MOST: u32 = 128;

/// Type GUIDs as they are stored.
const ROOT_X86_64: [u8; 16] = guid(0x4f68_bce3, 0xe8cd, 0x4db1, 0x96e7_fbca_f984_b709);
const ROOT_AARCH64: [u8; 16] = guid(0xb921_b045, 0x1df0, 0x41c3, 0xaf44_4c6f_280d_3fae);

/// A partition with a file system that can be a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As in `/dev/vda1`; from 1.
    pub number: u32,
    /// Bytes.
    pub start: u64,
    pub length: u64,
    pub file_system: FileSystem,
    /// The table says that this is the root.
    declared: bool,
}

/// The partition a guest should have as its root: one that says so, else the largest with a file system fit for it.
///
/// # Errors
///
/// The table is malformed (kind `InvalidData`), or the file cannot be read.
pub fn find_root(file: &File) -> io::Result<Option<Partition>> {
    let found = match probe::format(file)? {
        Format::Gpt => gpt(file)?,
        _ => mbr(file)?,
    };
    Ok(found.into_iter().max_by_key(|partition| (partition.declared, partition.length)))
}

fn gpt(file: &File) -> io::Result<Vec<Partition>> {
    let mut sector = SECTOR;
    let mut header = [0; 92];
    file.read_exact_at(&mut header, sector)?;
    if !header.starts_with(b"EFI PART") {
        sector = 4096;
        file.read_exact_at(&mut header, sector)?;
    }
    let (table, count, entry) = (long(&header, 72), word(&header, 80), word(&header, 84));
    if !(128..=4096).contains(&entry) {
        return Err(malformed("entries of its partition table have an impossible size"));
    }
    let mut found = Vec::new();
    for number in 0..count.min(MOST) {
        let mut bytes = [0; 56];
        let at =
            table.checked_mul(sector).and_then(|at| at.checked_add(u64::from(number) * u64::from(entry)));
        file.read_exact_at(&mut bytes, at.ok_or_else(|| malformed("its partition table is nowhere"))?)?;
        if bytes[..16] == [0; 16] {
            continue;
        }
        let (first, last) = (long(&bytes, 32), long(&bytes, 40));
        let declared = bytes[..16] == ROOT_X86_64 || bytes[..16] == ROOT_AARCH64;
        let sectors = last.checked_sub(first).and_then(|count| count.checked_add(1));
        found.extend(usable(file, number + 1, (Some(first), sectors), sector, declared)?);
    }
    Ok(found)
}

fn mbr(file: &File) -> io::Result<Vec<Partition>> {
    let mut table = [0; 64];
    file.read_exact_at(&mut table, 446)?;
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(table.chunks_exact(16)) {
        let range = (Some(u64::from(word(entry, 8))), Some(u64::from(word(entry, 12))));
        if entry[4] != 0 {
            found.extend(usable(file, number, range, SECTOR, entry[0] == 0x80)?);
        }
    }
    Ok(found)
}

/// The partition, if it is within the file and has a file system that can be a root.
fn usable(
    file: &File,
    number: u32,
    (first, sectors): (Option<u64>, Option<u64>),
    sector: u64,
    declared: bool,
) -> io::Result<Option<Partition>> {
    let bytes = |sectors: Option<u64>| sectors.and_then(|sectors| sectors.checked_mul(sector));
    let (Some(start), Some(length)) = (bytes(first), bytes(sectors)) else {
        return Err(malformed("a partition is larger than any disk"));
    };
    if start == 0 || start.checked_add(length).is_none_or(|end| end > file.metadata().map_or(0, |m| m.len()))
    {
        return Err(malformed("a partition does not fit on it; is the image cut off?"));
    }
    let found = probe::file_system(file, start)?.filter(|found| *found != FileSystem::Squashfs);
    Ok(found.map(|file_system| Partition { number, start, length, file_system, declared }))
}

fn malformed(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

/// The first three fields are stored little-endian, the rest as written.
const fn guid(a: u32, b: u16, c: u16, d: u64) -> [u8; 16] {
    let (a, b, c, d) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes(), d.to_be_bytes());
    [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]]
}

#[cfg(test)]
#[path = "partitions_tests.rs"]
mod tests;
