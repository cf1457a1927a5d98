//! Points at which a test can have the daemon die, as by a power cut: right there, with nothing flushed or
//! undone. `PULAU_FAULT=NAME:N` in the environment ends the process at the Nth passage of point NAME.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

struct Fault {
    name: String,
    left: AtomicU32,
}

static FAULT: OnceLock<Option<Fault>> = OnceLock::new();

/// Dies here, if that was asked for.
pub fn point(name: &str) {
    let Some(fault) = FAULT.get_or_init(from_environment) else { return };
    if fault.name == name && fault.left.fetch_sub(1, Ordering::Relaxed) == 1 {
        // SAFETY: sends a signal to this process, which cannot be handled and ends it.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

fn from_environment() -> Option<Fault> {
    let text = std::env::var("PULAU_FAULT").ok()?;
    let (name, count) = text.rsplit_once(':')?;
    Some(Fault { name: name.to_owned(), left: AtomicU32::new(count.parse().ok()?) })
}
