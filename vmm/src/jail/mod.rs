//! The jail: how the VMM gives up everything it does not need before it touches anything of the guest's.
//!
//! [`enter`] is called once by `main`, before any thread exists and before any file is opened. It ends in
//! a process that is first in its own pid namespace, has own mount, ipc and uts namespaces (and a network
//! namespace where asked), sees nothing but the directory it was given, runs as an unprivileged user
//! without capabilities and without a way to gain any, in a cgroup, and under Landlock where the kernel has
//! it. System call filters are the other wall, see [`crate::seccomp`]; `docs/jail.md` is for operators and
//! `docs/threat-model.md` says what each wall is for.
//!
//! There is no second program and no second `exec`: the binary is static, so nothing of it need exist in
//! the jail.
//!
//! ```text
//!    caller ── spawns ──▶ outer (privileged)                     caller's child as before
//!                           │ what can fail: devices, cgroup, limits, namespaces, root
//!                           │ clone3(CLONE_PARENT | CLONE_NEWPID | CLONE_INTO_CGROUP)
//!                           ├──────────────────▶ inner           caller's child as well
//!                           │ writes the pid file   │ drops privileges, Landlock
//!                           ▼ exits 0               ▼ returns from `enter`, becomes the VMM
//! ```
//!
//! A process cannot move into another pid namespace, only its children can, hence the two processes. Every
//! step that depends on the host or on the caller's input is done by the outer one, so a failure is its
//! exit status and message, and nothing is left: the namespaces and mounts die with it, and a cgroup it
//! made is removed. A process that is already first in a pid namespace goes on alone instead: a caller that
//! makes the namespace itself saves the second process.
//!
//! What this module never does: create or delete anything in the jail's directory, or leave open a
//! descriptor through which the outside can be reached. Standard output and error stay open, and where asked for
//! a file for the exit code, to be written to.

mod cgroup;
mod config;
pub mod devices;
mod landlock;
mod pid_file;
mod privileges;
mod process;
mod root;

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use crate::virtio::net::tap::TapError;

pub use config::{Cgroup, CgroupLimit, Invalid, JailConfig, Network, Resource, ResourceLimit};
pub use landlock::Landlock;

use crate::exit;

/// Which walls stand that depend on the kernel; the others always do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jailed {
    /// What Landlock adds.
    pub landlock: Landlock,
}

/// A step that failed. Every variant names the file or the limit it is about.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error(transparent)]
    Config(#[from] Invalid),
    #[error(
        "making a jail needs root or its capabilities chown, setuid, setgid, setpcap, sys_admin and mknod"
    )]
    NotPrivileged,
    #[error("cannot close inherited file descriptors: {0}")]
    CloseInherited(#[source] io::Error),
    #[error("cannot open {path}: {source}")]
    Device { path: &'static str, source: io::Error },
    #[error("--tap: {0}")]
    Tap(#[from] TapError),
    #[error("cannot use {} as a jail: {source}", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("cannot write the pid file {}: {source}", path.display())]
    PidFile { path: PathBuf, source: io::Error },
    #[error("cannot write the exit file {}: {source}", path.display())]
    ExitFile { path: PathBuf, source: io::Error },
    #[error("cannot use the cgroup {}: {source}", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("{} is not in a cgroup v2 file system", path.display())]
    NotCgroup2 { path: PathBuf },
    #[error(
        "cgroup {} has no {file}: is its controller in the parent's cgroup.subtree_control?",
        path.display()
    )]
    NoController { path: PathBuf, file: String },
    #[error("cgroup {} does not take {file}={value}: {source}", path.display())]
    CgroupLimit { path: PathBuf, file: String, value: String, source: io::Error },
    #[error("cannot set the resource limit {name}={value}: {source}")]
    ResourceLimit { name: &'static str, value: u64, source: io::Error },
    #[error("cannot enter the network namespace {}: {source}", path.display())]
    NetworkNamespace { path: PathBuf, source: io::Error },
    #[error("cannot make new namespaces: {0}")]
    Namespaces(#[source] io::Error),
    #[error("cannot make the jail the root directory: {step}: {source}")]
    ChangeRoot { step: &'static str, source: io::Error },
    #[error("cannot start the jailed process: {0}")]
    Clone(#[source] io::Error),
    #[error("cannot give up privileges: {step}: {source}")]
    Privileges { step: &'static str, source: io::Error },
    #[error("cannot apply Landlock: {0}")]
    Landlock(String),
}

/// Jails this process. Returns only in the process that is in the jail; the one that called exits with 0
/// once that exists, unless they are the same (see the module's text).
///
/// Must be called while the process has one thread, and before it opens anything: every descriptor but
/// 0, 1 and 2 is closed.
pub fn enter(config: &JailConfig) -> Result<Jailed, JailError> {
    config.check()?;
    privileges::check()?;
    process::close_inherited().map_err(JailError::CloseInherited)?;
    process::wipe_environment();

    let devices = devices::Opened::open(config.uid, config.gid, &config.taps)?;
    let root = root::Root::open(&config.root)?;
    let netns = match &config.network {
        Network::Namespace(path) => Some((path, process::open_netns(path)?)),
        Network::Host | Network::New => None,
    };
    let pid_file = config.pid_file.as_deref().map(pid_file::PidFile::create).transpose()?;
    if let Some(path) = &config.exit_file {
        exit::record_in(path).map_err(|source| JailError::ExitFile { path: path.clone(), source })?;
    }
    let cgroup = config.cgroup.as_ref().map(cgroup::Prepared::new).transpose()?;
    process::limit_resources(&config.resource_limits)?;

    if let Some((path, fd)) = &netns {
        process::join_netns(path, fd)?;
    }
    process::unshare(&config.network)?;
    root.enter()?;
    process::enter_pid_namespace(cgroup, pid_file)?;

    privileges::drop_all(config.uid, config.gid)?;
    let landlock = landlock::restrict(devices.tun())?;
    devices.keep();
    Ok(Jailed { landlock })
}

/// Writes this process's id to a file, as a jail does for the process in it.
pub fn write_pid_file(path: &Path) -> Result<(), JailError> {
    // SAFETY: has no preconditions.
    pid_file::PidFile::create(path)?.write(unsafe { libc::getpid() })
}

/// The error of the system call that just failed.
fn os_error() -> io::Error {
    io::Error::last_os_error()
}

/// `path` as the kernel takes it.
fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}
