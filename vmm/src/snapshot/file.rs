//! The state file: a header of 32 bytes, then a [`State`] in postcard's format.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0–7 | `PULAUVM` and a zero |
//! | 8–11 | version of the format |
//! | 12–15 | processor architecture, as ELF numbers them |
//! | 16–23 | length of what follows the header, in bytes |
//! | 24–31 | CRC-64/XZ of what follows the header |
//!
//! Numbers are little-endian. A version that this program does not know is refused, as is a file that was cut
//! short, changed, or is none. Versions before the present one are read by what is kept of them here; there are
//! none yet. The checksum is for mishaps: who can write to the file can make the machine do anything.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use crc::{CRC_64_XZ, Crc, Table};

use super::State;

const MAGIC: [u8; 8] = *b"PULAUVM\0";
/// The present version of the format.
pub const VERSION: u32 = 1;
/// `EM_X86_64`.
const ARCHITECTURE: u32 = 62;
const HEADER: usize = 32;
/// More than any machine has: 32 vCPUs of at most 64 KiB, and devices.
const MAX_BODY: u64 = 16 << 20;

static CRC: Crc<u64, Table<16>> = Crc::<u64, Table<16>>::new(&CRC_64_XZ);

/// Why a state file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The host's answer.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Something else.
    #[error("this is not the state of a microVM: it does not begin with the mark of one")]
    Foreign,
    /// Made by a program that is newer.
    #[error("its format has version {0}, and this program knows versions up to {VERSION}")]
    Version(u32),
    /// Made for another architecture.
    #[error("it was made on another processor architecture (ELF machine {0})")]
    Architecture(u32),
    /// Cut short, or something was added.
    #[error("it has {found} bytes behind its header, and should have {wanted}: it was cut short or changed")]
    Length {
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be.
        wanted: u64,
    },
    /// Not what was written.
    #[error("its checksum is wrong: it was changed after it was made")]
    Checksum,
    /// Right by its checksum, but cannot be read.
    #[error("its contents cannot be read: {0}")]
    Contents(postcard::Error),
}

/// Bytes of a state file.
pub fn encode(state: &State) -> Result<Vec<u8>, FileError> {
    let mut bytes = vec![0; HEADER];
    bytes = postcard::to_extend(state, bytes).map_err(FileError::Contents)?;
    let body = &bytes[HEADER..];
    let (len, sum) = (body.len() as u64, CRC.checksum(body));
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&ARCHITECTURE.to_le_bytes());
    bytes[16..24].copy_from_slice(&len.to_le_bytes());
    bytes[24..32].copy_from_slice(&sum.to_le_bytes());
    Ok(bytes)
}

/// The state that `bytes` hold.
pub fn decode(bytes: &[u8]) -> Result<State, FileError> {
    let (Some(header), Some(body)) = (bytes.first_chunk::<HEADER>(), bytes.get(HEADER..)) else {
        return Err(FileError::Foreign);
    };
    if header[..8] != MAGIC {
        return Err(FileError::Foreign);
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    match word(8) {
        VERSION => {}
        other => return Err(FileError::Version(other)),
    }
    if word(12) != ARCHITECTURE {
        return Err(FileError::Architecture(word(12)));
    }
    if long(16) != body.len() as u64 {
        return Err(FileError::Length { found: body.len() as u64, wanted: long(16) });
    }
    if long(24) != CRC.checksum(body) {
        return Err(FileError::Checksum);
    }
    contents(body)
}

/// The state that is behind a header.
pub fn contents(body: &[u8]) -> Result<State, FileError> {
    match postcard::take_from_bytes(body) {
        Ok((state, [])) => Ok(state),
        Ok(_) => Err(FileError::Contents(postcard::Error::DeserializeBadEncoding)),
        Err(e) => Err(FileError::Contents(e)),
    }
}

/// Reads a state file.
pub fn read(path: &Path) -> Result<State, FileError> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    let mut rest = file.take(MAX_BODY + HEADER as u64 + 1);
    rest.read_to_end(&mut bytes)?;
    decode(&bytes)
}

/// Writes a state to a file, and what the host holds of it to the disk.
pub fn write(state: &State, file: &mut File) -> Result<(), FileError> {
    file.write_all(&encode(state)?)?;
    Ok(file.sync_data()?)
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
