//! bzImage kernels, entered by the 64-bit boot protocol
//! (Documentation/arch/x86/boot.rst of the Linux sources, protocol 2.12 and later).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Entry, LoadError, Loaded, check_room, place};
use crate::arch::layout;
use crate::memory::Memory;

/// Offset of the setup header in the file and in the zero page.
pub const SETUP_HEADER: usize = 0x1f1;
/// The setup header may grow up to here.
const SETUP_HEADER_END: usize = 0x290;
/// Offset of the 64-bit entry point from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;

/// The kernel's setup header as in its file, to be copied into the zero page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupHeader(Vec<u8>);

impl SetupHeader {
    fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut field = [0; N];
        if let Some(bytes) = self.0.get(offset - SETUP_HEADER..offset - SETUP_HEADER + N) {
            field.copy_from_slice(bytes);
        }
        field
    }

    fn u8(&self, offset: usize) -> u8 {
        self.field::<1>(offset)[0]
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.field(offset))
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.field(offset))
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.field(offset))
    }

    /// The bytes from [`SETUP_HEADER`] on.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Highest address an initrd may reach, exclusive.
    pub fn initrd_limit(&self) -> u64 {
        u64::from(self.u32(0x22c)) + 1
    }
}

/// Reads the setup header; `None` if the file is no bzImage.
pub fn read_header(file: &File) -> Result<Option<SetupHeader>, LoadError> {
    let mut bytes = vec![0; SETUP_HEADER_END - SETUP_HEADER];
    match file.read_exact_at(&mut bytes, SETUP_HEADER as u64) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(LoadError::Read(e)),
    }
    let mut header = SetupHeader(bytes);
    if header.u16(0x1fe) != 0xaa55 || header.field(0x202) != *b"HdrS" {
        return Ok(None);
    }
    // The header ends where the jump at 0x200 leads (its operand counts from 0x202).
    let end = 0x202 + usize::from(header.u8(0x201));
    if !(0x264..=SETUP_HEADER_END).contains(&end) {
        return Err(LoadError::Invalid("bzImage speaks a boot protocol older than 2.12"));
    }
    header.0.truncate(end - SETUP_HEADER);
    Ok(Some(header))
}

pub fn load(file: &File, file_len: u64, header: SetupHeader, memory: &Memory) -> Result<Loaded, LoadError> {
    if header.u16(0x206) < 0x20c {
        return Err(LoadError::Invalid("bzImage speaks a boot protocol older than 2.12"));
    }
    if header.u8(0x211) & 1 == 0 {
        return Err(LoadError::Invalid("bzImage is not loaded high (a zImage?)"));
    }
    if header.u16(0x236) & 1 == 0 {
        return Err(LoadError::Invalid("bzImage has no 64-bit entry point"));
    }
    let sectors = match header.u8(0x1f1) {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * 512;
    let declared = u64::from(header.u32(0x1f4)) * 16;
    let len = file_len.checked_sub(offset).ok_or(LoadError::Truncated("the kernel's code"))?;
    if len < declared || len == 0 {
        return Err(LoadError::Truncated("the kernel's code"));
    }
    // The decompressor moves to the preferred address if the kernel is not already above it, and needs
    // `init_size` bytes from there on.
    let load = layout::HIGH_MEMORY;
    check_room(memory, load, len)?;
    let (preferred, init_size) = (header.u64(0x258), u64::from(header.u32(0x260)));
    check_room(memory, preferred.max(load), init_size)?;
    place(file, offset, memory, load, len).map_err(LoadError::Read)?;
    let end = (load + len).max(preferred.saturating_add(init_size));
    Ok(Loaded { entry: Entry::Linux64 { address: load + ENTRY_64, header: Some(header) }, end })
}
