//! Landlock: the jail's second wall round the file system, used where the kernel has it.

use nix::errno::Errno;

use super::Finding;

/// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
const ASK_VERSION: libc::c_ulong = 1;

pub fn check() -> Finding {
    // SAFETY: with this flag the call takes no ruleset, makes nothing, and returns the version.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            ASK_VERSION,
        )
    };
    judge(Errno::result(version))
}

fn judge(version: Result<libc::c_long, Errno>) -> Finding {
    match version {
        Ok(version) => Finding::ok(format!("version {version}")),
        Err(Errno::EOPNOTSUPP) => Finding::degraded(
            "built into the kernel but not switched on: the jail has one wall less",
            "Add `landlock` to the `lsm=` list on the kernel command line.",
        ),
        Err(Errno::ENOSYS) => Finding::degraded(
            "not in this kernel: the jail has one wall less",
            "Run a kernel with CONFIG_SECURITY_LANDLOCK; Debian's has it.",
        ),
        Err(e) => Finding::degraded(
            format!("does not answer ({e}): the jail has one wall less"),
            "In a container, allow the landlock_* system calls.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn is_never_required() {
        assert_eq!(judge(Ok(4)).state, State::Ok);
        for errno in [Errno::EOPNOTSUPP, Errno::ENOSYS, Errno::EPERM] {
            assert_eq!(judge(Err(errno)).state, State::Degraded);
        }
    }
}
