//! Tells the caller the pid of the jailed process, which is not the one it started.
//!
//! The file appears whole under its name or not at all: it is written beside and renamed. It lies outside
//! the jail, where the jailed process cannot change it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::JailError;

/// A file that will hold a pid; what has been made of it so far is removed on drop.
pub(super) struct PidFile<'a> {
    path: &'a Path,
    /// Where it is, by descriptor: the path means something else once the root has changed.
    parent: OwnedFd,
    name: &'a OsStr,
    temporary: OsString,
    file: Option<File>,
}

impl<'a> PidFile<'a> {
    pub(super) fn create(path: &'a Path) -> Result<Self, JailError> {
        let failed = |source| JailError::PidFile { path: path.to_owned(), source };
        let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let parent = open(parent, directory, Mode::empty()).map_err(|e| failed(e.into()))?;
        let mut temporary = name.to_owned();
        temporary.push(".new");
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o644);
        let file = openat(&parent, temporary.as_os_str(), flags, mode).map_err(|e| failed(e.into()))?;
        Ok(Self { path, parent, name, temporary, file: Some(file.into()) })
    }

    /// Puts `pid` and a line end into the file and gives it its name.
    pub(super) fn write(mut self, pid: libc::pid_t) -> Result<(), JailError> {
        let write = |mut file: &File| -> io::Result<()> {
            file.write_all(format!("{pid}\n").as_bytes())?;
            renameat(&self.parent, self.temporary.as_os_str(), &self.parent, self.name).map_err(Errno::into)
        };
        match self.file.as_ref().map(write) {
            Some(Err(source)) => Err(JailError::PidFile { path: self.path.to_owned(), source }),
            Some(Ok(())) | None => {
                self.file = None;
                Ok(())
            }
        }
    }

    /// Closes the file and leaves it alone: the process that writes it is another.
    pub(super) fn leave(mut self) {
        self.file = None;
    }
}

impl Drop for PidFile<'_> {
    fn drop(&mut self) {
        if self.file.is_some() {
            // On the way out with an error that matters more.
            let _ = unlinkat(&self.parent, self.temporary.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}
