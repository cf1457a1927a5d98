//! userfaultfd: lets a restored microVM fetch its memory page by page.
//!
//! KVM touches guest memory from the kernel, so a descriptor that handles faults of user mode only
//! (`UFFD_USER_MODE_ONLY`, which anyone may make) is not enough.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::Finding;

const DEVICE: &str = "/dev/userfaultfd";
/// `USERFAULTFD_IOC_NEW` of linux/userfaultfd.h.
const NEW: libc::c_ulong = 0xaa00;

pub fn check() -> Finding {
    judge(by_system_call(), by_device)
}

fn by_system_call() -> Result<(), Errno> {
    // SAFETY: the call takes flags only.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) })
}

fn by_device() -> Result<(), Errno> {
    let device = File::options()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
    // SAFETY: the request takes flags only.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) }.into())
}

fn owned(fd: libc::c_long) -> Result<(), Errno> {
    Errno::result(fd).map(|fd| {
        // SAFETY: a fresh descriptor that nobody else owns; dropping it closes it.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    })
}

fn judge(call: Result<(), Errno>, device: impl FnOnce() -> Result<(), Errno>) -> Finding {
    let Err(call) = call else { return Finding::ok("by system call") };
    let Err(device) = device() else { return Finding::ok(format!("by {DEVICE}")) };
    let less = "snapshots are restored without prefetching";
    match (call, device) {
        (Errno::ENOSYS, _) => Finding::degraded(
            format!("not in this kernel: {less}"),
            "Run a kernel with CONFIG_USERFAULTFD; Debian's has it.",
        ),
        (_, Errno::EACCES) => Finding::degraded(
            format!("no permission: {less}"),
            format!(
                "Run as root, give your group access to {DEVICE}, or `sudo sysctl vm.unprivileged_userfaultfd=1`."
            ),
        ),
        (call, _) => Finding::degraded(
            format!("not permitted ({call}): {less}"),
            "Run as root, or `sudo sysctl vm.unprivileged_userfaultfd=1`.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn either_way_will_do() {
        assert_eq!(judge(Ok(()), || Err(Errno::ENOENT)).state, State::Ok);
        assert_eq!(judge(Err(Errno::EPERM), || Ok(())).state, State::Ok);
    }

    #[test]
    fn is_never_required() {
        assert_eq!(judge(Err(Errno::EPERM), || Err(Errno::ENOENT)).state, State::Degraded);
        let denied = judge(Err(Errno::EPERM), || Err(Errno::EACCES));
        assert!(denied.remedy.unwrap().contains(DEVICE));
    }
}
