//! The handle of a microVM. The states are drawn in the module above.

use std::path::PathBuf;
use std::sync::Arc;

use pulau_vmm::config::{BalloonStats, DriveUpdate, NetworkInterfaceUpdate};
use tokio::sync::{mpsc, oneshot, watch};

use super::boot_times::{BootTimes, guest_init_in_log};
use super::driver;
use super::ending::{Ending, Reason};
use super::home::{Home, HomeError};
use super::request::{Action, Line, Reins, Reply, Request, RequestError, SharedFacts, State, Stop, line};
use super::spec::{Host, Spec};
use super::usage::Usage;

/// A handle on a microVM. Clones are handles on the same one; when the last is dropped it is killed, unless it
/// was detached.
#[derive(Clone, Debug)]
pub struct MicroVm {
    id: String,
    line: Line,
}

impl MicroVm {
    /// A handle, and the ends for its driver.
    pub(super) fn new(id: &str) -> (Self, Reins) {
        let (line, reins) = line();
        (MicroVm { id: id.to_owned(), line }, reins)
    }

    /// Begins to start the microVM `spec` describes. Must be called in a tokio runtime, where its driver lives.
    pub fn create(host: Host, spec: Spec) -> Self {
        let (vm, reins) = Self::new(&spec.id);
        tokio::spawn(driver::create(host, spec, reins));
        vm
    }

    /// Takes over the microVM `id`, which whoever drove it before has detached or left by dying. From when this
    /// returns it is nobody else's, and [`super::sweep`] leaves it alone. Must be called in a tokio runtime.
    ///
    /// It is Starting until its VMM has answered, then Running or Paused, as it is. If the VMM has ended
    /// meanwhile, or a start was never finished, it goes to Stopped, and everything of it is removed.
    ///
    /// # Errors
    ///
    /// There is none of this name, or somebody drives it.
    pub fn adopt(host: &Host, id: &str) -> Result<Self, HomeError> {
        let home = Home::open(&host.run_dir, id)?;
        let (vm, reins) = Self::new(id);
        tokio::spawn(driver::adopt(home, reins));
        Ok(vm)
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// The state now; [`Self::watch`] tells every change.
    pub fn state(&self) -> State {
        self.line.state.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<State> {
        self.line.state.clone()
    }

    /// Waits until the guest boots.
    ///
    /// # Errors
    ///
    /// How it ended, if it did before.
    pub async fn started(&self) -> Result<(), Arc<Ending>> {
        match self.reach(|state| !matches!(state, State::Starting | State::Stopping)).await {
            State::Stopped(ending) => Err(ending),
            State::Detached => Err(Arc::new(Ending::new(Reason::Detached, None))),
            _ => Ok(()),
        }
    }

    /// Waits until it has ended and everything of it has been removed, or it was detached.
    pub async fn ended(&self) -> Arc<Ending> {
        match self.reach(|state| matches!(state, State::Stopped(_) | State::Detached)).await {
            State::Stopped(ending) => ending,
            // The latter only if the driver was dropped with its runtime.
            _ => Arc::new(Ending::new(Reason::Detached, None)),
        }
    }

    async fn reach(&self, wanted: impl FnMut(&State) -> bool) -> State {
        let mut state = self.line.state.clone();
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
        self.act(Action::Pause).await
    }

    /// Lets the vCPUs go on. Resuming a running microVM succeeds.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused.
    pub async fn resume(&self) -> Result<(), RequestError> {
        self.act(Action::Resume).await
    }

    /// Presses Ctrl+Alt+Del, which guests take for a wish to reboot. Whether and how the guest ends then is the
    /// guest's.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused.
    pub async fn ctrl_alt_del(&self) -> Result<(), RequestError> {
        self.act(Action::CtrlAltDel).await
    }

    /// Sets a drive's rate limits.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused.
    pub async fn limit_drive(&self, limits: DriveUpdate) -> Result<(), RequestError> {
        self.act(Action::LimitDrive(DriveUpdate { path_on_host: None, ..limits })).await
    }

    /// Sets a network interface's rate limits.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused.
    pub async fn limit_interface(&self, limits: NetworkInterfaceUpdate) -> Result<(), RequestError> {
        self.act(Action::LimitInterface(limits)).await
    }

    /// Asks the balloon to hold `mib` MiB of the guest's memory. The guest decides whether and when.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused: there is no balloon.
    pub async fn set_balloon(&self, mib: u32) -> Result<(), RequestError> {
        self.act(Action::SetBalloon(mib)).await
    }

    /// What the guest said last of its memory.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused: there is no balloon, or none with statistics.
    pub async fn balloon_statistics(&self) -> Result<BalloonStats, RequestError> {
        self.request(Request::BalloonStatistics).await
    }

    /// Replaces the guest's metadata.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused: too large.
    pub async fn put_metadata(&self, metadata: serde_json::Value) -> Result<(), RequestError> {
        self.act(Action::PutMetadata(metadata)).await
    }

    /// Changes the guest's metadata by a JSON merge patch (RFC 7396).
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM refused: too large.
    pub async fn patch_metadata(&self, patch: serde_json::Value) -> Result<(), RequestError> {
        self.act(Action::PatchMetadata(patch)).await
    }

    /// What it has used of the host so far.
    ///
    /// # Errors
    ///
    /// It is not running, or the VMM does not answer.
    pub async fn usage(&self) -> Result<Usage, RequestError> {
        self.request(Request::Usage).await
    }

    async fn act(&self, action: Action) -> Result<(), RequestError> {
        self.request(|reply| Request::Do(action, reply)).await
    }

    async fn request<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, RequestError> {
        if !matches!(self.state(), State::Running | State::Paused) {
            return Err(RequestError::NotRunning);
        }
        let (reply, answer) = oneshot::channel();
        self.line.requests.try_send(request(reply)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => RequestError::Busy,
            mpsc::error::TrySendError::Closed(_) => RequestError::NotRunning,
        })?;
        answer.await.unwrap_or(Err(RequestError::NotRunning))
    }

    /// Stops the microVM in any state and waits until everything of it has been removed. Can be called again
    /// to force a stop that takes too long.
    pub async fn stop(&self, how: Stop) -> Arc<Ending> {
        // A full queue empties, and a closed one belongs to a driver that is past taking requests.
        let _ = self.line.requests.send(Request::Stop(how)).await;
        self.ended().await
    }

    /// Lets the microVM go as it is, for another to adopt, and waits until it is free. All that was asked of it
    /// before is done first; a start or stop under way is left off in the middle, and whoever adopts it finishes
    /// it. Returns false if it had ended, and was not there to be let go.
    pub async fn detach(&self) -> bool {
        let _ = self.line.requests.send(Request::Detach).await;
        let gone = |state: &State| matches!(state, State::Stopped(_) | State::Detached);
        matches!(self.reach(gone).await, State::Detached)
    }

    /// When the steps of the start were done, as far as they have been; nothing if it was adopted. The guest's
    /// init is read from the VMM's log, so ask before the microVM is gone.
    pub fn times(&self) -> BootTimes {
        let mut facts = self.line.facts.lock();
        if facts.times.guest_init.is_none() {
            facts.times.guest_init = facts.vmm_log.as_deref().and_then(guest_init_in_log);
        }
        facts.times
    }

    /// The file the guest's console is written to, while the microVM exists.
    pub fn console_log(&self) -> Option<PathBuf> {
        self.line.facts.lock().console_log.clone()
    }

    pub(super) fn facts(&self) -> &SharedFacts {
        &self.line.facts
    }
}
