//! Taking over a microVM from what its home tells.

use std::time::Duration;

use pulau_vmm::config::{FullVmConfig, InstanceInfo, VmState};
use tokio::time::timeout;

use super::api::ApiError;
use super::ending::{Reason, StartError};
use super::machine::Machine;
use super::process::Process;
use super::request::SharedFacts;

/// For the VMM's first answer. It may be on an overloaded host, or be a daemon's that died a moment ago.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// For a VMM that is about to end: its socket is the last but one thing to go.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// Finds the VMM of `machine`'s home and connects to it. If there is none to be driven, why.
pub(super) async fn adopt(machine: &mut Machine, facts: &SharedFacts) -> Result<VmState, Reason> {
    let Some(home) = machine.home() else { return Err(Reason::NotStarted(StartError::Interrupted)) };
    let (started, exit) = (home.was_started(), home.recorded_exit());
    let vmm = home.find_vmm().and_then(|process| Process::of(process).ok());
    let Some(vmm) = vmm else {
        return Err(match started {
            true => Reason::of_exit(exit),
            false => Reason::NotStarted(StartError::Interrupted),
        });
    };
    machine.take(vmm);
    let asked = async {
        let api = machine.api().await?;
        let info: InstanceInfo = api.get("/").await?;
        let config: FullVmConfig = api.get("/vm/config").await?;
        Ok::<_, ApiError>((info.state, config))
    };
    let answer = timeout(ANSWERS_WITHIN, asked).await;
    let (state, config) = match answer {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) if started => {
            let gone = matches!(error, ApiError::Broken { .. } | ApiError::Connect(_));
            return Err(match gone.then_some(timeout(ENDS_WITHIN, machine.exited())) {
                Some(ending) => ending.await.map_or(Reason::Unmanageable(error), Reason::of_exit),
                None => Reason::Unmanageable(error),
            });
        }
        Err(_) if started => {
            let (request, limit) = ("GET /".to_owned(), ANSWERS_WITHIN);
            return Err(Reason::Unmanageable(ApiError::TimedOut { request, limit }));
        }
        _ => return Err(Reason::NotStarted(StartError::Interrupted)),
    };
    if state == VmState::NotStarted {
        return Err(Reason::NotStarted(StartError::Interrupted));
    }
    if let Some(home) = machine.home() {
        // The one before may have died between the request to boot and this.
        let _ = home.record_started();
    }
    let console = config.serial.is_some_and(|serial| serial.socket_path.is_some());
    machine.tell(config.vsock.is_some(), console, facts);
    Ok(state)
}

#[cfg(test)]
#[path = "adopt_tests.rs"]
mod tests;
