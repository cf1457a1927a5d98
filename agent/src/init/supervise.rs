//! PID 1 once the guest is set up: reap whatever ends, start again what must run, and wait for the signal
//! that ends the guest. One thread, which waits in one place.

use std::fs;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::reboot::set_cad_enabled;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use pulau_agent_protocol::message::ShutdownAction;

use super::boot::Booted;
use super::{DEFAULT_GRACE, console, shutdown};
use crate::agent::Agent;
use crate::listen::{self, Listener};

/// Between the end of a child that must run and its next start.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// Makes the kernel's OOM killer take nearly anything else first.
const OOM_SCORE: &str = "-900";

/// The signals PID 1 acts on; blocked from the start, so that they wait until it asks.
pub fn signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2].into_iter().collect()
}

/// Gives a child of PID 1's the signal mask that PID 1 was started with.
pub fn restore_signals(before: &SigSet) {
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(before), None);
}

/// Runs until the guest is to end, and ends it.
pub fn supervise(booted: Booted, before: &SigSet) -> ! {
    // Control-alt-delete (which the VMM can send) is now SIGINT to PID 1. Fails in a PID namespace.
    let _ = set_cad_enabled(false);
    let agent = Arc::new(booted.agent);
    let mut serving = Kept::new();
    let mut shell = Kept::new();
    loop {
        let mut next = None;
        if let Some(listener) = &booted.listener {
            next = serving.keep("serve hosts", || serve(listener, &agent, before));
        }
        if booted.options.console_shell {
            next = next.into_iter().chain(shell.keep("console shell", || console::start(before))).min();
        }
        if let Some((action, grace)) = wait_for_signal(next) {
            shutdown::end(action, grace, serving.pid);
        }
        reap(|pid| {
            serving.ended(pid);
            shell.ended(pid);
        });
    }
}

/// A child that is started again when it ends.
struct Kept {
    pid: Option<Pid>,
    due: Instant,
}

impl Kept {
    fn new() -> Self {
        Self { pid: None, due: Instant::now() }
    }

    /// Starts it if it is to be; returns when to look again, if it does not run.
    fn keep<E: std::fmt::Display>(
        &mut self,
        what: &str,
        start: impl FnOnce() -> Result<Pid, E>,
    ) -> Option<Instant> {
        if self.pid.is_none() && self.due <= Instant::now() {
            match start() {
                Ok(pid) => self.pid = Some(pid),
                Err(e) => log::error!("{what}: {e}"),
            }
            self.due = Instant::now() + RESTART_DELAY;
        }
        self.pid.is_none().then_some(self.due)
    }

    fn ended(&mut self, pid: Pid) {
        if self.pid == Some(pid) {
            self.pid = None;
        }
    }
}

/// Forks the process that serves hosts.
fn serve(listener: &Listener, agent: &Arc<Agent>, before: &SigSet) -> nix::Result<Pid> {
    // SAFETY: PID 1 has one thread, so the child may go on like any process.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            restore_signals(before);
            for ending in [Signal::SIGTERM, Signal::SIGHUP] {
                // At shutdown everything gets these, and this process must outlive its execs to the end of
                // their grace: hosts are to hear how they ended, and its own end would kill them.
                // SAFETY: installs no handler.
                let _ = unsafe { signal(ending, SigHandler::SigIgn) };
            }
            let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
            if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
                let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
            }
            let error = listen::serve(listener, agent);
            log::error!("accept connections: {error}");
            std::process::exit(1);
        }
    }
}

/// Waits until a child has ended, `until` has come, or the guest is to end: then, how.
fn wait_for_signal(until: Option<Instant>) -> Option<(ShutdownAction, Duration)> {
    const LONG: Duration = Duration::from_secs(3600);
    let left = until.map_or(LONG, |until| until.saturating_duration_since(Instant::now()));
    let timeout = libc::timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(left.subsec_nanos()),
    };
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: all three pointers are to live values of the right types; siginfo_t may be all zero bytes.
    let (number, info) = unsafe {
        let number = libc::sigtimedwait(signals().as_ref(), info.as_mut_ptr(), &timeout);
        (number, info.assume_init())
    };
    let action = match Signal::try_from(number) {
        Ok(Signal::SIGINT | Signal::SIGTERM) => ShutdownAction::Reboot,
        Ok(Signal::SIGUSR1 | Signal::SIGUSR2) => ShutdownAction::PowerOff,
        _ => return None,
    };
    let grace = match info.si_code {
        // SAFETY: a queued signal carries a value; of the union's two readings the kernel fills both.
        libc::SI_QUEUE => grace_from(unsafe { info.si_value() }),
        _ => DEFAULT_GRACE,
    };
    Some((action, grace))
}

/// Milliseconds that [`super::request_shutdown`] put into the signal.
fn grace_from(value: libc::sigval) -> Duration {
    // The integer is the low half of the pointer.
    Duration::from_millis(u64::from(value.sival_ptr.addr() as u32))
}

/// Waits for every child that has ended, its own and orphans.
fn reap(mut ended: impl FnMut(Pid)) {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => ended(pid),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            // EINVAL: ended by a signal nix has no name for; it is reaped all the same.
            Ok(_) | Err(_) => {}
        }
    }
}
