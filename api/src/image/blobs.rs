//! Content-addressed storage: files named by the SHA-256 of what is in them, never changed once they are there.
//!
//! ```text
//! images/blobs/sha256/<64 hex digits>   mode 0444
//! images/tmp/                           files on their way; emptied at start
//! ```

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::files::{self, FileError, IoContext, Phase, Staged, Staging, Task};

use super::digest::Hashing;
use super::{Digest, ImageError};

/// Blobs are everybody's to read (a VMM maps them under a user of its own) and nobody's to write.
const MODE: u32 = 0o444;
const CHUNK: usize = 1 << 20;
/// Data is looked through for zeros in pieces of this size, which become holes.
const HOLE: usize = 4096;
/// A blob younger than this is kept by [`Blobs::collect`] even if nothing refers to it: its manifest may be on its
/// way to the caller's records.
const GRACE: Duration = Duration::from_secs(3600);

/// One blob, as a manifest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blob {
    pub digest: Digest,
    /// Bytes, holes included.
    pub size: u64,
}

/// The blobs of one data directory.
#[derive(Clone, Debug)]
pub struct Blobs {
    dir: PathBuf,
    staging: Staging,
    /// Bytes that stay free.
    reserve: u64,
}

impl Blobs {
    /// Opens the storage below `images`, making the directories if need be. `reserve` is how many bytes of the file
    /// system are to stay free.
    ///
    /// # Errors
    ///
    /// A directory cannot be made.
    pub fn open(images: &Path, reserve: u64) -> Result<Self, FileError> {
        let dir = images.join("blobs/sha256");
        DirBuilder::new().recursive(true).mode(0o755).create(&dir).context("make", &dir)?;
        Ok(Blobs { dir, staging: Staging::open(images.join("tmp"))?, reserve })
    }

    /// Removes what a killed process left half-written. To be called once at start, before any import.
    ///
    /// # Errors
    ///
    /// Something could not be removed.
    pub fn sweep(&self) -> Result<usize, FileError> {
        self.staging.sweep()
    }

    /// Where a blob is, or would be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    /// Opens a blob for reading.
    ///
    /// # Errors
    ///
    /// [`ImageError::MissingBlob`], or it cannot be read.
    pub fn read(&self, digest: &Digest) -> Result<File, ImageError> {
        let path = self.path(digest);
        match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(ImageError::MissingBlob(*digest)),
            result => Ok(result.context("open", &path)?),
        }
    }

    pub(super) fn staging(&self) -> &Staging {
        &self.staging
    }

    pub(super) fn reserve(&self) -> u64 {
        self.reserve
    }

    /// Makes sure there is room for `needed` more bytes.
    pub(super) fn require(&self, needed: u64) -> Result<(), FileError> {
        files::require(&self.dir, needed, self.reserve)
    }

    /// Adds the content of a file of the user's, which stays theirs: sharing its blocks where the file system can,
    /// else copied while it is hashed, without its holes. Never a hard link: whoever owns the file could change the
    /// blob through it.
    ///
    /// # Errors
    ///
    /// Reading or writing fails, the disk is too full, the task is cancelled.
    pub fn add_file(&self, from: &Path, task: &Task) -> Result<Blob, ImageError> {
        let source = files::open_regular(from)?;
        let meta = source.metadata().context("look at", from)?;
        let staged = self.staging.file()?;
        if files::share(&source, staged.file()).context("clone into", staged.path())? {
            return self.add_staged(staged, task);
        }
        drop(staged);
        self.require(meta.blocks().saturating_mul(512).min(meta.len()))?;
        self.add_reader(source, from, Some(meta.len()), task)
    }

    /// Adds what a reader gives; `name` and `total` (bytes) are for messages and progress.
    ///
    /// # Errors
    ///
    /// As [`Self::add_file`].
    pub fn add_reader(
        &self,
        from: impl Read,
        name: &Path,
        total: Option<u64>,
        task: &Task,
    ) -> Result<Blob, ImageError> {
        let staged = self.staging.file()?;
        let mut from = Hashing::new(from);
        let mut room = Room::new(&self.dir, self.reserve);
        let mut buffer = vec![0; CHUNK];
        loop {
            let at = from.count();
            task.at(Phase::Copy, at, total)?;
            let count = fill(&mut from, &mut buffer).context("read", name)?;
            if count == 0 {
                break;
            }
            let written =
                write_sparse(staged.file(), &buffer[..count], at).context("write", staged.path())?;
            room.used(written)?;
        }
        let (digest, size) = from.finish();
        staged.file().set_len(size).context("set the size of", staged.path())?;
        self.keep(staged, Blob { digest, size })
    }

    /// Adds a staged file that is already on this file system and complete: it is hashed and renamed.
    ///
    /// # Errors
    ///
    /// Reading fails, the task is cancelled.
    pub fn add_staged(&self, mut staged: Staged, task: &Task) -> Result<Blob, ImageError> {
        use std::io::Seek;
        let path = staged.path().to_owned();
        staged.file_mut().rewind().context("read", &path)?;
        let (digest, size) = hash(staged.file(), &path, Phase::Verify, task)?;
        self.keep(staged, Blob { digest, size })
    }

    /// Moves a staged file into its place. If the blob is there already, the file is dropped.
    fn keep(&self, staged: Staged, blob: Blob) -> Result<Blob, ImageError> {
        let place = self.path(&blob.digest);
        match staged.persist(&place, MODE) {
            Ok(()) => Ok(blob),
            Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
                // Young again, so that a collection leaves it alone until somebody refers to it.
                touch(&place)?;
                Ok(blob)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Reads a blob and compares it with its digest and size.
    ///
    /// # Errors
    ///
    /// [`ImageError::MissingBlob`], [`ImageError::Digest`].
    pub fn verify(&self, blob: &Blob, task: &Task) -> Result<(), ImageError> {
        let path = self.path(&blob.digest);
        let (found, size) = hash(&self.read(&blob.digest)?, &path, Phase::Verify, task)?;
        let what = || path.display().to_string();
        if found != blob.digest {
            return Err(ImageError::Digest { what: what(), expected: blob.digest, found });
        }
        match size == blob.size {
            true => Ok(()),
            false => Err(ImageError::invalid(what(), format!("it has {size} bytes, not {}", blob.size))),
        }
    }

    /// Removes every blob that is not in `referenced`, except those added (or found again) within the last hour.
    /// Returns how many bytes of disk that freed. A blob that a VMM has open stays readable for it.
    ///
    /// # Errors
    ///
    /// The directory cannot be read, or the first blob that could not be removed; the others were.
    pub fn collect(&self, referenced: &HashSet<Digest>) -> Result<u64, FileError> {
        self.collect_older(referenced, GRACE)
    }

    fn collect_older(&self, referenced: &HashSet<Digest>, grace: Duration) -> Result<u64, FileError> {
        let mut freed = 0u64;
        let mut result = Ok(());
        for entry in fs::read_dir(&self.dir).context("read", &self.dir)? {
            let entry = entry.context("read", &self.dir)?;
            let name = entry.file_name();
            let digest = name.to_str().and_then(|hex| format!("sha256:{hex}").parse().ok());
            if digest.is_some_and(|digest| referenced.contains(&digest)) {
                continue;
            }
            let Ok(meta) = entry.metadata() else { continue };
            // A clock that was set back makes a blob look young: it goes later.
            let age = meta.modified().ok().and_then(|time| SystemTime::now().duration_since(time).ok());
            if age.is_none_or(|age| age < grace) {
                continue;
            }
            match fs::remove_file(entry.path()) {
                Ok(()) => freed = freed.saturating_add(meta.blocks().saturating_mul(512)),
                Err(e) if result.is_ok() => result = Err(FileError::io("remove", &entry.path(), e)),
                Err(_) => {}
            }
        }
        files::sync_dir(&self.dir)?;
        result.map(|()| freed)
    }
}

/// Looks for free space again each time this much has been written.
const LOOK_AGAIN: u64 = 64 << 20;

/// Keeps writing from eating the reserve.
pub(super) struct Room<'a> {
    dir: &'a Path,
    reserve: u64,
    unseen: u64,
}

impl<'a> Room<'a> {
    pub fn new(dir: &'a Path, reserve: u64) -> Self {
        Room { dir, reserve, unseen: LOOK_AGAIN }
    }

    /// Takes note of bytes written.
    pub fn used(&mut self, bytes: u64) -> Result<(), FileError> {
        self.unseen = self.unseen.saturating_add(bytes);
        if self.unseen < LOOK_AGAIN {
            return Ok(());
        }
        self.unseen = 0;
        files::require(self.dir, 1, self.reserve)
    }
}

/// Reads until the buffer is full or there is no more.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut full = 0;
    while full < buffer.len() {
        match from.read(&mut buffer[full..]) {
            Ok(0) => break,
            Ok(count) => full += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(full)
}

/// Writes what is not zero, and returns how much that was. The file must be empty from `at` on.
pub(super) fn write_sparse(to: &File, bytes: &[u8], at: u64) -> io::Result<u64> {
    let mut written = 0u64;
    let mut start = 0;
    // Runs of pieces that have something in them are written at once.
    while start < bytes.len() {
        let mut end = start;
        while end < bytes.len() {
            let piece = &bytes[end..bytes.len().min(end + HOLE)];
            if piece.iter().all(|byte| *byte == 0) {
                break;
            }
            end += piece.len();
        }
        if end > start {
            to.write_all_at(&bytes[start..end], at.saturating_add(start as u64))?;
            written += (end - start) as u64;
        }
        start = end.saturating_add(HOLE).min(bytes.len());
    }
    Ok(written)
}

fn hash(from: &File, path: &Path, phase: Phase, task: &Task) -> Result<(Digest, u64), FileError> {
    let total = from.metadata().context("look at", path)?.len();
    let mut to = Hashing::new(io::sink());
    let mut from = from;
    let mut buffer = vec![0; CHUNK];
    loop {
        task.at(phase, to.count(), Some(total))?;
        match fill(&mut from, &mut buffer).context("read", path)? {
            0 => return Ok(to.finish()),
            count => to.write_all(&buffer[..count]).context("hash", path)?,
        }
    }
}

fn touch(path: &Path) -> Result<(), FileError> {
    let now = nix::sys::time::TimeSpec::UTIME_NOW;
    let how = nix::sys::stat::UtimensatFlags::FollowSymlink;
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, path, &now, &now, how).context("touch", path)
}

#[cfg(test)]
#[path = "blobs_tests.rs"]
mod tests;
