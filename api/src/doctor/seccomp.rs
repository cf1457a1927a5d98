//! System call filters, which every VMM thread runs under.

use super::Finding;

const NEEDED: &[(u32, &str)] = &[
    (libc::SECCOMP_RET_KILL_PROCESS, "kill process"),
    (libc::SECCOMP_RET_ERRNO, "errno"),
    (libc::SECCOMP_RET_ALLOW, "allow"),
];

pub fn check() -> Finding {
    judge(|action| {
        // SAFETY: the call reads one u32 from a valid pointer and changes nothing.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, std::ptr::from_ref(&action))
        };
        result == 0
    })
}

fn judge(available: impl Fn(u32) -> bool) -> Finding {
    let lacking: Vec<_> =
        NEEDED.iter().filter(|(action, _)| !available(*action)).map(|(_, name)| *name).collect();
    if lacking.is_empty() {
        return Finding::ok("filters with every action needed");
    }
    Finding::missing(
        format!("the kernel's system call filters lack: {}", lacking.join(", ")),
        "Run a kernel with CONFIG_SECCOMP_FILTER; every distribution's has it.",
    )
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn names_the_actions_that_lack() {
        assert_eq!(judge(|_| true).state, State::Ok);
        assert!(judge(|action| action != libc::SECCOMP_RET_ERRNO).detail.ends_with("lack: errno"));
    }
}
