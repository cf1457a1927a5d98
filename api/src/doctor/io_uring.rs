//! io_uring: the faster of the two ways a block device does its I/O.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::{Finding, read};

/// Bytes of `struct io_uring_params` (linux/io_uring.h).
const PARAMS: usize = 120;

pub fn check() -> Finding {
    let mut params = [0u64; PARAMS / 8];
    // SAFETY: the kernel reads and writes PARAMS bytes, which `params` has, aligned.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4u32, params.as_mut_ptr()) };
    let result = Errno::result(fd).map(|fd| {
        // SAFETY: a fresh descriptor that nobody else owns; dropping it closes the ring.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    });
    judge(result, read("/proc/sys/kernel/io_uring_disabled").ok().as_deref())
}

fn judge(result: Result<(), Errno>, disabled: Option<&str>) -> Finding {
    let slower = |why: &str| format!("{why}: block devices use plain reads and writes, which is slower");
    match (result, disabled.map(str::trim)) {
        (Ok(()), _) => Finding::ok("io_uring can be set up"),
        (Err(Errno::EPERM), Some("1" | "2")) => Finding::degraded(
            slower("switched off by the host's kernel.io_uring_disabled"),
            "`sudo sysctl kernel.io_uring_disabled=0`, if the host's policy allows it.",
        ),
        (Err(Errno::EPERM), _) => Finding::degraded(
            slower("not permitted"),
            "In a container, allow the io_uring_* system calls (most default filters forbid them).",
        ),
        (Err(Errno::ENOSYS), _) => Finding::degraded(
            slower("not in this kernel"),
            "Run a kernel with CONFIG_IO_URING; Debian's has it.",
        ),
        (Err(e), _) => Finding::degraded(
            slower(&format!("set-up fails ({e})")),
            "Raise the locked memory limit (`ulimit -l`) or run as root.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn is_never_required() {
        assert_eq!(judge(Ok(()), None).state, State::Ok);
        for errno in [Errno::EPERM, Errno::ENOSYS, Errno::ENOMEM] {
            assert_eq!(judge(Err(errno), None).state, State::Degraded);
        }
    }

    #[test]
    fn tells_a_switch_from_a_filter() {
        assert!(judge(Err(Errno::EPERM), Some("2\n")).remedy.unwrap().contains("sysctl"));
        assert!(judge(Err(Errno::EPERM), Some("0\n")).remedy.unwrap().contains("container"));
    }
}
