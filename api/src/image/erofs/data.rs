//! The contents of files, on their way into an EROFS image.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::files::{FileError, IoContext, Task};
use crate::image::blobs::{Room, write_sparse};

use super::format::{BLOCK, INLINE_LIMIT, blocks};

const CHUNK: usize = 1 << 20;

/// Where a file's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// In whole blocks from `block` on; `size` is in bytes.
    Blocks { block: u64, size: u64 },
    /// Beside the image until it is finished, `size` bytes; 0 for an empty file.
    Small { at: u64, size: u16 },
}

impl Extent {
    /// Bytes.
    pub fn size(self) -> u64 {
        match self {
            Extent::Blocks { size, .. } => size,
            Extent::Small { size, .. } => size.into(),
        }
    }
}

/// An image being filled with contents.
pub struct DataArea<'a> {
    image: &'a File,
    path: &'a Path,
    /// Small contents, one after the other.
    small: File,
    small_size: u64,
    next_block: u64,
    room: Room<'a>,
    buffer: Vec<u8>,
}

impl<'a> DataArea<'a> {
    /// `image` is an empty file at `path`, `small` another for data that is needed until the end.
    pub fn new(image: &'a File, path: &'a Path, small: File, room: Room<'a>) -> Self {
        DataArea { image, path, small, small_size: 0, next_block: 1, room, buffer: vec![0; CHUNK] }
    }

    /// Stores exactly `size` bytes from `data`.
    ///
    /// # Errors
    ///
    /// Reading fails or ends too early (passed on as it came), writing fails, the task is cancelled.
    pub fn put(&mut self, data: &mut dyn Read, size: u64, task: &Task) -> io::Result<Extent> {
        if size <= INLINE_LIMIT {
            // At most INLINE_LIMIT, so it fits.
            let content = &mut self.buffer[..size as usize];
            data.read_exact(content)?;
            let at = self.small_size;
            self.small.write_all_at(content, at).context("write beside", self.path)?;
            self.room.used(size)?;
            self.small_size += size;
            return Ok(Extent::Small { at, size: size as u16 });
        }
        let block = self.next_block;
        let start = block.saturating_mul(BLOCK);
        let mut done = 0;
        while done < size {
            task.check()?;
            let chunk = (size - done).min(CHUNK as u64) as usize;
            data.read_exact(&mut self.buffer[..chunk])?;
            let written = write_sparse(self.image, &self.buffer[..chunk], start.saturating_add(done));
            self.room.used(written.context("write", self.path)?)?;
            done += chunk as u64;
        }
        self.next_block = block.saturating_add(blocks(size));
        Ok(Extent::Blocks { block, size })
    }

    /// Gives back the disk space of content that is no longer in the image, where the file system can.
    ///
    /// # Errors
    ///
    /// It failed.
    pub fn forget(&self, extent: Extent) -> Result<(), FileError> {
        let Extent::Blocks { block, size } = extent else { return Ok(()) };
        let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // The image is far smaller than 2^63 bytes.
        let (at, length) = ((block * BLOCK) as i64, (blocks(size) * BLOCK) as i64);
        match fallocate(self.image, how, at, length) {
            Err(Errno::EOPNOTSUPP) => Ok(()),
            result => result.context("make a hole in", self.path),
        }
    }

    pub(super) fn image(&self) -> &File {
        self.image
    }

    pub(super) fn path(&self) -> &Path {
        self.path
    }

    /// The first block that is free.
    pub(super) fn next_block(&self) -> u64 {
        self.next_block
    }

    pub(super) fn read_small(&self, at: u64, into: &mut [u8]) -> Result<(), FileError> {
        self.small.read_exact_at(into, at).context("read beside", self.path)
    }
}
