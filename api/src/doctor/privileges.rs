//! The capabilities it takes to jail a microVM and connect it to a network.

use super::{Finding, read};

/// What is needed, by bit (linux/capability.h), and what for.
const NEEDED: &[(u8, &str, &str)] = &[
    (0, "CAP_CHOWN", "to give files to the jailed user"),
    (1, "CAP_DAC_OVERRIDE", "to reach files of other users"),
    (5, "CAP_KILL", "to end jailed processes"),
    (6, "CAP_SETGID", "to drop to the jailed group"),
    (7, "CAP_SETUID", "to drop to the jailed user"),
    (12, "CAP_NET_ADMIN", "to make tap devices and filter rules"),
    (18, "CAP_SYS_CHROOT", "to enter the jail"),
    (21, "CAP_SYS_ADMIN", "to make namespaces and mounts"),
    (27, "CAP_MKNOD", "to put /dev/kvm into the jail"),
];

pub fn check() -> Finding {
    match read("/proc/self/status").ok().and_then(|status| effective(&status)) {
        Some(capabilities) => judge(capabilities),
        None => Finding::missing("cannot read /proc/self/status", "Mount proc on /proc."),
    }
}

/// The effective capability set as in `CapEff:` of a process's status.
fn effective(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(value.trim(), 16).ok()
}

fn judge(capabilities: u64) -> Finding {
    let lacking: Vec<_> = NEEDED.iter().filter(|(bit, _, _)| capabilities & (1 << bit) == 0).collect();
    match lacking.as_slice() {
        [] => Finding::ok("all capabilities a jail needs"),
        [(_, name, purpose)] => Finding::missing(
            format!("lacks {name} ({purpose})"),
            "Run as root with all capabilities; in a container, add the one named.",
        ),
        several if several.len() == NEEDED.len() => Finding::missing(
            "not root: cannot jail microVMs or make tap devices",
            "Run as root (`sudo pulau …`). For development, `pulau microvm run --no-jail` needs only /dev/kvm.",
        ),
        several => Finding::missing(
            format!("lacks {}", several.iter().map(|(_, name, _)| *name).collect::<Vec<_>>().join(", ")),
            "Run as root with all capabilities; in a container, add those named.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn reads_the_effective_set_only() {
        let status =
            "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\t000001ffffffffff\nCapEff:\t0000000000001000\n";
        assert_eq!(effective(status), Some(1 << 12));
        assert_eq!(effective("Name:\tx\n"), None);
    }

    #[test]
    fn says_which_capability_lacks() {
        assert_eq!(judge(u64::MAX).state, State::Ok);
        assert!(judge(!(1 << 12)).detail.contains("CAP_NET_ADMIN"));
        assert!(judge(0).detail.starts_with("not root"));
        assert!(judge(1).detail.contains("CAP_SYS_ADMIN, CAP_MKNOD"));
    }
}
