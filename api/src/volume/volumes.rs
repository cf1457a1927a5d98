//! Volumes: made, grown, looked at, removed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::files::{self, FileError, How, IoContext, Staged, Staging, Task};

use super::VolumeError;
use super::layout::check_size;

/// Only root reads disks; a VMM is lent its own.
const MODE: u32 = 0o600;

/// The disks of one data directory.
#[derive(Clone, Debug)]
pub struct Volumes {
    pub(super) dir: PathBuf,
    pub(super) snapshots: PathBuf,
    pub(super) staging: Staging,
    /// For snapshots, which may be on another file system.
    pub(super) snapshot_staging: Staging,
    /// Bytes that stay free.
    pub(super) reserve: u64,
}

/// What is on a new volume.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Nothing: it reads as zeros.
    Blank,
    /// An empty ext4 file system with a UUID of its own.
    Ext4,
    /// A copy of this disk, and zeros after it.
    Disk(&'a Path),
    /// A copy of this ext4 file system, one that [`Content::Ext4`] began as, with a UUID of its own, grown to the
    /// volume's size.
    Layer(&'a Path),
}

/// Both in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// As the guest sees it.
    pub size: u64,
    /// On the host's disk; blocks that copies share count for each of them.
    pub allocated: u64,
}

impl Volumes {
    /// Opens the disks below `data_dir`, making directories if need be. `reserve` is how many bytes of the file
    /// system are to stay free.
    ///
    /// # Errors
    ///
    /// A directory cannot be made.
    pub fn open(data_dir: &Path, reserve: u64) -> Result<Self, FileError> {
        let (dir, snapshots) = (data_dir.join("volumes"), data_dir.join("snapshots"));
        for made in [&dir.join("templates"), &snapshots] {
            DirBuilder::new().recursive(true).mode(0o700).create(made).context("make", made)?;
        }
        let (staging, snapshot_staging) =
            (Staging::open(dir.join("tmp"))?, Staging::open(snapshots.join("tmp"))?);
        Ok(Volumes { dir, snapshots, staging, snapshot_staging, reserve })
    }

    /// Removes what a killed process left half-written. To be called once at start, before anything else.
    ///
    /// # Errors
    ///
    /// Something could not be removed.
    pub fn sweep(&self) -> Result<usize, FileError> {
        Ok(self.staging.sweep()? + self.snapshot_staging.sweep()?)
    }

    /// Makes sure that the disk is not so full that nothing can be made.
    ///
    /// # Errors
    ///
    /// [`FileError::NoSpace`].
    pub fn check_room(&self) -> Result<(), VolumeError> {
        Ok(files::require(&self.dir, 1, self.reserve)?)
    }

    /// Makes a volume of `size` bytes. If it is there already, with this size, it stays as it is.
    ///
    /// # Errors
    ///
    /// [`VolumeError`]; there is no such volume then.
    pub fn create(&self, id: &str, content: Content<'_>, size: u64, task: &Task) -> Result<(), VolumeError> {
        check_size(size)?;
        let place = self.path(id)?;
        if self.is_there(id, &place, Some(size))? {
            return Ok(());
        }
        self.check_room()?;
        let staged = match content {
            Content::Blank => {
                let staged = self.staging.file()?;
                staged.file().set_len(size).context("set the size of", staged.path())?;
                staged
            }
            Content::Ext4 => {
                let staged = self.copy(&self.template(size, task)?, size, &self.staging, task)?;
                files::new_ext4_identity(staged.file()).context("give a UUID to", staged.path())?;
                staged
            }
            Content::Disk(from) => self.copy(from, size, &self.staging, task)?,
            Content::Layer(from) => {
                let staged = self.copy(from, size, &self.staging, task)?;
                if fs::metadata(from).context("look at", from)?.len() < size {
                    files::grow_ext4(staged.path(), task)?;
                }
                files::new_ext4_identity(staged.file()).context("give a UUID to", staged.path())?;
                staged
            }
        };
        task.check()?;
        Ok(staged.persist(&place, MODE)?)
    }

    /// Makes a volume larger; what it holds is not touched. A running guest sees the new size once its VMM has been
    /// told. If the volume has this size already, nothing happens.
    ///
    /// # Errors
    ///
    /// [`VolumeError::NotFound`], [`VolumeError::Shrink`].
    pub fn grow(&self, id: &str, size: u64) -> Result<(), VolumeError> {
        check_size(size)?;
        let has = self.usage(id)?.size;
        if size < has {
            return Err(VolumeError::Shrink { id: id.to_owned(), has, wanted: size });
        }
        let path = self.path(id)?;
        let file = File::options().write(true).open(&path).context("open", &path)?;
        file.set_len(size).context("set the size of", &path)?;
        Ok(file.sync_all().context("sync", &path)?)
    }

    /// Makes the ext4 file system that fills the beginning of a volume fill all of it. The volume must be detached.
    ///
    /// # Errors
    ///
    /// There is no ext4 file system on it, or a damaged one.
    pub fn grow_file_system(&self, id: &str, task: &Task) -> Result<(), VolumeError> {
        self.usage(id)?;
        Ok(files::grow_ext4(&self.path(id)?, task)?)
    }

    /// # Errors
    ///
    /// [`VolumeError::NotFound`].
    pub fn usage(&self, id: &str) -> Result<Usage, VolumeError> {
        usage(id, &self.path(id)?)
    }

    /// Whether there is a volume of this name.
    ///
    /// # Errors
    ///
    /// It cannot be looked at.
    pub fn exists(&self, id: &str) -> Result<bool, VolumeError> {
        self.is_there(id, &self.path(id)?, None)
    }

    /// Removes a volume. One that is not there is as good as removed.
    ///
    /// # Errors
    ///
    /// It is still there.
    pub fn delete(&self, id: &str) -> Result<(), VolumeError> {
        Ok(files::remove(&self.path(id)?)?)
    }

    /// The names of all volumes.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<String>, VolumeError> {
        names(&self.dir)
    }

    /// A copy of `from` with `size` bytes, on its way in `staging`.
    pub(super) fn copy(
        &self,
        from: &Path,
        size: u64,
        staging: &Staging,
        task: &Task,
    ) -> Result<Staged, VolumeError> {
        let source = File::open(from).context("open", from)?;
        let meta = source.metadata().context("look at", from)?;
        if meta.len() > size {
            return Err(VolumeError::TooSmall { has: meta.len(), wanted: size });
        }
        let staged = staging.file()?;
        if files::share(&source, staged.file()).context("clone into", staged.path())? {
            staged.file().set_len(size).context("set the size of", staged.path())?;
            return Ok(staged);
        }
        let needed = meta.blocks().saturating_mul(512).min(meta.len());
        files::require(staging.dir(), needed, self.reserve)?;
        let how = files::clone(&source, staged.file(), staged.path(), task)?;
        debug_assert_eq!(how, How::Copied);
        staged.file().set_len(size).context("set the size of", staged.path())?;
        Ok(staged)
    }

    /// The empty ext4 file system of this size, made if there is none yet.
    fn template(&self, size: u64, task: &Task) -> Result<PathBuf, VolumeError> {
        let place = self.template_path(size);
        if place.exists() {
            return Ok(place);
        }
        let staged = self.staging.file()?;
        staged.file().set_len(size).context("set the size of", staged.path())?;
        files::make_ext4(staged.path(), task)?;
        // Should another have been quicker, this one is as good.
        staged.replace(&place, 0o400)?;
        Ok(place)
    }

    /// Whether a disk is there already. With `size`, it must be of that size.
    pub(super) fn is_there(&self, id: &str, path: &Path, size: Option<u64>) -> Result<bool, VolumeError> {
        match usage(id, path) {
            Ok(usage) if size.is_none_or(|size| size == usage.size) => Ok(true),
            Ok(usage) => Err(VolumeError::Exists { id: id.to_owned(), size: usage.size }),
            Err(VolumeError::NotFound { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

pub(super) fn usage(id: &str, path: &Path) -> Result<Usage, VolumeError> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(VolumeError::NotFound { id: id.to_owned() }),
        result => {
            let meta = result.context("look at", path)?;
            Ok(Usage { size: meta.len(), allocated: meta.blocks().saturating_mul(512) })
        }
    }
}

/// The names of the disks in a directory, in order.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, VolumeError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).context("read", dir)? {
        let name = entry.context("read", dir)?.file_name();
        names.extend(name.to_str().and_then(|name| name.strip_suffix(".raw")).map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
