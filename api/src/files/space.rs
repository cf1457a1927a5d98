//! Room on the disk.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::{FileError, IoContext};

/// Bytes that may be written below `dir` without going below the reserve of `reserve` bytes.
///
/// # Errors
///
/// The file system cannot be asked.
pub fn available(dir: &Path, reserve: u64) -> Result<u64, FileError> {
    let stat = statvfs(dir).context("look for free space in", dir)?;
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    Ok(free.saturating_sub(reserve))
}

/// Makes sure that `needed` bytes can be written below `dir`, and `reserve` are free afterwards.
///
/// This is a look, not a claim: what others write meanwhile can still fill the disk, and is reported as the
/// same error by whoever meets it.
///
/// # Errors
///
/// [`FileError::NoSpace`].
pub fn require(dir: &Path, needed: u64, reserve: u64) -> Result<(), FileError> {
    let available = available(dir, reserve)?;
    match needed <= available {
        true => Ok(()),
        false => Err(FileError::NoSpace { dir: dir.to_owned(), needed: Some(needed), available }),
    }
}
