//! Kernel and initrd loading: recognises ELF (`vmlinux`) and bzImage files, puts them into guest memory
//! and says where and how to start.
//!
//! The files come from whoever configures the VM and may be wrong in any way: every number in them is
//! checked against the file and against guest memory. Nothing here runs guest code.
//!
//! The files are read into guest memory, not mapped, although a mapping costs nothing at first and its pages
//! are shared: a kernel writes to nearly every page of itself when it patches in what fits its processor,
//! and each page, mapped or copied, then costs an exit of the guest, where fresh memory comes in huge pages.
//! (docs/benchmarks.md has the figures.)

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::Memory;

mod bzimage;
mod elf;

pub use bzimage::SetupHeader;

/// Page size of the guest, in bytes.
const PAGE: u64 = 4096;

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// Linux 64-bit boot protocol: long mode, `rsi` holds the zero page.
    Linux64 {
        /// Guest physical address of the first instruction.
        address: u64,
        /// The kernel's own setup header, where the file had one (bzImage).
        header: Option<SetupHeader>,
    },
    /// Xen PVH boot protocol: 32-bit protected mode, `ebx` holds the start info.
    Pvh {
        /// Guest physical address of the first instruction.
        address: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded {
    /// How to start it.
    pub entry: Entry,
    /// First guest physical address after everything the kernel needs before it manages memory itself.
    pub end: u64,
}

/// Why a kernel or initrd was refused. The messages name the API field.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("kernel_image_path: cannot read: {0}")]
    Read(#[source] io::Error),
    /// Neither ELF nor bzImage.
    #[error("kernel_image_path: not a kernel: neither an ELF file nor a bzImage")]
    Format,
    /// The right kind of file, but unusable.
    #[error("kernel_image_path: {0}")]
    Invalid(&'static str),
    /// The file ends before what its headers promise.
    #[error("kernel_image_path: file is truncated: {0} lies beyond its end")]
    Truncated(&'static str),
    /// Guest memory is too small.
    #[error("mem_size_mib: kernel needs guest memory at {start:#x}..{end:#x}, which is outside of it")]
    Memory {
        /// First address needed.
        start: u64,
        /// End of what is needed.
        end: u64,
    },
    /// The initrd could not be read.
    #[error("initrd_path: cannot read: {0}")]
    ReadInitrd(#[source] io::Error),
    /// The initrd is empty.
    #[error("initrd_path: file is empty")]
    EmptyInitrd,
    /// No room for the initrd.
    #[error("initrd_path: {size} bytes do not fit guest memory above the kernel (free: {free} bytes)")]
    InitrdMemory {
        /// Size of the initrd in bytes.
        size: u64,
        /// Bytes between the kernel's end and the highest address an initrd may have.
        free: u64,
    },
}

/// Loads the kernel in `file` into `memory`.
pub fn load_kernel(file: &File, memory: &Memory) -> Result<Loaded, LoadError> {
    let mut magic = [0; 4];
    let file_len = file.metadata().map_err(LoadError::Read)?.len();
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(LoadError::Format),
        Err(e) => return Err(LoadError::Read(e)),
    }
    if magic == elf::MAGIC {
        elf::load(file, file_len, memory)
    } else if let Some(header) = bzimage::read_header(file)? {
        bzimage::load(file, file_len, header, memory)
    } else {
        Err(LoadError::Format)
    }
}

/// Puts the initrd in `file` as high as the boot protocol allows: below 4 GiB, below `limit` (exclusive),
/// above `floor`. Returns its guest physical address and size in bytes.
pub fn load_initrd(file: &File, memory: &Memory, floor: u64, limit: u64) -> Result<(u64, u64), LoadError> {
    let size = file.metadata().map_err(LoadError::ReadInitrd)?.len();
    if size == 0 {
        return Err(LoadError::EmptyInitrd);
    }
    let low_end = memory.find_region(GuestAddress(0)).map_or(0, |r| r.len());
    let limit = limit.min(low_end);
    let floor = floor.next_multiple_of(PAGE);
    let start = limit.checked_sub(size).map(|s| s & !(PAGE - 1)).filter(|s| *s >= floor);
    let start = start.ok_or(LoadError::InitrdMemory { size, free: limit.saturating_sub(floor) })?;
    place(file, 0, memory, start, size).map_err(LoadError::ReadInitrd)?;
    Ok((start, size))
}

/// Checks that `start..start + len` is guest memory within one region.
fn check_room(memory: &Memory, start: u64, len: u64) -> Result<(), LoadError> {
    let end = start.checked_add(len).ok_or(LoadError::Memory { start, end: u64::MAX })?;
    let fits = memory
        .to_region_addr(GuestAddress(start))
        .is_some_and(|(region, at)| len <= region.len() - vm_memory::Address::raw_value(&at));
    if fits { Ok(()) } else { Err(LoadError::Memory { start, end }) }
}

/// Reads `len` bytes of `file` from `offset` into guest memory at `start`. The caller has checked that the
/// range is guest memory.
fn place(file: &File, offset: u64, memory: &Memory, start: u64, len: u64) -> io::Result<()> {
    let mut file = file;
    file.seek(SeekFrom::Start(offset))?;
    let len = usize::try_from(len).map_err(io::Error::other)?;
    memory.read_exact_volatile_from(GuestAddress(start), &mut file, len).map_err(io::Error::other)
}

/// Reads `len` bytes at `offset` of a file, refusing what lies beyond its end.
fn read_part(file: &File, offset: u64, buffer: &mut [u8], what: &'static str) -> Result<(), LoadError> {
    file.read_exact_at(buffer, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => LoadError::Truncated(what),
        _ => LoadError::Read(e),
    })
}

#[cfg(test)]
#[path = "loader/tests.rs"]
mod tests;
