//! The directory that holds everything one microVM has on the host, and its removal.
//!
//! ```text
//! <run_dir>/.lock              held while a home is made, or swept away
//! <run_dir>/<id>/lock          held as long as somebody drives the microVM
//!                vmm.pid       the VMM's process number, written by the VMM; a directory once it may not start
//!                vmm.log       the VMM's own log (its standard error)
//!                console.log   the guest's serial console (the VMM's standard output), unless
//!                console.json  names another file for it
//!                started       there once the guest has been told to boot
//!                exit          how the VMM ended, written by it
//!                cgroup        path of its control group, if it has one
//!                loans.json    files outside whose owner was changed for the VMM, and who owned them
//!                root/         the jail; not writable by the VMM
//!                root/run/     owned by the VMM's user: api.sock, vsock.sock
//! ```
//!
//! Only `root/run` is writable by the VMM, so nothing else here can be made into a trap. `vmm.log`, the console
//! and `exit` it can only write to, through descriptors it was given.
//!
//! Whoever drives a microVM may be killed at any moment; a home then tells the next one how far it had come.
//! A VMM that was spawned and has not written its number yet cannot be found, so it must not go on: removal
//! puts a directory where the number would go, and the VMM ends when it cannot write it.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::cgroup;
use super::console::ConsoleLog;
use super::process::{Exit, PidFd};
use crate::fault;

/// How long a killed VMM may take to be gone.
const DIES_WITHIN: Duration = Duration::from_secs(5);
/// A process that was killed as it spawned the VMM leaves the lock with what is not the VMM yet, until that is.
const FORK_WITHIN: Duration = Duration::from_millis(50);
/// Users for jails: none of Debian's, systemd's or the usual container ranges.
pub const JAIL_USERS: std::ops::Range<u32> = 2_000_000_000..2_000_065_536;

/// A home cannot be made or taken over.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    #[error("there is no microVM named {id} (in {})", dir.display())]
    Missing { id: String, dir: PathBuf },
    #[error("microVM {id} is driven by another process, or already by this one")]
    Driven { id: String },
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

    /// Takes over the home of microVM `id`, which nobody drives any more.
    ///
    /// # Errors
    ///
    /// [`HomeError::Missing`] and [`HomeError::Driven`].
    pub fn open(run_dir: &Path, id: &str) -> Result<Self, HomeError> {
        let dir = run_dir.join(id);
        let missing = || HomeError::Missing { id: id.to_owned(), dir: dir.clone() };
        // Not while homes are swept away. An id that is no name of a directory here is not looked for.
        let name_only = Path::new(id).file_name() == Some(id.as_ref());
        let _looking = lock_existing(&run_dir.join(".lock"), FlockArg::LockShared).map_err(|_| missing())?;
        if !name_only || !fs::symlink_metadata(&dir).is_ok_and(|meta| meta.is_dir()) {
            return Err(missing());
        }
        let deadline = Instant::now() + FORK_WITHIN;
        let lock = loop {
            match lock(&dir.join("lock"), FlockArg::LockExclusiveNonblock) {
                Ok(lock) => break lock,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(2));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(HomeError::Driven { id: id.to_owned() });
                }
                Err(source) => return Err(HomeError::Make { path: dir, source }),
            }
        };
        let owner = fs::metadata(dir.join("root/run")).map(|meta| meta.uid()).ok();
        Ok(Home { dir, jail_user: owner.filter(|user| JAIL_USERS.contains(user)), _lock: lock })
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

    /// Where the VMM writes how it ended.
    pub fn exit_file(&self) -> PathBuf {
        self.dir.join("exit")
    }

    /// The console's log where it is not here.
    pub fn console(&self) -> Option<ConsoleLog> {
        serde_json::from_slice(&fs::read(self.dir.join("console.json")).ok()?).ok()
    }

    /// Writes down where the console's log is.
    pub fn record_console(&self, log: &ConsoleLog) -> io::Result<()> {
        fs::write(self.dir.join("console.json"), serde_json::to_vec(log)?)
    }

    pub fn console_log(&self) -> PathBuf {
        self.console().map_or_else(|| self.dir.join("console.log"), |log| log.path)
    }

    /// Writes down that the guest has been told to boot.
    pub fn record_started(&self) -> io::Result<()> {
        fs::write(self.dir.join("started"), "")
    }

    pub fn was_started(&self) -> bool {
        self.dir.join("started").exists()
    }

    /// The VMM's process, if it still runs.
    pub fn find_vmm(&self) -> Option<PidFd> {
        find_vmm(&self.dir).map(|(_, process)| process)
    }

    /// What the VMM wrote of its end.
    pub fn recorded_exit(&self) -> Exit {
        let mut text = String::new();
        // A VMM in the hands of its guest may have written anything, and any amount of it.
        let read = File::open(self.exit_file()).and_then(|file| file.take(16).read_to_string(&mut text));
        match read.ok().and_then(|_| text.trim().parse().ok()) {
            Some(code) => Exit::Code(code),
            None => Exit::Unknown,
        }
    }

    /// The control group it was given, if any.
    pub fn cgroup(&self) -> Option<PathBuf> {
        recorded_cgroup(&self.dir)
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
        fault::point("vm.lent");
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
        let cgroup = settle(&self.dir)?;
        // Not while another process sweeps: it would find a home half gone, and nobody's.
        let run_dir = self.dir.parent().unwrap_or(&self.dir);
        let _removing = lock(&run_dir.join(".lock"), FlockArg::LockShared)?;
        fault::point("vm.settled");
        clear(&self.dir)?;
        fault::point("vm.removed");
        cgroup
    }
}

/// The names of the microVMs that have a home in `run_dir`, driven by somebody or left by somebody. None if
/// there is no such directory.
///
/// # Errors
///
/// Those of reading the directory.
pub fn homes(run_dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(run_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            ids.extend(entry.file_name().into_string());
        }
    }
    Ok(ids)
}

/// Removes the homes in `run_dir` that nobody drives any more, and ends the VMMs that still run in them.
/// Returns the microVMs' names. To be called by whoever makes the homes there.
///
/// # Errors
///
/// `run_dir` cannot be read, or the first home that could not be removed; the others were.
pub fn sweep(run_dir: &Path) -> io::Result<Vec<String>> {
    let Ok(_sweeping) = lock_existing(&run_dir.join(".lock"), FlockArg::LockExclusive) else {
        return Ok(Vec::new()); // Nothing was ever made here.
    };
    let mut swept = Vec::new();
    let mut result = Ok(());
    for entry in fs::read_dir(run_dir)? {
        let dir = entry?.path();
        let id = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        if !dir.is_dir() {
            continue;
        }
        let Ok(_taken) = lock(&dir.join("lock"), FlockArg::LockExclusiveNonblock) else { continue };
        let removed = settle(&dir).and_then(|cgroup| clear(&dir).and(cgroup));
        match removed {
            Ok(()) => swept.push(id),
            Err(e) if result.is_ok() => result = Err(e),
            Err(_) => {}
        }
    }
    result.map(|()| swept)
}

/// Ends what is left of a VMM and gives back what was borrowed for it. After an error the directory must be
/// kept: it is the only record of a live VMM or an unreturned loan. Returns whether the control group is gone.
fn settle(dir: &Path) -> io::Result<io::Result<()>> {
    let killed = kill_vmm(dir);
    let cgroup = recorded_cgroup(dir).map_or(Ok(()), |path| cgroup::remove(&path));
    fault::point("vm.cgroup-removed");
    let returned =
        loans(dir).iter().try_for_each(|loan| match chown(&loan.path, Some(loan.uid), Some(loan.gid)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        });
    killed.and(returned).map(|()| cgroup)
}

/// Removes a settled home.
fn clear(dir: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DIES_WITHIN;
    loop {
        // The jail first: until it is gone, what keeps a late VMM from going on must stay, and then such a VMM
        // has no place for its socket.
        let removed = match fs::remove_dir_all(dir.join("root")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => {
                fault::point("vm.jail-removed");
                fs::remove_dir_all(dir)
            }
        };
        match removed {
            // It has made a file meanwhile, the last one before it ends.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn recorded_cgroup(dir: &Path) -> Option<PathBuf> {
    let path = fs::read(dir.join("cgroup")).ok().filter(|path| !path.is_empty())?;
    Some(OsString::from_vec(path).into())
}

/// Kills the VMM this home records, if it still runs, and waits until it is gone. One that has not written its
/// number yet is kept from going on.
fn kill_vmm(dir: &Path) -> io::Result<()> {
    // Fails if the number is there already, or this was done before.
    let _ = fs::create_dir(dir.join("vmm.pid"));
    let Some((pid, process)) = find_vmm(dir) else { return Ok(()) };
    process.signal(Signal::SIGKILL)?;
    match process.wait(DIES_WITHIN)? {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::TimedOut, format!("VMM process {pid} does not die"))),
    }
}

/// The VMM a home records, if it still runs.
fn find_vmm(dir: &Path) -> Option<(i32, PidFd)> {
    let pid = fs::read_to_string(dir.join("vmm.pid")).ok()?.trim().parse().ok()?;
    // Held before it is looked at, so that what is looked at is what is held.
    let process = PidFd::open(pid).ok()?;
    is_vmm_of(pid, dir).then_some((pid, process))
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

/// Opens and locks a file that must be there.
fn lock_existing(path: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    Flock::lock(File::open(path)?, how).map_err(|(_, errno)| errno.into())
}

/// Opens, makes if need be, and locks a file.
fn lock(path: &Path, how: FlockArg) -> io::Result<Flock<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    Flock::lock(file, how).map_err(|(_, errno)| errno.into())
}

#[cfg(test)]
#[path = "home_tests.rs"]
mod tests;
