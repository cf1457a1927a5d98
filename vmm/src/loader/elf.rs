//! ELF kernels (`vmlinux`): 64-bit little-endian x86_64 executables, entered by the Linux 64-bit boot protocol
//! at their entry point, or by PVH if they carry the note for it and none of Linux.
//!
//! Linux has both entries. By PVH it looks for Xen first, which takes 256 CPUID instructions, each an exit.

use std::fs::File;

use super::{Entry, LoadError, Loaded, check_room, place, read_part};
use crate::arch::layout;
use crate::memory::Memory;

pub const MAGIC: [u8; 4] = *b"\x7fELF";

const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const PROGRAM_HEADERS_MAX: usize = 64;
const NOTES_MAX: u64 = 64 << 10;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's public/elfnote.h: where PVH starts.
const XEN_PHYS32_ENTRY: u32 = 18;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// One entry of the program header table (`Elf64_Phdr`).
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

impl Segment {
    fn parse(bytes: &[u8]) -> Self {
        Self {
            kind: u32_at(bytes, 0),
            offset: u64_at(bytes, 8),
            address: u64_at(bytes, 24),
            file_size: u64_at(bytes, 32),
            memory_size: u64_at(bytes, 40),
        }
    }
}

pub fn load(file: &File, file_len: u64, memory: &Memory) -> Result<Loaded, LoadError> {
    let mut header = [0; HEADER_LEN];
    read_part(file, 0, &mut header, "ELF header")?;
    let (class, data, machine) = (header[4], header[5], u16_at(&header, 18));
    if class != 2 || data != 1 || machine != 62 {
        return Err(LoadError::Invalid("ELF file is not for 64-bit x86"));
    }
    let count = usize::from(u16_at(&header, 56));
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_LEN || !(1..=PROGRAM_HEADERS_MAX).contains(&count) {
        return Err(LoadError::Invalid("ELF file has no usable program headers"));
    }
    let mut table = vec![0; count * PROGRAM_HEADER_LEN];
    read_part(file, u64_at(&header, 32), &mut table, "program header table")?;

    let mut notes = Notes::default();
    let mut end = 0;
    for segment in table.chunks_exact(PROGRAM_HEADER_LEN).map(Segment::parse) {
        match segment.kind {
            PT_LOAD => end = end.max(load_segment(file, file_len, memory, &segment)?),
            PT_NOTE => notes.read(file, &segment)?,
            _ => {}
        }
    }
    if end == 0 {
        return Err(LoadError::Invalid("ELF file has nothing to load"));
    }
    let entry = match notes {
        Notes { pvh: Some(address), linux: false } => Entry::Pvh { address },
        _ => Entry::Linux64 { address: u64_at(&header, 24), header: None },
    };
    let (Entry::Pvh { address } | Entry::Linux64 { address, .. }) = entry;
    check_room(memory, address, 1)?;
    Ok(Loaded { entry, end })
}

/// Loads one segment and returns the guest physical address after it.
fn load_segment(file: &File, file_len: u64, memory: &Memory, segment: &Segment) -> Result<u64, LoadError> {
    if segment.file_size > segment.memory_size {
        return Err(LoadError::Invalid("ELF segment is larger in the file than in memory"));
    }
    if segment.memory_size == 0 {
        return Ok(0);
    }
    if segment.address < layout::HIGH_MEMORY {
        return Err(LoadError::Invalid("ELF segment lies below 1 MiB"));
    }
    check_room(memory, segment.address, segment.memory_size)?;
    if segment.offset.checked_add(segment.file_size).is_none_or(|end| end > file_len) {
        return Err(LoadError::Truncated("a segment"));
    }
    // What the segment has beyond its file contents is zero already: guest memory starts so.
    place(file, segment.offset, memory, segment.address, segment.file_size).map_err(LoadError::Read)?;
    Ok(segment.address + segment.memory_size)
}

/// What a kernel's notes say.
#[derive(Default)]
struct Notes {
    /// Where PVH starts.
    pvh: Option<u64>,
    /// It is Linux.
    linux: bool,
}

impl Notes {
    /// Takes what the notes in `segment` say. Those behind a broken one are not looked at.
    fn read(&mut self, file: &File, segment: &Segment) -> Result<(), LoadError> {
        if segment.file_size > NOTES_MAX {
            return Err(LoadError::Invalid("ELF notes are implausibly large"));
        }
        let mut notes = vec![0; segment.file_size as usize];
        read_part(file, segment.offset, &mut notes, "ELF notes")?;
        let mut rest = notes.as_slice();
        while rest.len() >= 12 {
            let (name_len, desc_len) = (u32_at(rest, 0) as usize, u32_at(rest, 4) as usize);
            let kind = u32_at(rest, 8);
            let desc_at = 12 + name_len.next_multiple_of(4);
            let (Some(name), Some(desc)) =
                (rest.get(12..12 + name_len), rest.get(desc_at..desc_at + desc_len))
            else {
                return Ok(());
            };
            self.linux |= name == b"Linux\0";
            if name == b"Xen\0" && kind == XEN_PHYS32_ENTRY {
                let address = match desc.len() {
                    4 => u32_at(desc, 0).into(),
                    8 => u64_at(desc, 0),
                    _ => return Err(LoadError::Invalid("PVH note has the wrong size")),
                };
                self.pvh = self.pvh.or(Some(address));
            }
            rest = rest.get(desc_at + desc_len.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}
