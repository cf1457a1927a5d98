//! The file behind a block or persistent memory device: opening, size, lock, and the operations on it, made
//! at once.
//!
//! A disk open for writing is locked against every other use, one open for reading against writers, by
//! open-file-description locks: the other may be another process or another drive of this one. The lock is
//! advisory, so it holds between VMMs and tools that ask for it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::warn;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};

use super::buffers::GuestBuffers;

/// Bytes in a sector: the unit of sizes and positions, whatever the disk's own blocks.
pub const SECTOR: u64 = 512;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("cannot open {} for {}: {source}", path.display(), access(*.read_only))]
    Open { path: PathBuf, read_only: bool, source: io::Error },
    /// It is a directory, a pipe or something else without sectors.
    #[error("{} is neither a regular file nor a block device", path.display())]
    Kind { path: PathBuf },
    /// Its size would cut a sector.
    #[error("{} has {size} bytes, which is not a whole number of 512-byte sectors", path.display())]
    Size { path: PathBuf, size: u64 },
    /// It has no sectors.
    #[error("{} is empty", path.display())]
    Empty { path: PathBuf },
    /// Another drive, here or in another process, has it.
    #[error("{} is in use: it can be opened for {} only while {}", path.display(), access(*.read_only),
        if *.read_only { "nobody writes to it" } else { "nobody else uses it" })]
    InUse { path: PathBuf, read_only: bool },
    /// Its size or kind cannot be read.
    #[error("cannot examine {}: {source}", path.display())]
    Examine { path: PathBuf, source: io::Error },
}

fn access(read_only: bool) -> &'static str {
    if read_only { "reading" } else { "reading and writing" }
}

/// A range of bytes on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub offset: u64,
    pub len: u64,
}

/// How a range is made free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clear {
    /// Its contents no longer matter.
    Discard,
    /// It reads as zeroes; its space may be given back.
    ZeroUnmap,
    /// It reads as zeroes and keeps its space.
    ZeroKeep,
}

impl Clear {
    /// The mode of `fallocate`.
    pub fn mode(self) -> FallocateFlags {
        let how = match self {
            Self::Discard | Self::ZeroUnmap => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            Self::ZeroKeep => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        how | FallocateFlags::FALLOC_FL_KEEP_SIZE
    }
}

/// An open, locked disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    size: u64,
    read_only: bool,
    is_device: bool,
    /// Device and inode: what makes it the same file under another name.
    identity: (u64, u64),
}

impl Disk {
    /// Opens `path`, or says why it cannot be a disk. Nothing is waited for.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let disk = Self::examine(path, read_only)?;
        disk.lock()?;
        Ok(disk)
    }

    /// Opens `path` to take the place of `self`: the same file again (grown, say) is the same lock, so
    /// `None` stands for it after its size has been read anew.
    pub fn reopen(&mut self, path: &Path) -> Result<Option<Self>, DiskError> {
        let disk = Self::examine(path, self.read_only)?;
        if disk.identity == self.identity {
            self.size = disk.size;
            self.path = path.to_owned();
            return Ok(None);
        }
        disk.lock()?;
        Ok(Some(disk))
    }

    fn examine(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let path = path.to_owned();
        // Without O_NONBLOCK opening a pipe would wait for its other end.
        let file = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = match file {
            Ok(file) => file,
            Err(source) => return Err(DiskError::Open { path, read_only, source }),
        };
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(source) => return Err(DiskError::Examine { path, source }),
        };
        let is_device = metadata.file_type().is_block_device();
        if !is_device && !metadata.is_file() {
            return Err(DiskError::Kind { path });
        }
        let size = fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))
            .and_then(|_| nix::unistd::lseek(&file, 0, nix::unistd::Whence::SeekEnd));
        let size = match size {
            Ok(size) => u64::try_from(size).unwrap_or(0),
            Err(e) => return Err(DiskError::Examine { path, source: e.into() }),
        };
        if size == 0 {
            return Err(DiskError::Empty { path });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { path, size });
        }
        let identity = if is_device { (u64::MAX, metadata.rdev()) } else { (metadata.dev(), metadata.ino()) };
        Ok(Self { file, path, size, read_only, is_device, identity })
    }

    fn lock(&self) -> Result<(), DiskError> {
        let kind = if self.read_only { libc::F_RDLCK } else { libc::F_WRLCK };
        match self.set_lock(kind) {
            Ok(()) => Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                Err(DiskError::InUse { path: self.path.clone(), read_only: self.read_only })
            }
            // A file system without locks cannot tell, which is no reason to do without the disk.
            Err(e) => {
                warn!("{}: cannot lock it, so a second writer will not be noticed: {e}", self.path.display());
                Ok(())
            }
        }
    }

    fn set_lock(&self, kind: libc::c_int) -> nix::Result<()> {
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
    }

    /// Size in bytes, a whole number of sectors.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether discarding is a command to a device rather than a hole in a file.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Fills `into` from `offset` on, after its first `done` bytes. A file that has become too short is
    /// `UnexpectedEof`.
    pub fn read(&self, into: &GuestBuffers, offset: u64, done: usize) -> io::Result<()> {
        transfer(self.file.as_raw_fd(), Direction::Read, into, offset, done)
    }

    /// Writes `from` to `offset` on, after its first `done` bytes.
    pub fn write(&self, from: &GuestBuffers, offset: u64, done: usize) -> io::Result<()> {
        transfer(self.file.as_raw_fd(), Direction::Write, from, offset, done)
    }

    /// Puts what was written where a power loss cannot reach it.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the whole file its space, holes too. A file system or device that cannot stays as it is.
    pub fn reserve(&self) -> io::Result<()> {
        let size = libc::off_t::try_from(self.size).map_err(io::Error::other)?;
        match fallocate(&self.file, FallocateFlags::empty(), 0, size) {
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENODEV) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Frees a range. `EOPNOTSUPP` where the file system or the device cannot.
    pub fn clear(&self, range: Range, how: Clear) -> io::Result<()> {
        if how == Clear::Discard && self.is_device {
            return discard_device(&self.file, range);
        }
        let offset = libc::off_t::try_from(range.offset).map_err(io::Error::other)?;
        let len = libc::off_t::try_from(range.len).map_err(io::Error::other)?;
        Ok(fallocate(&self.file, how.mode(), offset, len)?)
    }
}

impl AsRawFd for Disk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Closing unlocks too, but an io_uring that had the file registered closes it some time later.
        let _ = self.set_lock(libc::F_UNLCK);
    }
}

fn discard_device(device: &File, range: Range) -> io::Result<()> {
    const BLKDISCARD: libc::Ioctl = 0x1277;
    let range = [range.offset, range.len];
    // SAFETY: BLKDISCARD reads two u64 from its argument, which outlives the call.
    match unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, &range) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

/// Moves all of `buffers` but the first `done` bytes: one call, and another for each range where the
/// kernel stopped early.
fn transfer(
    fd: RawFd,
    direction: Direction,
    buffers: &GuestBuffers,
    offset: u64,
    mut done: usize,
) -> io::Result<()> {
    while done < buffers.len() {
        let at = offset
            .checked_add(done as u64)
            .and_then(|o| libc::off_t::try_from(o).ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        let whole = done == 0 && buffers.pieces().len() > 1;
        let moved = if whole {
            many(fd, direction, buffers.pieces(), at)
        } else {
            // Some range holds byte `done`, since done < len.
            let Some(range) = buffers.piece_from(done) else { break };
            one(fd, direction, range, at)
        };
        match usize::try_from(moved) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
    Ok(())
}

fn one(fd: RawFd, direction: Direction, range: libc::iovec, at: libc::off_t) -> isize {
    // SAFETY: the range lies in guest memory, which stays mapped during the call and to which no
    // reference exists; what the guest does to it meanwhile is its own affair.
    unsafe {
        match direction {
            Direction::Read => libc::pread(fd, range.iov_base, range.iov_len, at),
            Direction::Write => libc::pwrite(fd, range.iov_base, range.iov_len, at),
        }
    }
}

fn many(fd: RawFd, direction: Direction, ranges: &[libc::iovec], at: libc::off_t) -> isize {
    let count = libc::c_int::try_from(ranges.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: as in `one`, for `count` ranges of the slice.
    unsafe {
        match direction {
            Direction::Read => libc::preadv(fd, ranges.as_ptr(), count, at),
            Direction::Write => libc::pwritev(fd, ranges.as_ptr(), count, at),
        }
    }
}
