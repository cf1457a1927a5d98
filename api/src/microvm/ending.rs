//! Why a microVM ended.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use pulau_vmm::exit::ExitCode;

use super::api::ApiError;
use super::home::{Home, HomeError};
use super::jail::JailError;
use super::process::Exit;
use super::spec::SpecError;
use super::tail::last_lines;

/// How a microVM ended, kept after everything of it has been removed.
#[derive(Debug)]
pub struct Ending {
    pub reason: Reason,
    /// The last lines of the guest's console, without control characters.
    pub console: Vec<String>,
    /// The last lines of the VMM's log.
    pub log: Vec<String>,
    /// What could not be removed.
    pub left_behind: Option<std::io::Error>,
}

/// Why it ended.
#[derive(Debug)]
pub enum Reason {
    /// It never ran.
    NotStarted(StartError),
    /// The guest powered itself off.
    PoweredOff,
    /// The guest rebooted itself, which ends a microVM.
    Rebooted,
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU met a fault it could not handle, nor the fault of that.
    TripleFault,
    /// We killed the VMM, as asked to.
    Killed,
    /// It had been left by another, and its VMM did not answer when it was to be taken over, so it was killed.
    Unmanageable(ApiError),
    /// It did not end: it was let go, and runs on.
    Detached,
    /// The VMM ended by itself in another way.
    VmmFailed(Exit),
}

/// Why a microVM did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("cannot start {}: {source}", vmm.display())]
    Spawn { vmm: std::path::PathBuf, source: std::io::Error },
    #[error("the VMM ended as it started ({0})")]
    Died(Exit),
    #[error("the VMM's control API did not come up within {} s", .0.as_secs())]
    Silent(Duration),
    /// A request that configures or boots it failed.
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error("stopped before it had started")]
    Abandoned,
    #[error("whoever started it died before it had started")]
    Interrupted,
}

impl Reason {
    /// What a VMM's exit says of its guest.
    pub(super) fn of_exit(exit: Exit) -> Self {
        match exit {
            Exit::Code(code) if code == ExitCode::Ok as i32 => Reason::PoweredOff,
            Exit::Code(code) if code == ExitCode::GuestReboot as i32 => Reason::Rebooted,
            Exit::Code(code) if code == ExitCode::GuestPanic as i32 => Reason::Panicked,
            Exit::Code(code) if code == ExitCode::TripleFault as i32 => Reason::TripleFault,
            other => Reason::VmmFailed(other),
        }
    }

    /// Whether the guest ended as guests should, or was told to.
    pub fn is_orderly(&self) -> bool {
        matches!(self, Reason::PoweredOff | Reason::Rebooted | Reason::Killed)
    }
}

impl Ending {
    pub(super) fn new(reason: Reason, home: Option<&Home>) -> Self {
        let lines = |path: fn(&Home) -> std::path::PathBuf, count| {
            home.map(|home| last_lines(&path(home), count)).unwrap_or_default()
        };
        Ending {
            reason,
            console: lines(Home::console_log, 25),
            log: lines(|home| Path::to_owned(&home.vmm_log()), 10),
            left_behind: None,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NotStarted(error) => write!(f, "it did not start: {error}"),
            Reason::PoweredOff => f.write_str("the guest powered itself off"),
            Reason::Rebooted => f.write_str("the guest rebooted itself"),
            Reason::Panicked => f.write_str("the guest's kernel panicked"),
            Reason::TripleFault => f.write_str("the guest's processor triple-faulted"),
            Reason::Killed => f.write_str("it was killed as requested"),
            Reason::Unmanageable(error) => write!(f, "it could not be taken over and was killed: {error}"),
            Reason::Detached => f.write_str("it was let go and runs on"),
            Reason::VmmFailed(exit) => write!(f, "the VMM ended unexpectedly ({exit})"),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) if *code == ExitCode::BadSyscall as i32 => {
                write!(f, "exit code {code}: a system call its filter forbids")
            }
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(libc::SIGSYS) => {
                f.write_str("killed by signal 31, SIGSYS: a system call its filter forbids")
            }
            Exit::Signal(libc::SIGKILL) => {
                f.write_str("killed by signal 9, SIGKILL: by somebody else, or for lack of memory")
            }
            Exit::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by signal {number}, {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
            Exit::Unknown => f.write_str("without saying why: it was killed, or the host went down"),
        }
    }
}
