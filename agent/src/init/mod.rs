//! The agent as PID 1.
//!
//! It sets the guest up (`boot`), then forks: the child serves hosts, and the parent stays PID 1 and does
//! nothing but reap, keep its children running (`supervise`), and end the guest in good order
//! (`shutdown`). So no exec's status can be reaped from under it (PID 1 waits for its two children and for
//! orphans, the serving process for its own), and a fault in the serving process is not a kernel panic.
//!
//! Nothing that fails at boot ends it: it is logged, reported in `health`, and the boot goes on. A guest
//! that can say what is wrong with it is worth more than one that is gone.

mod boot;
mod boot_timer;
mod console;
mod first_boot;
mod modules;
mod mounts;
mod overlay;
mod shutdown;
mod supervise;

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use pulau_agent_protocol::message::{Shutdown, ShutdownAction};

/// Between SIGTERM and SIGKILL, unless the host says otherwise.
const DEFAULT_GRACE: Duration = Duration::from_secs(5);

/// Runs the guest.
pub fn run() -> ! {
    let mut before = SigSet::empty();
    // Cannot fail with arguments like these.
    let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&supervise::signals()), Some(&mut before));
    let booted = boot::boot(&before);
    supervise::supervise(booted, &before)
}

/// Asks PID 1, from the serving process, to end the guest. The signals are those of sysvinit and BusyBox,
/// so that their commands work too; the grace travels with the signal.
pub fn request_shutdown(shutdown: Shutdown) -> nix::Result<()> {
    let signal = match shutdown.action {
        ShutdownAction::PowerOff => Signal::SIGUSR2,
        ShutdownAction::Reboot => Signal::SIGTERM,
    };
    let grace = shutdown.grace_ms.map_or(DEFAULT_GRACE, |ms| Duration::from_millis(ms.into()));
    // Milliseconds that came as 32 bits fit.
    let value = libc::sigval { sival_ptr: std::ptr::without_provenance_mut(grace.as_millis() as usize) };
    // SAFETY: takes a process id, a signal number and a value that nobody takes for an address.
    Errno::result(unsafe { libc::sigqueue(1, signal as libc::c_int, value) }).map(drop)
}
