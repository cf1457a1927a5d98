//! How the process ends: its exit codes, and the file one is written to for whoever is not the parent.

use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};

/// Exit code of the process. Those from 148 are Firecracker's, where it has one for the same reason; those
/// from 64 to 68 are our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered off, or ended as it was asked to (SendCtrlAltDel), or the process was asked to end
    /// (SIGTERM, SIGINT).
    Ok = 0,
    /// Something failed; the log and standard error say what.
    Error = 1,
    /// The guest asked for a reset: microVMs do not reboot, whoever started this one starts it again.
    GuestReboot = 64,
    /// The guest's kernel panicked and said so.
    GuestPanic = 65,
    /// A vCPU shut down after a triple fault, and the guest had not asked for it.
    TripleFault = 66,
    /// KVM could not go on: an internal error, a failed entry, or an exit nothing here handles.
    KvmError = 67,
    /// The VMM itself panicked: a bug.
    Panicked = 68,
    /// A thread made a system call its filter does not allow.
    BadSyscall = 148,
    /// The process got SIGBUS.
    Sigbus = 149,
    /// The process got SIGSEGV.
    Sigsegv = 150,
    /// The configuration (`--config-file`, `--level`) cannot be used.
    BadConfiguration = 152,
    /// The command line cannot be used.
    BadArguments = 153,
    /// The process got SIGXCPU: it used up its CPU time.
    Sigxcpu = 154,
    /// The process got SIGHUP.
    Sighup = 156,
    /// The process got SIGILL.
    Sigill = 157,
}

impl ExitCode {
    /// The number.
    pub const fn code(self) -> u8 {
        self as u8
    }
}

/// The file for the exit code; none if negative.
static FILE: AtomicI32 = AtomicI32::new(-1);

/// Has the exit code written to the file at `path`, which is made or emptied now. An empty file then means that
/// the process runs, or was killed.
pub fn record_in(path: &Path) -> io::Result<()> {
    let mut options = std::fs::File::options();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    FILE.store(options.open(path)?.into_raw_fd(), Ordering::Relaxed);
    Ok(())
}

/// Writes `code` and a line end to the file, if there is one and nothing has been written yet. For the last
/// moment; allowed in a signal handler.
pub fn record(code: ExitCode) {
    let number = code.code();
    let line = [b'0' + number / 100, b'0' + number / 10 % 10, b'0' + number % 10, b'\n'];
    let file = FILE.swap(-1, Ordering::Relaxed);
    // SAFETY: the pointer and length are those of a live array. Without a file the call fails and does nothing.
    unsafe { libc::write(file, line.as_ptr().cast(), line.len()) };
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        std::process::ExitCode::from(code.code())
    }
}
