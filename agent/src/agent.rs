//! What all connections share: who the agent is, how its boot went, and how much is going on.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use pulau_agent_protocol::message::{BootPhase, Role};

/// Name and version, as told to hosts.
pub const NAME: &str = concat!("pulau-agent ", env!("CARGO_PKG_VERSION"));

/// The state of one agent process.
#[derive(Debug)]
pub struct Agent {
    pub role: Role,
    /// When each phase of the boot was done; empty for a service.
    pub boot: Vec<BootPhase>,
    /// What went wrong at boot.
    pub problems: Vec<String>,
    pub connections: Gauge,
    pub execs: Gauge,
    id: Mutex<Option<String>>,
}

impl Agent {
    pub fn new(role: Role) -> Self {
        Self {
            role,
            boot: Vec::new(),
            problems: Vec::new(),
            connections: Gauge::default(),
            execs: Gauge::default(),
            id: Mutex::new(None),
        }
    }

    /// The host's name for this microVM, if it has told.
    pub fn id(&self) -> Option<String> {
        self.id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_id(&self, id: String) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
    }
}

/// Counts things that are there now.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU32);

impl Gauge {
    /// Counts one more until the returned guard is dropped; `None` if there are `max` already.
    pub fn enter(&self, max: u32) -> Option<Counted<'_>> {
        let grow = |n: u32| (n < max).then_some(n + 1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow).ok()?;
        Some(Counted(self))
    }

    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One thing counted by a [`Gauge`].
#[derive(Debug)]
pub struct Counted<'a>(&'a Gauge);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}
