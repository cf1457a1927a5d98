//! A process held by a pidfd, so that its number may be used again without harm.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// It ended, but was not our child, so the kernel does not say how; nor did it itself.
    Unknown,
}

/// A process, by a descriptor: signals and waits reach it or nothing, never another of the same number.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
    pid: i32,
}

impl PidFd {
    /// Holds the process that has the number `pid` now. For a child not yet waited for, it cannot be another.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: the call takes two integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| io::ErrorKind::InvalidData)?;
        // SAFETY: a fresh descriptor that nobody else owns.
        Ok(PidFd { fd: unsafe { OwnedFd::from_raw_fd(fd) }, pid })
    }

    /// The number it has or had.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal. A process that has ended already is not an error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let no_information = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is a pidfd; no siginfo is given.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal as i32, no_information, 0)
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Blocks until the process has ended, at most for `limit`. Returns whether it has. Does not reap it.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let mut poll = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        Ok(nix::poll::poll(&mut poll, limit)? > 0)
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A process, usually our child. Dropping it does nothing to it; an ended child must be waited for.
#[derive(Debug)]
pub struct Process {
    fd: AsyncFd<PidFd>,
    exit: Option<Exit>,
}

impl Process {
    /// As [`PidFd::open`]. Must be called in a tokio runtime.
    pub fn open(pid: i32) -> io::Result<Self> {
        Self::of(PidFd::open(pid)?)
    }

    /// Of a process held already. Must be called in a tokio runtime.
    pub fn of(pidfd: PidFd) -> io::Result<Self> {
        // SAFETY: a PidFd owns its descriptor and never replaces it.
        let fd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Process { fd, exit: None })
    }

    /// Waits until it has ended, and reaps it if it is our child. May be called again, and cancelled.
    pub async fn exited(&mut self) -> Exit {
        if let Some(exit) = self.exit {
            return exit;
        }
        // The only error is that of a runtime shutting down, where nothing can be waited for any more.
        let _ = self.fd.readable().await;
        let id = Id::PIDFd(self.fd.get_ref().fd.as_fd());
        let exit = match waitid(id, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Exited(_, code)) => Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal as i32),
            _ => Exit::Unknown,
        };
        self.exit = Some(exit);
        exit
    }

    /// As [`PidFd::pid`].
    pub fn pid(&self) -> i32 {
        self.fd.get_ref().pid()
    }

    /// As [`PidFd::signal`].
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        self.fd.get_ref().signal(signal)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// Starts a shell command whose end nobody but [`Process`] waits for.
    #[expect(clippy::zombie_processes, reason = "reaped by Process::exited")]
    fn start(script: &str) -> Process {
        let child = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap();
        Process::open(i32::try_from(child.id()).unwrap()).unwrap()
    }

    #[tokio::test]
    async fn tells_how_it_ended() {
        assert_eq!(start("exit 3").exited().await, Exit::Code(3));
        assert_eq!(start("kill -9 $$").exited().await, Exit::Signal(9));
        let mut twice = start("exit 4");
        assert_eq!((twice.exited().await, twice.exited().await), (Exit::Code(4), Exit::Code(4)));
    }

    #[tokio::test]
    async fn a_signal_after_the_end_does_no_harm() {
        let mut process = start("sleep 60");
        process.signal(Signal::SIGKILL).unwrap();
        assert_eq!(process.exited().await, Exit::Signal(9));
        process.signal(Signal::SIGKILL).unwrap();
    }

    #[tokio::test]
    async fn no_process_no_handle() {
        assert_eq!(Process::open(i32::MAX).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
