//! Directories to jail in, and prisoners run in them.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use pulau_vmm::exit::ExitCode;
use tempfile::TempDir;

use crate::Unable;
use crate::prisoner::{REFUSED, THROUGH};

/// User and group of the jailed; the tests' own files belong to them, so that it is the jail that refuses.
pub const ID: u32 = 64_321;

/// A place on the host, open to everybody, with jails and other things in it.
pub struct Place(TempDir);

impl Place {
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("pulau-jail-").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of the jailed user, with its own path as its content.
    pub fn file(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, path.to_str().unwrap()).unwrap();
        chown(&path, Some(ID), Some(ID)).unwrap();
        path
    }

    /// A directory as a manager would prepare it: not writable, but for `run`; with a drive.
    pub fn tree(&self, name: &str) -> PathBuf {
        let tree = self.path(name);
        fs::create_dir(&tree).unwrap();
        fs::create_dir(tree.join("run")).unwrap();
        chown(tree.join("run"), Some(ID), Some(ID)).unwrap();
        self.file(&format!("{name}/disk"));
        tree
    }
}

/// What became of a prisoner.
#[derive(Debug)]
pub struct Ended {
    /// The process the caller started.
    pub started: ExitStatus,
    /// The jailed one, if there came to be one.
    pub jailed: Option<ExitStatus>,
    pub output: String,
    pub error: String,
}

impl Ended {
    /// How the process that made the attempt ended.
    pub fn status(&self) -> ExitStatus {
        self.jailed.unwrap_or(self.started)
    }

    #[track_caller]
    pub fn expect_through(&self) {
        assert_eq!(self.status().code(), Some(THROUGH), "{self:?}");
    }

    #[track_caller]
    pub fn expect_refused(&self) {
        assert_eq!(self.status().code(), Some(REFUSED), "{self:?}");
    }

    #[track_caller]
    pub fn expect_violation(&self) {
        assert_eq!(self.status().code(), Some(i32::from(ExitCode::BadSyscall.code())), "{self:?}");
        assert!(self.error.contains("made the forbidden system call"), "{self:?}");
    }
}

/// A prisoner to be run.
#[derive(Debug)]
pub struct Prisoner {
    args: Vec<String>,
    pid_file: Option<PathBuf>,
    first: bool,
    command: Command,
}

impl Prisoner {
    /// One without a jail.
    pub fn free() -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("prisoner").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { args: Vec::new(), pid_file: None, first: false, command }
    }

    /// One in a jail in `tree`.
    pub fn jailed(tree: &Path) -> Self {
        let pid_file = tree.with_extension("pid");
        let mut this = Self::free()
            .with("root", tree.display())
            .with("uid", ID)
            .with("gid", ID)
            .with("pid-file", pid_file.display());
        this.pid_file = Some(pid_file);
        this
    }

    /// Has it started as the first process of a pid namespace, as a caller may.
    pub fn first(mut self) -> Self {
        self.first = true;
        self.pid_file = None;
        self
    }

    /// Replaces or adds an argument.
    pub fn with(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        if !matches!(key, "attempt" | "cgroup-limit" | "resource-limit") {
            self.args.retain(|arg| !arg.starts_with(&format!("{key}=")));
        }
        self.args.push(format!("{key}={value}"));
        self
    }

    pub fn attempt(self, attempt: &[impl std::fmt::Display]) -> Self {
        attempt.iter().fold(self, |this, part| this.with("attempt", part))
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Has `prepare` called in the new process before it becomes the prisoner.
    pub fn after(mut self, prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> Self {
        // SAFETY: the closures of these tests only make system calls.
        unsafe { self.command.pre_exec(prepare) };
        self
    }

    /// Runs it to its end, and fails if a process is left.
    pub fn run(mut self) -> Ended {
        self.command.args(&self.args);
        let mut child = if self.first {
            let ours = fs::File::open("/proc/self/ns/pid").unwrap();
            unshare(CloneFlags::CLONE_NEWPID).unwrap();
            let child = self.command.spawn();
            setns(ours, CloneFlags::CLONE_NEWPID).unwrap();
            child.unwrap()
        } else {
            self.command.spawn().unwrap()
        };
        let (mut output, mut error) = (String::new(), String::new());
        // Both ends are short, so neither fills its pipe while the other is read.
        child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
        child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        let started = child.wait().unwrap();
        let jailed = self.pid_file.as_ref().and_then(|file| fs::read_to_string(file).ok()).map(|pid| {
            let pid: libc::pid_t = pid.strip_suffix('\n').unwrap().parse().unwrap();
            let mut status = 0;
            // SAFETY: the kernel writes one number to `status`.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid, "not our child");
            ExitStatus::from_raw(status)
        });
        if let (Some(file), true) = (&self.pid_file, jailed.is_some()) {
            fs::remove_file(file).unwrap();
        }
        Ended { started, jailed, output, error }
    }
}

/// The result of a system call.
pub fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives this process a mount namespace of its own, so that what it mounts is gone with it.
pub fn own_mounts() -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let (none, private) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
    // SAFETY: the path is a constant C string; null is allowed for the others.
    check(unsafe { libc::mount(none, c"/".as_ptr(), none, private, std::ptr::null()) })
}

/// Makes this process one of `id`.
pub fn unprivileged(id: u32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::setresuid(id, id, id) })
}

/// Fails if this process has a child.
#[track_caller]
pub fn expect_no_children() {
    let left = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG));
    assert_eq!(left, Err(Errno::ECHILD), "a process is left");
}

/// Every path below `dir`, sorted, with its kind and size.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let metadata = entry.metadata().unwrap();
        all.push(format!("{} {:?} {}", entry.path().display(), metadata.file_type(), metadata.len()));
        if metadata.is_dir() {
            all.extend(listing(&entry.path()));
        }
    }
    all.sort();
    all
}

/// Where this host has cgroup v2, and a cgroup in it to make others in, which is removed on drop.
pub struct Cgroups(PathBuf);

impl Cgroups {
    pub fn new() -> Result<Self, Unable> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts
            .lines()
            .find(|line| line.contains(" - cgroup2 "))
            .and_then(|line| line.split(' ').nth(4))
            .ok_or(Unable("no cgroup v2 here"))?;
        let path = PathBuf::from(format!("{mount}/pulau-jail-test-{}", std::process::id()));
        fs::create_dir(&path).map_err(|_| Unable("cannot make a cgroup here"))?;
        Ok(Self(path))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Makes a controller's limits available to the cgroups made in this one.
    pub fn need(&self, controller: &'static str) -> Result<(), Unable> {
        let control = |dir: &Path| fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        control(self.0.parent().unwrap())
            .and_then(|()| control(&self.0))
            .map_err(|_| Unable("this cgroup v2 has no such controller"))
    }

    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap());
        entries
            .filter(|entry| entry.file_type().unwrap().is_dir())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for name in self.names() {
            let _ = fs::remove_dir(self.0.join(name));
        }
        fs::remove_dir(&self.0).unwrap();
    }
}
