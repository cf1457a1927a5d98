//! Control groups: the unified hierarchy with the controllers that hold a microVM to its share.

use super::{Finding, read};

const NEEDED: &[&str] = &["cpu", "memory", "pids"];
const UNIFIED_REMEDY: &str = "Boot the host with `systemd.unified_cgroup_hierarchy=1` on the kernel command line \
     (the default since Debian 11), or without systemd mount it: \
     `mount -t cgroup2 none /sys/fs/cgroup`.";

pub fn check() -> Finding {
    let mounts = match read("/proc/self/mounts") {
        Ok(mounts) => mounts,
        Err(e) => {
            return Finding::missing(format!("cannot read /proc/self/mounts: {e}"), "Mount proc on /proc.");
        }
    };
    let mount = match find(&mounts) {
        Ok(mount) => mount,
        Err(finding) => return finding,
    };
    match read(format!("{}/cgroup.controllers", mount.path)) {
        Ok(controllers) => judge(&mount, &controllers),
        Err(e) => {
            Finding::missing(format!("cannot read {}/cgroup.controllers: {e}", mount.path), UNIFIED_REMEDY)
        }
    }
}

#[derive(Debug, PartialEq)]
struct Mount {
    path: String,
    read_only: bool,
    /// Controllers are shared with an old hierarchy, which may hold those we need.
    hybrid: bool,
}

/// The cgroup2 mount in a `/proc/self/mounts`.
fn find(mounts: &str) -> Result<Mount, Finding> {
    let fields = |line: &str| {
        let mut fields = line.split(' ').map(str::to_owned);
        let _device = fields.next()?;
        Some((fields.next()?, fields.next()?, fields.next()?))
    };
    let all: Vec<_> = mounts.lines().filter_map(fields).collect();
    let hybrid = all.iter().any(|(_, kind, _)| kind == "cgroup");
    match all.into_iter().find(|(_, kind, _)| kind == "cgroup2") {
        Some((path, _, options)) => {
            Ok(Mount { path, read_only: options.split(',').any(|option| option == "ro"), hybrid })
        }
        None if hybrid => {
            Err(Finding::missing("only the old hierarchies (cgroup v1) are mounted", UNIFIED_REMEDY))
        }
        None => Err(Finding::missing("no cgroup2 file system is mounted", UNIFIED_REMEDY)),
    }
}

fn judge(mount: &Mount, controllers: &str) -> Finding {
    let path = &mount.path;
    let present: Vec<_> = controllers.split_whitespace().collect();
    let lacking: Vec<_> = NEEDED.iter().copied().filter(|name| !present.contains(name)).collect();
    if !lacking.is_empty() && mount.hybrid {
        return Finding::missing(
            format!("{path} lacks {}: the old hierarchies (cgroup v1) hold them", lacking.join(", ")),
            UNIFIED_REMEDY,
        );
    }
    if !lacking.is_empty() {
        return Finding::missing(
            format!("{path} lacks the controllers {}", lacking.join(", ")),
            "Remove `cgroup_disable=…` from the kernel command line; in a container, delegate them to it.",
        );
    }
    if mount.read_only {
        return Finding::missing(
            format!("{path} is mounted read-only"),
            "In a container, run it with its own writable cgroup tree (`--cgroupns=private --privileged`).",
        );
    }
    Finding::ok(format!("{path} with {}", NEEDED.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    const HYBRID: &str = "tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";
    const UNIFIED: &str = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nsdelegate 0 0\n";

    #[test]
    fn finds_the_mount() {
        let unified = Mount { path: "/sys/fs/cgroup".into(), read_only: false, hybrid: false };
        assert_eq!(find(UNIFIED), Ok(unified));
        assert!(find(HYBRID).unwrap().hybrid);
        assert!(find(&UNIFIED.replace("rw,nosuid", "ro,nosuid")).unwrap().read_only);
    }

    #[test]
    fn tells_old_hierarchies_from_none() {
        let old = find("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n").unwrap_err();
        assert!(old.detail.contains("cgroup v1"));
        assert!(find("proc /proc proc rw 0 0\n").unwrap_err().detail.contains("no cgroup2"));
    }

    #[test]
    fn wants_every_controller() {
        let mount = find(UNIFIED).unwrap();
        assert_eq!(judge(&mount, "cpuset cpu io memory hugetlb pids\n").state, State::Ok);
        assert!(judge(&mount, "cpuset cpu io\n").detail.contains("controllers memory, pids"));
        assert!(judge(&mount, "cpuset\n").detail.contains("cpu, memory"), "cpuset is not cpu");
        assert!(judge(&find(HYBRID).unwrap(), "").detail.contains("cgroup v1"));
        let read_only = Mount { read_only: true, ..mount };
        assert_eq!(judge(&read_only, "cpu memory pids").state, State::Missing);
    }
}
