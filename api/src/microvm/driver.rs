//! The handle of a microVM and the task that drives it. The states are drawn in the module above.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pulau_vmm::config::{ActionConfig, ActionType, VmStateChange, VmStateUpdate};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use super::api::ApiError;
use super::boot_times::{BootTimes, guest_init_in_log};
use super::ending::{Ending, Reason, StartError};
use super::guest;
use super::spec::{Host, Spec};
use super::start::{self, Machine};

/// Requests that may wait their turn; more are refused at once.
const QUEUE: usize = 16;

/// Where a microVM is in its life.
#[derive(Clone, Debug)]
pub enum State {
    Starting,
    Running,
    Paused,
    Stopping,
    Stopped(Arc<Ending>),
}

/// How to stop a microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Ask the guest to power itself off, and kill the VMM if it has not within this time.
    Orderly { grace: Duration },
    /// Kill the VMM. What the guest has not flushed to its disks is lost.
    Force,
}

/// A request that was not fulfilled. The microVM is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("the microVM is not running")]
    NotRunning,
    #[error("too many requests are waiting for this microVM")]
    Busy,
    #[error(transparent)]
    Vmm(#[from] ApiError),
}

type Reply = oneshot::Sender<Result<(), RequestError>>;

enum Request {
    Pause(Reply),
    Resume(Reply),
    Stop(Stop),
}

/// What the driver tells beside the state.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Set once the VMM process is about to be spawned.
    pub spawned_at: Option<std::time::Instant>,
    pub times: BootTimes,
    /// The vsock device's socket, as the host sees it.
    pub vsock: Option<PathBuf>,
    pub console_log: Option<PathBuf>,
    pub vmm_log: Option<PathBuf>,
}

/// The facts, shared between driver and handles. Locked only for moments, never across an await.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedFacts(Arc<Mutex<Facts>>);

impl SharedFacts {
    pub fn lock(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle on a microVM. Clones are handles on the same one; when the last is dropped it is killed.
#[derive(Clone, Debug)]
pub struct MicroVm {
    id: String,
    requests: mpsc::Sender<Request>,
    state: watch::Receiver<State>,
    facts: SharedFacts,
}

impl MicroVm {
    /// Begins to start the microVM `spec` describes. Must be called in a tokio runtime, where its driver lives.
    pub fn create(host: Host, spec: Spec) -> Self {
        let (requests, received) = mpsc::channel(QUEUE);
        let (publisher, state) = watch::channel(State::Starting);
        let facts = SharedFacts::default();
        let id = spec.id.clone();
        tokio::spawn(drive(host, spec, received, publisher, facts.clone()));
        MicroVm { id, requests, state, facts }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// The state now; [`Self::watch`] tells every change.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Waits until the guest boots.
    ///
    /// # Errors
    ///
    /// How it ended, if it did before.
    pub async fn started(&self) -> Result<(), Arc<Ending>> {
        match self.reach(|state| !matches!(state, State::Starting | State::Stopping)).await {
            State::Stopped(ending) => Err(ending),
            _ => Ok(()),
        }
    }

    /// Waits until it has ended and everything of it has been removed.
    pub async fn ended(&self) -> Arc<Ending> {
        match self.reach(|state| matches!(state, State::Stopped(_))).await {
            State::Stopped(ending) => ending,
            // Only if the driver was dropped with its runtime.
            _ => Arc::new(Ending::new(Reason::Killed, None)),
        }
    }

    async fn reach(&self, wanted: impl FnMut(&State) -> bool) -> State {
        let mut state = self.state.clone();
        match state.wait_for(wanted).await {
            Ok(state) => state.clone(),
            Err(_) => self.state(),
        }
    }

    /// Stops the vCPUs. Pausing a paused microVM succeeds.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused.
    pub async fn pause(&self) -> Result<(), RequestError> {
        self.request(Request::Pause).await
    }

    /// Lets the vCPUs go on. Resuming a running microVM succeeds.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused.
    pub async fn resume(&self) -> Result<(), RequestError> {
        self.request(Request::Resume).await
    }

    async fn request(&self, request: impl FnOnce(Reply) -> Request) -> Result<(), RequestError> {
        if !matches!(self.state(), State::Running | State::Paused) {
            return Err(RequestError::NotRunning);
        }
        let (reply, answer) = oneshot::channel();
        self.requests.try_send(request(reply)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => RequestError::Busy,
            mpsc::error::TrySendError::Closed(_) => RequestError::NotRunning,
        })?;
        answer.await.unwrap_or(Err(RequestError::NotRunning))
    }

    /// Stops the microVM in any state and waits until everything of it has been removed. Can be called again
    /// to force a stop that takes too long.
    pub async fn stop(&self, how: Stop) -> Arc<Ending> {
        // A full queue empties, and a closed one belongs to a driver that is past taking requests.
        let _ = self.requests.send(Request::Stop(how)).await;
        self.ended().await
    }

    /// When the steps of the start were done, as far as they have been. The guest's init is read from the VMM's
    /// log, so ask before the microVM is gone.
    pub fn times(&self) -> BootTimes {
        let mut facts = self.facts.lock();
        if facts.times.guest_init.is_none() {
            facts.times.guest_init = facts.vmm_log.as_deref().and_then(guest_init_in_log);
        }
        facts.times
    }

    /// The file the guest's console is written to, while the microVM exists.
    pub fn console_log(&self) -> Option<PathBuf> {
        self.facts.lock().console_log.clone()
    }

    pub(super) fn facts(&self) -> &SharedFacts {
        &self.facts
    }
}

async fn drive(
    host: Host,
    spec: Spec,
    mut requests: mpsc::Receiver<Request>,
    state: watch::Sender<State>,
    facts: SharedFacts,
) {
    let mut machine = Machine::default();
    let started = tokio::select! {
        biased;
        () = stop_requested(&mut requests) => Err(StartError::Abandoned),
        result = start::start(&host, &spec, &mut machine, &facts) => result,
    };
    let reason = match started {
        Ok(()) => {
            state.send_replace(State::Running);
            run(&mut machine, &mut requests, &state, &facts).await
        }
        Err(error) => Reason::NotStarted(error),
    };
    state.send_replace(State::Stopping);
    // Pauses and the like that still wait are answered by their reply's end.
    requests.close();
    let ending = machine.bury(reason).await;
    state.send_replace(State::Stopped(Arc::new(ending)));
}

/// Returns when a stop is requested, or nobody can request anything any more; refuses everything else.
async fn stop_requested(requests: &mut mpsc::Receiver<Request>) {
    while let Some(request) = requests.recv().await {
        match request {
            Request::Stop(_) => return,
            Request::Pause(reply) | Request::Resume(reply) => _ = reply.send(Err(RequestError::NotRunning)),
        }
    }
}

/// Serves requests until the microVM is to be buried, and says why.
async fn run(
    machine: &mut Machine,
    requests: &mut mpsc::Receiver<Request>,
    state: &watch::Sender<State>,
    facts: &SharedFacts,
) -> Reason {
    loop {
        let request = tokio::select! {
            exit = machine.exited() => return Reason::of_exit(exit),
            request = requests.recv() => request,
        };
        match request {
            None | Some(Request::Stop(Stop::Force)) => return Reason::Killed,
            Some(Request::Stop(Stop::Orderly { grace })) => {
                let paused = matches!(*state.borrow(), State::Paused);
                state.send_replace(State::Stopping);
                return stop(machine, requests, facts, paused, grace).await;
            }
            Some(Request::Pause(reply)) => {
                let result = machine.change_state(VmStateChange::Paused).await;
                publish_if(&result, state, State::Paused);
                _ = reply.send(result);
            }
            Some(Request::Resume(reply)) => {
                let result = machine.change_state(VmStateChange::Resumed).await;
                publish_if(&result, state, State::Running);
                _ = reply.send(result);
            }
        }
    }
}

fn publish_if(result: &Result<(), RequestError>, state: &watch::Sender<State>, new: State) {
    if result.is_ok() {
        state.send_replace(new);
    }
}

/// Asks the guest to end and waits for it, at most for `grace`, or until told to wait no more.
async fn stop(
    machine: &mut Machine,
    requests: &mut mpsc::Receiver<Request>,
    facts: &SharedFacts,
    paused: bool,
    grace: Duration,
) -> Reason {
    let deadline = Instant::now() + grace;
    if paused && machine.change_state(VmStateChange::Resumed).await.is_err() {
        return Reason::Killed;
    }
    let vsock = facts.lock().vsock.clone();
    let mut asking = std::pin::pin!(guest::power_off(vsock, deadline.into_std()));
    let mut asked = false;
    loop {
        tokio::select! {
            exit = machine.exited() => return Reason::of_exit(exit),
            () = sleep_until(deadline) => return Reason::Killed,
            request = requests.recv() => match request {
                None | Some(Request::Stop(Stop::Force)) => return Reason::Killed,
                Some(_) => {} // Its reply ends with it.
            },
            agreed = &mut asking, if !asked => {
                asked = true;
                // No agent, or one that does not answer: the keys that init systems take for the same.
                if !agreed
                    && let Err(RequestError::Vmm(ApiError::Refused { .. })) =
                        machine.action(ActionType::SendCtrlAltDel).await
                {
                    return Reason::Killed;
                }
            }
        }
    }
}

impl Machine {
    async fn change_state(&mut self, state: VmStateChange) -> Result<(), RequestError> {
        let api = self.api.as_mut().ok_or(RequestError::NotRunning)?;
        Ok(api.patch("/vm", &VmStateUpdate { state }).await?)
    }

    async fn action(&mut self, action_type: ActionType) -> Result<(), RequestError> {
        let api = self.api.as_mut().ok_or(RequestError::NotRunning)?;
        Ok(api.put("/actions", &ActionConfig { action_type }).await?)
    }
}

#[cfg(test)]
#[path = "driver_tests.rs"]
mod tests;
