//! A cgroup v2 directory the VMM joins by being born in it.
//!
//! Moving a running process between cgroups waits for every other process that forks or exits on the host,
//! which can take milliseconds; a child that is cloned into its cgroup waits for nobody.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::{Cgroup, CgroupLimit, Invalid, JailError};

const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// A cgroup with its limits set. One that was made here is removed on drop, so that a failure of a later
/// step leaves none; [`Prepared::keep`] ends that.
pub(super) struct Prepared<'a> {
    config: &'a Cgroup,
    /// Where it is, by descriptor: the path means something else once the root has changed.
    parent: OwnedFd,
    name: &'a OsStr,
    dir: Option<OwnedFd>,
    made: bool,
}

impl<'a> Prepared<'a> {
    pub(super) fn new(config: &'a Cgroup) -> Result<Self, JailError> {
        let path = &config.path;
        let failed = |errno: Errno| JailError::Cgroup { path: path.clone(), source: errno.into() };
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Invalid::NotAbsolute(path.clone()).into());
        };
        let parent = open(parent, DIRECTORY, Mode::empty()).map_err(failed)?;
        if fstatfs(&parent).map_err(failed)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(JailError::NotCgroup2 { path: path.clone() });
        }
        let made = match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) => true,
            Err(Errno::EEXIST) => false,
            Err(errno) => return Err(failed(errno)),
        };
        let mut this = Self { config, parent, name, dir: None, made };
        let dir = openat(&this.parent, name, DIRECTORY | OFlag::O_NOFOLLOW, Mode::empty()).map_err(failed)?;
        for limit in &config.limits {
            this.limit(&dir, limit)?;
        }
        this.dir = Some(dir);
        Ok(this)
    }

    fn limit(&self, dir: &OwnedFd, CgroupLimit { file, value }: &CgroupLimit) -> Result<(), JailError> {
        let path = || self.config.path.clone();
        let opened = openat(dir, file.as_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
        let refused = |source| JailError::CgroupLimit {
            path: path(),
            file: file.clone(),
            value: value.clone(),
            source,
        };
        match opened {
            Ok(fd) => File::from(fd).write_all(value.as_bytes()).map_err(refused),
            // The kernel answers EACCES to making a file in this file system, ENOENT to looking for one.
            Err(Errno::ENOENT) => Err(JailError::NoController { path: path(), file: file.clone() }),
            Err(errno) => Err(refused(errno.into())),
        }
    }

    /// The directory, to clone a child into.
    pub(super) fn dir(&self) -> Option<BorrowedFd<'_>> {
        self.dir.as_ref().map(AsFd::as_fd)
    }

    /// Moves this process into the cgroup.
    pub(super) fn join(&self) -> Result<(), JailError> {
        let join = |dir: BorrowedFd<'_>| -> io::Result<()> {
            let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
            File::from(openat(dir, "cgroup.procs", flags, Mode::empty())?).write_all(b"0")
        };
        match self.dir() {
            Some(dir) => {
                join(dir).map_err(|source| JailError::Cgroup { path: self.config.path.clone(), source })
            }
            None => Ok(()),
        }
    }

    /// There is a process in it now: whoever asked for it removes it when that has ended.
    pub(super) fn keep(mut self) {
        self.made = false;
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        if self.made {
            self.dir = None;
            // On the way out with an error that matters more.
            let _ = unlinkat(&self.parent, self.name, UnlinkatFlags::RemoveDir);
        }
    }
}
