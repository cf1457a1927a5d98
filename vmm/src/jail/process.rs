//! What the process inherited, its limits, and the namespaces it moves to.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{self, setrlimit};
use nix::sys::stat::Mode;

use super::cgroup::Prepared;
use super::pid_file::PidFile;
use super::{JailError, Network, Resource, ResourceLimit, os_error};

/// Closes every descriptor but standard input, output and error.
pub(super) fn close_inherited() -> io::Result<()> {
    // SAFETY: called before anything of this process has opened a descriptor, so none is owned yet.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } < 0 { Err(os_error()) } else { Ok(()) }
}

/// Forgets the environment. As no `exec` replaces the memory it lies in, its text is overwritten: it may
/// hold secrets of the caller, and code that has taken over the VMM could read it.
pub(super) fn wipe_environment() {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: the process has one thread, so nobody reads or changes the environment meanwhile; `environ`
    // is null or an array of C strings that ends with a null pointer, all in writable memory.
    unsafe {
        let mut variable = environ;
        while !variable.is_null() && !(*variable).is_null() {
            let text = *variable;
            libc::explicit_bzero(text.cast(), libc::strlen(text));
            variable = variable.add(1);
        }
        libc::clearenv();
    }
}

/// Turns core dumps off, which would write guest memory to disk, and sets what was asked for.
pub(super) fn limit_resources(limits: &[ResourceLimit]) -> Result<(), JailError> {
    let set = |resource, name, value| {
        setrlimit(resource, value, value).map_err(|errno| JailError::ResourceLimit {
            name,
            value,
            source: errno.into(),
        })
    };
    set(resource::Resource::RLIMIT_CORE, "core", 0)?;
    for limit in limits {
        let resource = match limit.resource {
            Resource::FileSize => resource::Resource::RLIMIT_FSIZE,
            Resource::OpenFiles => resource::Resource::RLIMIT_NOFILE,
        };
        set(resource, limit.resource.name(), limit.value)?;
    }
    Ok(())
}

/// Opens a network namespace.
pub(super) fn open_netns(path: &Path) -> Result<OwnedFd, JailError> {
    open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno| network(path, errno))
}

/// Moves this process to an opened network namespace.
pub(super) fn join_netns(path: &Path, namespace: &OwnedFd) -> Result<(), JailError> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|errno| network(path, errno))
}

fn network(path: &Path, errno: Errno) -> JailError {
    JailError::NetworkNamespace { path: path.to_owned(), source: errno.into() }
}

/// Moves this process to new namespaces: mount, ipc, uts, and network if it is to have an empty one.
pub(super) fn unshare(network: &Network) -> Result<(), JailError> {
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    if *network == Network::New {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    nix::sched::unshare(flags).map_err(|errno| JailError::Namespaces(errno.into()))
}

/// Goes on as the first process of a new pid namespace, in the cgroup: returns in the child, ends the
/// parent. A process that is the first of its namespace already stays what it is.
pub(super) fn enter_pid_namespace(
    cgroup: Option<Prepared<'_>>,
    pid_file: Option<PidFile<'_>>,
) -> Result<(), JailError> {
    // SAFETY: has no preconditions.
    if unsafe { libc::getpid() } == 1 {
        if let Some(cgroup) = cgroup {
            cgroup.join()?;
            cgroup.keep();
        }
        return Ok(());
    }
    let child = clone(cgroup.as_ref()).map_err(JailError::Clone)?;
    match (&child, pid_file) {
        (None, Some(pid_file)) => pid_file.leave(),
        (Some(child), Some(pid_file)) => pid_file.write(child.pid).inspect_err(|_| child.kill())?,
        (_, None) => {}
    }
    if let Some(cgroup) = cgroup {
        cgroup.keep();
    }
    if child.is_some() {
        // SAFETY: ends this process at once, without running anything the child is to run.
        unsafe { libc::_exit(0) }
    }
    Ok(())
}

/// The jailed process, seen by the one that made it.
struct Child {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

impl Child {
    /// Ends the child and waits until it has left its cgroup. Its zombie is the caller's to reap.
    fn kill(&self) {
        let mut poll = libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the descriptor is a valid pidfd, the signal needs no information, and `poll` is one
        // valid element that lives as long as the call.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, poll.fd, libc::SIGKILL, std::ptr::null::<()>(), 0);
            libc::poll(&raw mut poll, 1, -1);
        }
    }
}

/// A child that is its parent's sibling, in a new pid namespace and the cgroup. None in the child.
fn clone(cgroup: Option<&Prepared<'_>>) -> io::Result<Option<Child>> {
    let mut pidfd: libc::c_int = -1;
    let mut flags = libc::CLONE_PARENT as u64 | libc::CLONE_NEWPID as u64 | libc::CLONE_PIDFD as u64;
    let tid_address = tid_address();
    if tid_address != 0 {
        flags |= libc::CLONE_CHILD_SETTID as u64 | libc::CLONE_CHILD_CLEARTID as u64;
    }
    let cgroup = cgroup.and_then(Prepared::dir);
    if cgroup.is_some() {
        flags |= CLONE_INTO_CGROUP;
    }
    // SAFETY: all zeroes are a valid value of this structure of numbers.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.pidfd = &raw mut pidfd as u64;
    args.child_tid = tid_address;
    args.cgroup = cgroup.map_or(0, |dir| dir.as_raw_fd() as u64);
    // SAFETY: without CLONE_VM the child gets a copy of memory and goes on here as after fork; the process
    // has one thread, so no lock is held by another that would not exist in the child. The kernel writes
    // `pidfd` here and, in the child, the thread id to where the C library keeps it.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    match libc::pid_t::try_from(pid) {
        Ok(0) => Ok(None),
        // SAFETY: the kernel just gave us this descriptor.
        Ok(pid) if pid > 0 => Ok(Some(Child { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } })),
        _ => Err(os_error()),
    }
}

/// From linux/sched.h; the `libc` crate's is too small a type.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Where the C library keeps this thread's id, or 0 if the kernel does not tell. Its own `fork` has the
/// kernel put the child's id there; so must we, or the library takes the child for its parent.
fn tid_address() -> u64 {
    let mut address: u64 = 0;
    // SAFETY: the kernel writes one pointer to `address`.
    if unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut address) } == 0 { address } else { 0 }
}
