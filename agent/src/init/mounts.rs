//! The file systems every Linux program expects.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

/// One file system to mount.
struct Mount {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
}

const SAFE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
const TEMPORARY: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Needed to find out what is to be done: the command line is in `/proc`, and disks are in `/dev`.
const EARLY: [Mount; 3] = [
    Mount { source: "proc", target: "/proc", kind: "proc", flags: SAFE, data: "" },
    Mount { source: "dev", target: "/dev", kind: "devtmpfs", flags: MsFlags::MS_NOSUID, data: "mode=0755" },
    Mount { source: "sys", target: "/sys", kind: "sysfs", flags: SAFE, data: "" },
];

/// On top of whatever has become the root.
const LATE: [Mount; 5] = [
    Mount {
        source: "devpts",
        target: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        data: "mode=0620,gid=5,ptmxmode=0666",
    },
    Mount { source: "shm", target: "/dev/shm", kind: "tmpfs", flags: TEMPORARY, data: "mode=1777" },
    Mount { source: "run", target: "/run", kind: "tmpfs", flags: TEMPORARY, data: "mode=0755" },
    Mount { source: "tmp", target: "/tmp", kind: "tmpfs", flags: TEMPORARY, data: "mode=1777" },
    Mount { source: "cgroup2", target: "/sys/fs/cgroup", kind: "cgroup2", flags: SAFE, data: "nsdelegate" },
];

/// Names in `/dev` that programs use and the kernel does not make.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts what the command line is read from; reports what fails.
pub fn early(problem: &mut dyn FnMut(String)) {
    EARLY.iter().for_each(|mount| make(mount, problem));
}

/// Mounts the rest; reports what fails.
pub fn late(problem: &mut dyn FnMut(String)) {
    LATE.iter().for_each(|mount| make(mount, problem));
    for (target, link) in LINKS {
        match symlink(target, link) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => problem(format!("{link}: {e}")),
            _ => {}
        }
    }
}

fn make(wanted: &Mount, problem: &mut dyn FnMut(String)) {
    // As the kernel does with /dev, an initrd with all of them, and the overlay with /run.
    if is_mount_point(Path::new(wanted.target)) {
        return;
    }
    let attempt =
        || mount(Some(wanted.source), wanted.target, Some(wanted.kind), wanted.flags, Some(wanted.data));
    let result = match attempt() {
        // A directory the image lacks can be made if the root can be written.
        Err(Errno::ENOENT) if fs::create_dir_all(wanted.target).is_ok() => attempt(),
        other => other,
    };
    if let Err(e) = result {
        problem(format!("mount {} on {}: {e}", wanted.kind, wanted.target));
    }
}

fn is_mount_point(path: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|found| found.dev()).ok();
    match (device(path), path.parent().and_then(device)) {
        (Some(inner), Some(outer)) => inner != outer,
        _ => false,
    }
}
