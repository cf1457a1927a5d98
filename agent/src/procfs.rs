//! The process table, from `/proc/<pid>/stat` (proc(5)).

use std::fs;
use std::io;

use nix::unistd::Pid;

/// One process, as it was a moment ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: Pid,
    pub session: Pid,
    /// It has ended and waits to be reaped.
    pub zombie: bool,
    /// It has a controlling terminal.
    pub terminal: bool,
    /// It is a thread of the kernel's.
    pub kernel: bool,
}

/// All processes now. Those that come or go meanwhile may be missing.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn processes() -> io::Result<Vec<Process>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that has ended since is none any more.
        let Ok(stat) = fs::read(format!("/proc/{pid}/stat")) else { continue };
        found.extend(parse(pid, &stat));
    }
    Ok(found)
}

/// `PF_KTHREAD` of the kernel's `include/linux/sched.h`.
const KERNEL_THREAD: u64 = 0x0020_0000;

fn parse(pid: i32, stat: &[u8]) -> Option<Process> {
    // The second field is the program's name in parentheses, and may hold anything, parentheses too.
    let end = stat.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let session: i32 = fields.nth(2)?.parse().ok()?;
    let terminal: i32 = fields.next()?.parse().ok()?;
    let flags: u64 = fields.nth(1)?.parse().ok()?;
    Some(Process {
        pid: Pid::from_raw(pid),
        session: Pid::from_raw(session),
        zombie: matches!(state, "Z" | "X"),
        terminal: terminal != 0,
        kernel: flags & KERNEL_THREAD != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_look_like_fields() {
        let stat = b"77 (a) R 1 (x) S 1 77 42 34816 77 4194304 98 0 0 0 0 0\n";
        let expected = Process {
            pid: Pid::from_raw(77),
            session: Pid::from_raw(42),
            zombie: false,
            terminal: true,
            kernel: false,
        };
        assert_eq!(parse(77, stat), Some(expected));
        assert_eq!(parse(77, b"77 (a"), None);
        assert_eq!(parse(77, b"77 (a) R"), None);
    }

    #[test]
    fn this_process_is_among_them() {
        let me = processes().unwrap().into_iter().find(|p| p.pid == Pid::this()).unwrap();
        assert_eq!(me.session, nix::unistd::getsid(None).unwrap());
        assert!(!me.kernel && !me.zombie);
    }
}
