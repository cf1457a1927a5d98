//! Files that appear whole or not at all.
//!
//! A file is written in a staging directory on the file system it is meant for, synced, and renamed into its
//! place. Dropped before that it is removed; what a killed process leaves in the staging directory,
//! [`Staging::sweep`] removes at the next start.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{FileError, IoContext};
use crate::fault;

/// A directory for files on their way. Only one process at a time may use it.
#[derive(Clone, Debug)]
pub struct Staging {
    dir: PathBuf,
}

impl Staging {
    /// Makes the directory if need be.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn open(dir: PathBuf) -> Result<Self, FileError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).context("make", &dir)?;
        Ok(Staging { dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A new empty file, readable and writable by its owner alone.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn file(&self) -> Result<Staged, FileError> {
        let file = tempfile::Builder::new().prefix("new-").tempfile_in(&self.dir);
        let file = file.context("make a file in", &self.dir)?;
        fault::point("file.begun");
        Ok(Staged { file })
    }

    /// A file without a name, for data that is needed only now.
    ///
    /// # Errors
    ///
    /// It cannot be made.
    pub fn scratch(&self) -> Result<File, FileError> {
        tempfile::tempfile_in(&self.dir).context("make a file in", &self.dir)
    }

    /// Removes everything in the directory. To be called once, before anything is staged.
    ///
    /// # Errors
    ///
    /// The first thing that could not be removed; the others were.
    pub fn sweep(&self) -> Result<usize, FileError> {
        let mut swept = 0;
        let mut result = Ok(());
        for entry in fs::read_dir(&self.dir).context("read", &self.dir)? {
            let entry = entry.context("read", &self.dir)?;
            let path = entry.path();
            let removed = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir_all(&path),
                _ => fs::remove_file(&path),
            };
            match removed {
                Ok(()) => swept += 1,
                Err(e) if result.is_ok() => result = Err(FileError::io("remove", &path, e)),
                Err(_) => {}
            }
        }
        result.map(|()| swept)
    }
}

/// A file on its way. Removed when dropped.
#[derive(Debug)]
pub struct Staged {
    file: NamedTempFile,
}

impl Staged {
    pub fn file(&self) -> &File {
        self.file.as_file()
    }

    pub fn file_mut(&mut self) -> &mut File {
        self.file.as_file_mut()
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives the file its mode, makes it durable and moves it to `place`.
    ///
    /// # Errors
    ///
    /// There is something at `place` already (kind `AlreadyExists`), or the file could not be moved. It is
    /// removed then.
    pub fn persist(self, place: &Path, mode: u32) -> Result<(), FileError> {
        self.finish(mode)?;
        fault::point("file.synced");
        self.file.persist_noclobber(place).map_err(|e| e.error).context("make", place)?;
        fault::point("file.placed");
        sync_parent(place)
    }

    /// Like [`Self::persist`], in place of what is there.
    ///
    /// # Errors
    ///
    /// The file could not be moved. It is removed then.
    pub fn replace(self, place: &Path, mode: u32) -> Result<(), FileError> {
        self.finish(mode)?;
        fault::point("file.synced");
        self.file.persist(place).map_err(|e| e.error).context("make", place)?;
        fault::point("file.placed");
        sync_parent(place)
    }

    fn finish(&self, mode: u32) -> Result<(), FileError> {
        let file = self.file.as_file();
        file.set_permissions(Permissions::from_mode(mode)).context("set the mode of", self.file.path())?;
        file.sync_all().context("sync", self.file.path())
    }
}

/// Makes the entries of a directory durable.
///
/// # Errors
///
/// The directory cannot be synced.
pub fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir).and_then(|dir| dir.sync_all()).context("sync", dir)
}

fn sync_parent(path: &Path) -> Result<(), FileError> {
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// Removes a file for good. One that is not there is as good as removed.
///
/// # Errors
///
/// It is still there.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => {
            result.context("remove", path)?;
            sync_parent(path)
        }
    }
}
