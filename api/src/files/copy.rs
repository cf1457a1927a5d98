//! Copies of files: shared blocks where the file system can, else data without the holes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::unistd::{Whence, lseek64};

use super::{FileError, IoContext, Phase, Task};

/// Copied at once: long enough to be fast, short enough to be cancelled.
const CHUNK: u64 = 8 << 20;

/// How a copy came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Both files share their blocks until one is written to (reflink).
    Shared,
    /// Data was copied, holes were not.
    Copied,
}

/// Opens a file of a user's for reading, and waits for nobody: a pipe or a device under its name is refused.
///
/// # Errors
///
/// It cannot be opened, or is not a regular file.
pub fn open_regular(path: &Path) -> Result<File, FileError> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).context("open", path)?;
    match file.metadata().context("look at", path)?.is_file() {
        true => Ok(file),
        false => Err(FileError::NotAFile { path: path.to_owned() }),
    }
}

nix::ioctl_write_int!(ficlone, 0x94, 9);

/// Makes the empty file `to` a copy of `from`, of the same length.
///
/// # Errors
///
/// Reading or writing fails, or the task is cancelled. `to` is of no use then.
pub fn clone(from: &File, to: &File, to_path: &Path, task: &Task) -> Result<How, FileError> {
    if share(from, to).context("clone into", to_path)? {
        return Ok(How::Shared);
    }
    copy_sparse(from, to, to_path, task).map(|()| How::Copied)
}

/// Lets the empty file `to` share all blocks of `from`, if the file system can. ext4 and tmpfs cannot; others can,
/// but not across each other.
///
/// # Errors
///
/// It could, but failed.
pub fn share(from: &File, to: &File) -> nix::Result<bool> {
    // SAFETY: FICLONE takes a descriptor as its argument and touches no memory of ours.
    match unsafe { ficlone(to.as_raw_fd(), from.as_raw_fd() as _) } {
        Ok(_) => Ok(true),
        Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EXDEV | Errno::EINVAL | Errno::ENOSYS) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Copies the data of `from` to the empty file `to`, leaving holes where there are none.
///
/// # Errors
///
/// See [`clone`].
pub fn copy_sparse(from: &File, to: &File, to_path: &Path, task: &Task) -> Result<(), FileError> {
    let length = from.metadata().context("look at the source of", to_path)?.len();
    to.set_len(length).context("set the size of", to_path)?;
    let mut at = 0;
    while at < length {
        let Some((start, end)) = next_data(from, at, length).context("look for data for", to_path)? else {
            break;
        };
        at = start;
        while at < end {
            task.at(Phase::Copy, at, Some(length))?;
            let copied = copy_range(from, to, at, CHUNK.min(end - at)).context("write", to_path)?;
            if copied == 0 {
                let cut =
                    io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was copied");
                return Err(cut).context("copy into", to_path);
            }
            at = at.saturating_add(copied);
        }
    }
    task.at(Phase::Copy, length, Some(length))
}

/// The first range with data at or after `at`.
fn next_data(file: &File, at: u64, length: u64) -> nix::Result<Option<(u64, u64)>> {
    let offset = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
    let start = match lseek64(file, offset, Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some((at, length))), // No holes here.
        Err(e) => return Err(e),
    };
    let end = lseek64(file, start, Whence::SeekHole)?;
    // Offsets the kernel gives are not negative.
    Ok(Some((start.unsigned_abs(), end.unsigned_abs().min(length))))
}

fn copy_range(from: &File, to: &File, at: u64, length: u64) -> io::Result<u64> {
    let offset = i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
    let count = usize::try_from(length).unwrap_or(usize::MAX);
    let (mut source, mut target) = (offset, offset);
    match copy_file_range(from, Some(&mut source), to, Some(&mut target), count) {
        Ok(copied) => Ok(copied as u64),
        Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS) => by_hand(from, to, at, count),
        Err(Errno::EINTR) => copy_range(from, to, at, length),
        Err(e) => Err(e.into()),
    }
}

fn by_hand(from: &File, to: &File, at: u64, count: usize) -> io::Result<u64> {
    let mut buffer = vec![0; count.min(1 << 20)];
    let read = from.read_at(&mut buffer, at)?;
    to.write_all_at(&buffer[..read], at)?;
    Ok(read as u64)
}
