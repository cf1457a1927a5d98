//! Why a VM ends, and the way from whoever notices (a vCPU thread, a device) to the main loop.

use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use crate::event_loop::lock;

/// What ended the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself (reboot).
    Reset,
    /// The guest kernel reported a panic.
    Panic,
    /// A vCPU shut down: a fault while handling a fault while handling a fault.
    TripleFault,
    /// KVM could not go on.
    Failure(String),
}

/// Takes the first reason and wakes the main loop.
#[derive(Clone)]
pub struct StopSink(Arc<Inner>);

struct Inner {
    reason: Mutex<Option<StopReason>>,
    event: EventFd,
}

impl StopSink {
    /// A sink nobody has used.
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Inner { reason: Mutex::new(None), event })))
    }

    /// Ends the VM. The first reason counts: what follows is its consequence.
    pub fn stop(&self, reason: StopReason) {
        lock(&self.0.reason).get_or_insert(reason);
        let _ = self.0.event.write(1);
    }

    /// Readable once there is a reason.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    /// The reason, if there is one.
    pub fn reason(&self) -> Option<StopReason> {
        lock(&self.0.reason).clone()
    }
}
