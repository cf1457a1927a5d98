//! Copying a disk that an instance has: nothing may write to it meanwhile.
//!
//! Each instance's disks have a lock. Its driver holds it while it boots the machine and while it ends it;
//! whoever copies a disk holds it for as long as that takes. So a machine that is not there is not started under
//! the copy, and one that runs is paused for it and goes on afterwards. A daemon that dies in between leaves a paused
//! machine: the next one has it go on (see `driver`), and the copy is thrown away.

use std::time::Duration;

use pulau_agent_protocol::message::ExecRequest;
use tokio::sync::OwnedMutexGuard;

use super::Service;
use super::error::Error;
use crate::fault;
use crate::microvm::{MicroVm, Reason, RequestError};
use crate::model::Kind;

/// For a guest to write out what it has in memory.
const FLUSH_WITHIN: Duration = Duration::from_secs(10);
/// Tries to have a machine go on, and the pause between them.
const TRIES: u32 = 20;
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// An instance's disks, on which nothing changes as long as this is held. To be given to [`Held::release`].
pub(super) struct Held {
    _disks: OwnedMutexGuard<()>,
    paused: Option<MicroVm>,
}

impl Service {
    /// Waits until nothing writes to an instance's disks. A running guest is asked to write out what it has in memory
    /// (best effort), and paused.
    pub(super) async fn hold(&self, instance: &str) -> Result<Held, Error> {
        let driven = self.lock().get(instance).map(|driven| (driven.disks.clone(), driven.machine.clone()));
        let (disks, machine) = driven.ok_or_else(|| Error::not_found(Kind::Instance, instance))?;
        let _disks = disks.lock_owned().await;
        let Some(vm) = machine.borrow().clone() else { return Ok(Held { _disks, paused: None }) };
        // One that was just adopted may not have answered yet.
        if vm.started().await.is_ok() {
            flush(&vm).await;
            match vm.pause().await {
                Ok(()) => {
                    fault::point("disk.held");
                    return Ok(Held { _disks, paused: Some(vm) });
                }
                Err(RequestError::NotRunning) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // It has ended by itself. Its driver has to wait for us before it starts another.
        match vm.ended().await.reason {
            Reason::Detached => Err(Error::Internal(format!("instance {instance} is let go"))),
            _ => Ok(Held { _disks, paused: None }),
        }
    }
}

impl Held {
    /// Lets the machine go on.
    pub async fn release(self) {
        let Some(vm) = &self.paused else { return };
        resume(vm).await;
    }
}

/// Has a paused machine go on.
pub(super) async fn resume(vm: &MicroVm) {
    for _ in 0..TRIES {
        match vm.resume().await {
            Ok(()) | Err(RequestError::NotRunning) => return,
            Err(error) => tracing::warn!(machine = vm.id(), "cannot go on, will be tried again: {error}"),
        }
        tokio::time::sleep(TRY_AGAIN).await;
    }
    tracing::error!(machine = vm.id(), "stays paused: stop and start its instance");
}

/// What the guest wrote before this is on its disks, if it has an agent and a `sync`.
async fn flush(vm: &MicroVm) {
    let sync = async {
        let agent = vm.agent(FLUSH_WITHIN).await.ok()?;
        let request = ExecRequest { argv: vec!["sync".into()], ..Default::default() };
        let run = tokio::task::spawn_blocking(move || agent.output(&request, b""));
        run.await.ok()?.ok()
    };
    if tokio::time::timeout(FLUSH_WITHIN, sync).await.ok().flatten().is_none() {
        tracing::info!(machine = vm.id(), "could not be asked to write out what it has in memory");
    }
}
