//! A process held by a pidfd, so that its number may be used again without harm.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// It ended, but was not our child, so the kernel does not say how.
    Unknown,
}

/// A process, usually our child. Dropping it does nothing to it; an ended child must be waited for.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    fd: AsyncFd<OwnedFd>,
    exit: Option<Exit>,
}

impl Process {
    /// Holds the process that has the number `pid` now. For a child not yet waited for, it cannot be another.
    ///
    /// # Errors
    ///
    /// `ESRCH` if there is none. Must be called in a tokio runtime.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: the call takes two integers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| io::ErrorKind::InvalidData)?;
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Process { pid, fd: AsyncFd::with_interest(fd, Interest::READABLE)?, exit: None })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Waits until it has ended, and reaps it if it is our child. May be called again, and cancelled.
    pub async fn exited(&mut self) -> Exit {
        if let Some(exit) = self.exit {
            return exit;
        }
        // The only error is that of a runtime shutting down, where nothing can be waited for any more.
        let _ = self.fd.readable().await;
        let exit = match waitid(Id::PIDFd(self.fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::Exited(_, code)) => Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal as i32),
            _ => Exit::Unknown,
        };
        self.exit = Some(exit);
        exit
    }

    /// Sends a signal. A process that has ended already is not an error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        // SAFETY: the descriptor is a pidfd; no siginfo is given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.get_ref().as_raw_fd(),
                signal as i32,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// Starts a shell command whose end nobody but [`Process`] waits for.
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
