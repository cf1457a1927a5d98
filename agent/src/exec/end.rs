//! Ending a process whose host is gone: it and everything in its session. What has made itself a session
//! of its own (a daemon) was meant to stay, and stays.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::spawn::Child;
use crate::procfs;

/// Between asking and killing.
const GRACE: Duration = Duration::from_secs(2);
/// How often to look whether a session is empty.
const LOOK: Duration = Duration::from_millis(20);

/// Ends the process and its session: SIGHUP, then SIGKILL. Returns when nothing is left of it.
pub fn terminate(child: Child) {
    let Child { mut process, pidfd, stdin, stdout, stderr, .. } = child;
    // Readers see the end, writers get SIGPIPE, and a terminal hangs up.
    drop((stdin, stdout, stderr));
    let Ok(session) = i32::try_from(process.id()).map(Pid::from_raw) else { return };
    // Until it is waited for, the process's number stays its own, and its session's.
    signal_session(session, &[Signal::SIGHUP, Signal::SIGCONT]);
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline {
        if ended(&pidfd) && members(session).is_empty() {
            break;
        }
    }
    while !members(session).is_empty() {
        signal_session(session, &[Signal::SIGKILL]);
        // A process stuck in the kernel dies when it comes out of it; there is nothing else to be done.
        ended(&pidfd);
    }
    let _ = process.wait();
}

/// Waits a moment, and says whether the process has ended.
fn ended(pidfd: &OwnedFd) -> bool {
    let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
    let gone = poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) == Ok(1);
    if gone {
        // There is nothing to poll for the others of its session.
        thread::sleep(LOOK / 4);
    }
    gone
}

fn members(session: Pid) -> Vec<Pid> {
    let all = procfs::processes().unwrap_or_default();
    all.into_iter().filter(|p| p.session == session && !p.zombie).map(|p| p.pid).collect()
}

fn signal_session(session: Pid, signals: &[Signal]) {
    for pid in members(session) {
        for signal in signals {
            // It may have ended meanwhile.
            let _ = kill(pid, *signal);
        }
    }
}
