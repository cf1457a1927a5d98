//! Gives up root: group, user, capabilities, and every way back.

use std::io;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid, setsid};

use super::{JailError, os_error};

/// Refuses at once, in words, what would fail at some step later.
pub(super) fn check() -> Result<(), JailError> {
    /// `CAP_CHOWN`, `CAP_SETGID`, `CAP_SETUID`, `CAP_SETPCAP`, `CAP_SYS_ADMIN` and `CAP_MKNOD`.
    const NEEDED: u32 = 1 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 21 | 1 << 27;
    let mut sets = Sets::default();
    // SAFETY: version 3 makes the kernel read a header and write two triples of words.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw const HEADER, &raw mut sets) };
    if result < 0 {
        return Err(JailError::Privileges { step: "capget", source: os_error() });
    }
    let [[effective, ..], _] = sets;
    if effective & NEEDED == NEEDED { Ok(()) } else { Err(JailError::NotPrivileged) }
}

/// Makes this process an unprivileged one of `uid` and `gid`, in its own session, that nothing can lend
/// privileges to and that no process of the same user can look into.
pub(super) fn drop_all(uid: u32, gid: u32) -> Result<(), JailError> {
    let failed = |step| move |errno: Errno| JailError::Privileges { step, source: errno.into() };
    // Away from the caller's terminal, into which a member of its session could feed input.
    match setsid() {
        // A first process that the caller started as the leader of a group or session has them already.
        Ok(_) | Err(Errno::EPERM) => {}
        Err(errno) => return Err(failed("setsid")(errno)),
    }
    umask(Mode::from_bits_truncate(0o077));
    drop_bounding_set().map_err(|source| JailError::Privileges { step: "bounding set", source })?;
    setgroups(&[]).map_err(failed("setgroups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).map_err(failed("setresgid"))?;
    setresuid(uid, uid, uid).map_err(failed("setresuid"))?;
    drop_capabilities().map_err(|source| JailError::Privileges { step: "capset", source })?;
    prctl::set_no_new_privs().map_err(failed("no_new_privs"))?;
    prctl::set_dumpable(false).map_err(failed("dumpable"))
}

/// No capability can be gained by executing a file. The kernel says which is the last there is.
fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        // SAFETY: takes numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            let error = os_error();
            return if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

/// Empties the effective, permitted and inheritable sets, and with them the ambient one.
fn drop_capabilities() -> io::Result<()> {
    let none = Sets::default();
    // SAFETY: version 3 makes the kernel read a header and two triples of words.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const HEADER, &raw const none) };
    if result < 0 { Err(os_error()) } else { Ok(()) }
}

/// Of `capget(2)` and `capset(2)`: which layout of [`Sets`] is meant, and whose they are (0: this thread's).
/// The kernel writes to it only if it does not know the layout; every Linux since 2.6.26 does.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
static HEADER: Header = Header { version: 0x2008_0522, pid: 0 };

/// The effective, permitted and inheritable set: their lower 32 bits, then their upper ones.
type Sets = [[u32; 3]; 2];
