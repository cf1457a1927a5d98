//! The task that drives a microVM of this host. The states are drawn in the module above.

use std::sync::Arc;
use std::time::Duration;

use pulau_agent_protocol::message::ShutdownAction;
use pulau_vmm::config::{
    ActionConfig, ActionType, BalloonStats, BalloonUpdate, VmState, VmStateChange, VmStateUpdate,
};
use tokio::time::{Instant, sleep_until};

use super::api::ApiError;
use super::ending::{Reason, StartError};
use super::guest;
use super::home::Home;
use super::machine::Machine;
use super::request::{Action, End, Reins, Request, RequestError, State, Stop};
use super::spec::{Host, Spec};
use super::{adopt as takeover, start};

/// Starts a microVM and drives it to its end.
pub(super) async fn create(host: Host, spec: Spec, mut reins: Reins) {
    let mut machine = Machine::default();
    let facts = reins.facts.clone();
    let begun = tokio::select! {
        biased;
        end = reins.told_to_end(|| Reason::NotStarted(StartError::Abandoned)) => Err(end),
        result = start::start(&host, &spec, &mut machine, &facts) => match result {
            Ok(()) => Ok(State::Running),
            Err(error) => Err(End::Bury(Reason::NotStarted(error))),
        },
    };
    live(machine, begun, reins).await;
}

/// Takes over a microVM and drives it to its end.
pub(super) async fn adopt(home: Home, mut reins: Reins) {
    let mut machine = Machine::of(home);
    let facts = reins.facts.clone();
    let begun = tokio::select! {
        biased;
        end = reins.told_to_end(|| Reason::Killed) => Err(end),
        result = takeover::adopt(&mut machine, &facts) => match result {
            Ok(VmState::Paused) => Ok(State::Paused),
            Ok(_) => Ok(State::Running),
            Err(reason) => Err(End::Bury(reason)),
        },
    };
    live(machine, begun, reins).await;
}

async fn live(mut machine: Machine, begun: Result<State, End>, mut reins: Reins) {
    let end = match begun {
        Ok(state) => {
            reins.state.send_replace(state);
            run(&mut machine, &mut reins).await
        }
        Err(end) => end,
    };
    let reason = match end {
        End::Bury(reason) => reason,
        End::LetGo => {
            // Frees the home's lock, and touches nothing else.
            drop(machine);
            reins.state.send_replace(State::Detached);
            return;
        }
    };
    reins.state.send_replace(State::Stopping);
    // What still waits is answered by its reply's end.
    reins.requests.close();
    let ending = machine.bury(reason).await;
    reins.state.send_replace(State::Stopped(Arc::new(ending)));
}

/// Between looks at how large the console's log has become.
const LOOK_AT_LOG_EVERY: Duration = Duration::from_secs(10);

/// Serves requests until the microVM is to be buried or let go.
async fn run(machine: &mut Machine, reins: &mut Reins) -> End {
    let console = machine.console();
    let mut look_at_log = Instant::now() + LOOK_AT_LOG_EVERY;
    loop {
        let request = tokio::select! {
            exit = machine.exited() => return End::Bury(Reason::of_exit(exit)),
            request = reins.requests.recv() => request,
            () = sleep_until(look_at_log), if console.is_some() => {
                if let Some(log) = console.clone() {
                    // What cannot be done now can be at the next look.
                    let _ = tokio::task::spawn_blocking(move || log.bound()).await;
                }
                look_at_log = Instant::now() + LOOK_AT_LOG_EVERY;
                continue;
            }
        };
        match request {
            None | Some(Request::Stop(Stop::Force)) => return End::Bury(Reason::Killed),
            Some(Request::Stop(Stop::Orderly { grace })) => {
                return stop(machine, reins, ShutdownAction::PowerOff, grace).await;
            }
            Some(Request::Stop(Stop::Reboot { grace })) => {
                return stop(machine, reins, ShutdownAction::Reboot, grace).await;
            }
            Some(Request::Detach) => return End::LetGo,
            Some(Request::Do(action, reply)) => {
                let new = action.leads_to();
                let result = machine.act(action).await;
                if let (Ok(()), Some(new)) = (&result, new) {
                    reins.state.send_replace(new);
                }
                _ = reply.send(result);
            }
            Some(Request::BalloonStatistics(reply)) => _ = reply.send(machine.balloon_statistics().await),
            Some(Request::Usage(reply)) => _ = reply.send(machine.usage().await),
        }
    }
}

/// Asks the guest to end and waits for it, at most for `grace`, or until told to wait no more.
async fn stop(machine: &mut Machine, reins: &mut Reins, action: ShutdownAction, grace: Duration) -> End {
    let deadline = Instant::now() + grace;
    let paused = matches!(*reins.state.borrow(), State::Paused);
    reins.state.send_replace(State::Stopping);
    if paused && machine.act(Action::Resume).await.is_err() {
        return End::Bury(Reason::Killed);
    }
    let reach = reins.facts.lock().reach.clone();
    let mut asking = std::pin::pin!(guest::shut_down(reach, action, deadline.into_std()));
    let mut asked = false;
    loop {
        tokio::select! {
            exit = machine.exited() => return End::Bury(Reason::of_exit(exit)),
            () = sleep_until(deadline) => return End::Bury(Reason::Killed),
            request = reins.requests.recv() => match request {
                None | Some(Request::Stop(Stop::Force)) => return End::Bury(Reason::Killed),
                Some(Request::Detach) => return End::LetGo,
                Some(other) => other.refuse(),
            },
            agreed = &mut asking, if !asked => {
                asked = true;
                // No agent, or one that does not answer: the keys that init systems take for the same.
                if !agreed
                    && let Err(RequestError::Vmm(ApiError::Refused { .. })) =
                        machine.act(Action::CtrlAltDel).await
                {
                    return End::Bury(Reason::Killed);
                }
            }
        }
    }
}

impl Machine {
    async fn act(&mut self, action: Action) -> Result<(), RequestError> {
        let state = |state| VmStateUpdate { state };
        let result = match &action {
            Action::Pause => self.api().await?.patch("/vm", &state(VmStateChange::Paused)).await,
            Action::Resume => self.api().await?.patch("/vm", &state(VmStateChange::Resumed)).await,
            Action::CtrlAltDel => {
                let keys = ActionConfig { action_type: ActionType::SendCtrlAltDel };
                self.api().await?.put("/actions", &keys).await
            }
            Action::LimitDrive(update) => {
                self.api().await?.patch(&format!("/drives/{}", update.drive_id), update).await
            }
            Action::LimitInterface(update) => {
                self.api().await?.patch(&format!("/network-interfaces/{}", update.iface_id), update).await
            }
            Action::SetBalloon(amount_mib) => {
                self.api().await?.patch("/balloon", &BalloonUpdate { amount_mib: *amount_mib }).await
            }
            Action::PutMetadata(metadata) => self.api().await?.put("/mmds", metadata).await,
            Action::PatchMetadata(patch) => self.api().await?.patch("/mmds", patch).await,
        };
        self.noted(result)
    }

    async fn balloon_statistics(&mut self) -> Result<BalloonStats, RequestError> {
        let result = self.api().await?.get("/balloon/statistics").await;
        self.noted(result)
    }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
