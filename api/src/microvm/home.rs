//! The directory that holds everything one microVM has on the host, and its removal.
//!
//! ```text
//! <run_dir>/.lock              held while a home is made or swept away
//! <run_dir>/<id>/lock          held as long as somebody drives the microVM
//!                vmm.pid       the VMM's process number
//!                vmm.log       the VMM's own log (its standard error)
//!                console.log   the guest's serial console (the VMM's standard output)
//!                cgroup        path of its control group, if it has one
//!                loans.json    files outside whose owner was changed for the VMM, and who owned them
//!                root/         the jail; not writable by the VMM
//!                root/run/     owned by the VMM's user: api.sock, vsock.sock
//! ```
//!
//! Only `root/run` is writable by the VMM, so nothing else here can be made into a trap.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::cgroup;
use super::process::PidFd;

/// How long a killed VMM may take to be gone.
const DIES_WITHIN: Duration = Duration::from_secs(5);
/// Users for jails: none of Debian's, systemd's or the usual container ranges.
pub const JAIL_USERS: std::ops::Range<u32> = 2_000_000_000..2_000_065_536;

/// A home cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    #[error("there is already a microVM named {id} (in {})", dir.display())]
    Exists { id: String, dir: PathBuf },
    #[error("cannot make {}: {source}", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("no user is free for the jail: {} are in use", JAIL_USERS.len())]
    NoUser,
}

/// A microVM's directory. Dropping it leaves everything in place but the lock; see [`Home::remove`].
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
    /// User and group of the VMM, if it is jailed.
    jail_user: Option<u32>,
    _lock: Flock<File>,
}

/// A file outside whose owner was changed for the time of the microVM.
#[derive(Debug, Serialize, Deserialize)]
struct Loan {
    path: PathBuf,
    uid: u32,
    gid: u32,
}

impl Home {
    /// Makes the home of microVM `id` below `run_dir`, which is made if need be. With `jailed`, a user that no
    /// other home uses is chosen and given `root/run`.
    ///
    /// # Errors
    ///
    /// [`HomeError`]; nothing is left then.
    pub fn create(run_dir: &Path, id: &str, jailed: bool) -> Result<Self, HomeError> {
        let make = |path: &Path| {
            let path = path.to_owned();
            move |source| HomeError::Make { path, source }
        };
        private_dir().recursive(true).create(run_dir).map_err(make(run_dir))?;
        let _making = lock(&run_dir.join(".lock"), FlockArg::LockExclusive).map_err(make(run_dir))?;
        let dir = run_dir.join(id);
        let jail_user = if jailed { Some(free_user(run_dir).ok_or(HomeError::NoUser)?) } else { None };
        match private_dir().create(&dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(HomeError::Exists { id: id.to_owned(), dir });
            }
            result => result.map_err(make(&dir))?,
        }
        Self::furnish(&dir, jail_user).map_err(|source| {
            let _ = fs::remove_dir_all(&dir);
            HomeError::Make { path: dir, source }
        })
    }

    fn furnish(dir: &Path, jail_user: Option<u32>) -> io::Result<Self> {
        let lock = lock(&dir.join("lock"), FlockArg::LockExclusiveNonblock)?;
        let home = Home { dir: dir.to_owned(), jail_user, _lock: lock };
        DirBuilder::new().mode(0o755).create(home.root())?;
        private_dir().create(home.root().join("run"))?;
        if let Some(user) = jail_user {
            chown(home.root().join("run"), Some(user), Some(user))?;
        }
        Ok(home)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// User and group number of the VMM, if it is jailed.
    pub fn jail_user(&self) -> Option<u32> {
        self.jail_user
    }

    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// A socket, as the host sees it.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.root().join("run").join(name)
    }

    pub fn pid_file(&self) -> PathBuf {
        self.dir.join("vmm.pid")
    }

    pub fn vmm_log(&self) -> PathBuf {
        self.dir.join("vmm.log")
    }

    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Writes down which control group is to be removed with this home.
    pub fn record_cgroup(&self, path: &Path) -> io::Result<()> {
        fs::write(self.dir.join("cgroup"), path.as_os_str().as_bytes())
    }

    /// Gives `path` to the VMM's user until the home is removed.
    pub fn borrow(&self, path: &Path) -> io::Result<()> {
        let Some(user) = self.jail_user else { return Ok(()) };
        let owner = fs::metadata(path)?;
        let mut loans = loans(&self.dir);
        loans.push(Loan { path: path.to_owned(), uid: owner.uid(), gid: owner.gid() });
        // Written down first: a loan that was not made is harmless to give back.
        fs::write(self.dir.join("loans.json"), serde_json::to_vec(&loans)?)?;
        chown(path, Some(user), Some(user))
    }

    /// Kills what is left of the microVM and removes everything it has on the host.
    ///
    /// May take some seconds if the kernel is slow to bury it. Goes on after an error, as far as it can.
    ///
    /// # Errors
    ///
    /// The first thing that could not be removed.
    pub fn remove(self) -> io::Result<()> {
        remove(&self.dir)
    }
}

/// Removes the homes in `run_dir` that nobody drives any more, and ends the VMMs that still run in them.
/// Returns the microVMs' names. To be called by whoever makes the homes there.
///
/// # Errors
///
/// `run_dir` cannot be read, or the first home that could not be removed; the others were.
pub fn sweep(run_dir: &Path) -> io::Result<Vec<String>> {
    let Ok(_sweeping) = lock(&run_dir.join(".lock"), FlockArg::LockExclusive) else {
        return Ok(Vec::new()); // Nothing was ever made here.
    };
    let mut swept = Vec::new();
    let mut result = Ok(());
    for entry in fs::read_dir(run_dir)? {
        let dir = entry?.path();
        let id = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if !dir.is_dir() || lock(&dir.join("lock"), FlockArg::LockExclusiveNonblock).is_err() {
            continue;
        }
        match remove(&dir) {
            Ok(()) => swept.push(id),
            Err(e) if result.is_ok() => result = Err(e),
            Err(_) => {}
        }
    }
    result.map(|()| swept)
}

fn remove(dir: &Path) -> io::Result<()> {
    let killed = kill_vmm(dir);
    let cgroup = match fs::read_to_string(dir.join("cgroup")) {
        Ok(path) if !path.is_empty() => cgroup::remove(Path::new(&path)),
        _ => Ok(()),
    };
    let returned =
        loans(dir).iter().try_for_each(|loan| match chown(&loan.path, Some(loan.uid), Some(loan.gid)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        });
    // A directory with a live VMM or an unreturned loan is kept: it is the only record of them.
    killed?;
    returned?;
    fs::remove_dir_all(dir)?;
    cgroup
}

/// Kills the VMM this home records, if it still runs, and waits until it is gone.
fn kill_vmm(dir: &Path) -> io::Result<()> {
    let number = fs::read_to_string(dir.join("vmm.pid")).unwrap_or_default();
    let Ok(pid) = number.trim().parse::<i32>() else { return Ok(()) };
    // Held before it is looked at, so that what is looked at is what is killed.
    let Ok(process) = PidFd::open(pid) else { return Ok(()) };
    if !is_vmm_of(pid, dir) {
        return Ok(());
    }
    process.signal(Signal::SIGKILL)?;
    match process.wait(DIES_WITHIN)? {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::TimedOut, format!("VMM process {pid} does not die"))),
    }
}

/// Whether process `pid` is the VMM of the home `dir`: a jailed one has its root there, another one was
/// started with its socket. Process numbers are used again, so a number alone says nothing.
fn is_vmm_of(pid: i32, dir: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let root = identity(&dir.join("root"));
    if root.is_some() && identity(Path::new(&format!("/proc/{pid}/root"))) == root {
        return true;
    }
    let socket = dir.join("root/run/api.sock");
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    arguments.split(|byte| *byte == 0).any(|argument| argument == socket.as_os_str().as_bytes())
}

fn loans(dir: &Path) -> Vec<Loan> {
    let bytes = fs::read(dir.join("loans.json")).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// The first user of [`JAIL_USERS`] that owns no home's `root/run`.
fn free_user(run_dir: &Path) -> Option<u32> {
    let owner =
        |entry: io::Result<fs::DirEntry>| Some(fs::metadata(entry.ok()?.path().join("root/run")).ok()?.uid());
    let used: Vec<u32> = fs::read_dir(run_dir).ok()?.filter_map(owner).collect();
    JAIL_USERS.into_iter().find(|user| !used.contains(user))
}

fn private_dir() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}

/// Opens, makes if need be, and locks a file.
fn lock(path: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    Flock::lock(file, how).map_err(|(_, errno)| errno.into())
}

#[cfg(test)]
#[path = "home_tests.rs"]
mod tests;
