//! Ending the guest: ask every process to end, kill what does not, put everything on disk, close the file
//! systems, and leave by reboot(2).
//!
//! Nothing here can fail in a way that stops it: what cannot be done is logged and passed over.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, chdir, sync};
use pulau_agent_protocol::message::ShutdownAction;

use super::overlay::LAYER;
use crate::procfs::{self, Process};

/// How often to look whether all processes have ended.
const LOOK: Duration = Duration::from_millis(5);
/// How long killed processes may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(2);
const EVERYBODY: Pid = Pid::from_raw(-1);

/// Ends the guest. `serving` is the agent's own process, which is not waited for until the end.
pub fn end(action: ShutdownAction, grace: Duration, serving: Option<Pid>) -> ! {
    stop_processes(grace, serving);
    sync();
    close_file_systems();
    let mode = match action {
        ShutdownAction::PowerOff => RebootMode::RB_POWER_OFF,
        ShutdownAction::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err(e) = reboot(mode);
    log::error!("reboot: {e}");
    // The kernel panics when PID 1 ends, which ends the guest too, and says why.
    std::process::exit(1)
}

fn stop_processes(grace: Duration, serving: Option<Pid>) {
    let _ = kill(EVERYBODY, Signal::SIGTERM);
    // Shells at a terminal do not heed SIGTERM.
    for process in others(serving).iter().filter(|process| process.terminal) {
        let _ = kill(process.pid, Signal::SIGHUP);
    }
    let _ = kill(EVERYBODY, Signal::SIGCONT);
    if !gone_by(Instant::now() + grace, serving) {
        log::warn!("processes still running after {grace:?}: {}", names(&others(serving)));
    }
    let _ = kill(EVERYBODY, Signal::SIGKILL);
    gone_by(Instant::now() + KILL_WAIT, None);
}

/// Reaps until no process but these is left; `false` if there still were some at the deadline.
fn gone_by(deadline: Instant, serving: Option<Pid>) -> bool {
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status.pid().is_some()) {}
        if others(serving).is_empty() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(LOOK);
    }
}

/// All processes of user space but PID 1 and the serving one.
fn others(serving: Option<Pid>) -> Vec<Process> {
    let mut all = procfs::processes().unwrap_or_default();
    all.retain(|p| p.pid.as_raw() != 1 && Some(p.pid) != serving && !p.kernel && !p.zombie);
    all
}

fn names(processes: &[Process]) -> String {
    let name = |p: &Process| {
        let name = fs::read_to_string(format!("/proc/{}/comm", p.pid)).unwrap_or_default();
        format!("{} ({})", name.trim(), p.pid)
    };
    processes.iter().take(10).map(name).collect::<Vec<_>>().join(", ")
}

/// These hold nothing that must reach a disk.
const VIRTUAL: [&str; 14] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "devpts",
    "tmpfs",
    "ramfs",
    "rootfs",
    "cgroup2",
    "mqueue",
    "debugfs",
    "tracefs",
    "securityfs",
    "bpf",
    "fusectl",
];

/// Unmounts every file system that keeps data, or makes it read-only where that cannot be: the root, and
/// the layer above it.
fn close_file_systems() {
    let _ = chdir("/");
    let table = fs::read("/proc/mounts").unwrap_or_default();
    for path in data_mounts(&table).into_iter().rev() {
        if umount2(&path, MntFlags::empty()).is_err() {
            read_only(&path);
        }
    }
    // The root after everything on it, and the layer after the overlay that writes to it.
    read_only(Path::new("/"));
    if Path::new(LAYER).exists() {
        read_only(Path::new(LAYER));
    }
}

fn read_only(path: &Path) {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    match mount(None::<&str>, path, None::<&str>, flags, None::<&str>) {
        // EINVAL: not a mount point of this namespace, as a root that was given to us.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(e) => log::warn!("make {} read-only: {e}", path.display()),
    }
}

/// Where file systems with data are mounted, in order of mounting, but for the root and the layer.
fn data_mounts(table: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in table.split(|b| *b == b'\n') {
        let mut fields = line.split(|b| *b == b' ');
        let (Some(path), Some(kind)) = (fields.nth(1), fields.next()) else { continue };
        let path = unescape(path);
        if path != Path::new("/") && path != Path::new(LAYER) && !VIRTUAL.iter().any(|v| v.as_bytes() == kind)
        {
            found.push(path);
        }
    }
    found
}

/// White space and backslashes come as `\` and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = |digits: &[u8; 3]| {
            digits.iter().try_fold(0u8, |n, d| match d {
                b'0'..=b'7' => n.checked_mul(8)?.checked_add(d - b'0'),
                _ => None,
            })
        };
        match after.split_first_chunk::<3>() {
            Some((digits, after)) if first == b'\\' && octal(digits).is_some() => {
                bytes.extend(octal(digits));
                rest = after;
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_keeps_data_is_unmounted() {
        let table = b"overlay / overlay rw 0 0\nproc /proc proc rw 0 0\n/dev/vdb /run/pulau/layer ext4 rw 0 0\n\
            /dev/vdc /srv/my\\040data\\134x ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/vdd /srv/my\\040data\\134x/in xfs rw 0 0\n";
        assert_eq!(data_mounts(table), [Path::new("/srv/my data\\x"), Path::new("/srv/my data\\x/in")]);
        assert_eq!(unescape(b"\\9\\777\\04"), Path::new("\\9\\777\\04"));
    }
}
