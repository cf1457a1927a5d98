//! What can be asked of a microVM, and what is told of it: the words a [`super::MicroVm`] and whoever drives
//! it have in common.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pulau_vmm::config::{BalloonStats, DriveUpdate, NetworkInterfaceUpdate};
use tokio::sync::{mpsc, oneshot, watch};

use super::api::ApiError;
use super::boot_times::BootTimes;
use super::ending::{Ending, Reason};
use super::guest::Reach;
use super::usage::Usage;

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
    /// It was let go: what becomes of it is not seen from here any more.
    Detached,
}

/// How to stop a microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Ask the guest to power itself off, and kill the VMM if it has not within this time.
    Orderly { grace: Duration },
    /// Ask the guest to reboot itself, which ends its VMM, and kill the VMM if it has not within this time.
    /// The caller starts the next one.
    Reboot { grace: Duration },
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

/// Something to be done to a running or paused microVM.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Pause,
    Resume,
    /// Press Ctrl+Alt+Del.
    CtrlAltDel,
    /// Set a drive's rate limits. Its file cannot be changed this way.
    LimitDrive(DriveUpdate),
    /// Set a network interface's rate limits.
    LimitInterface(NetworkInterfaceUpdate),
    /// Set how much the balloon should hold, in MiB.
    SetBalloon(u32),
    /// Replace the metadata.
    PutMetadata(serde_json::Value),
    /// Change the metadata by a JSON merge patch (RFC 7396).
    PatchMetadata(serde_json::Value),
}

impl Action {
    /// The state a microVM is in when this has been done, if that is another.
    pub(super) fn leads_to(&self) -> Option<State> {
        match self {
            Action::Pause => Some(State::Paused),
            Action::Resume => Some(State::Running),
            _ => None,
        }
    }
}

/// How a driver's work ends.
pub(super) enum End {
    /// The microVM is to be removed.
    Bury(Reason),
    /// It is left as it is.
    LetGo,
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

pub(super) enum Request {
    Do(Action, Reply<()>),
    BalloonStatistics(Reply<BalloonStats>),
    Usage(Reply<Usage>),
    Stop(Stop),
    Detach,
}

impl Request {
    /// Says no to what is not possible in this state. A stop has no answer but the end.
    pub fn refuse(self) {
        match self {
            Request::Do(_, reply) => _ = reply.send(Err(RequestError::NotRunning)),
            Request::BalloonStatistics(reply) => _ = reply.send(Err(RequestError::NotRunning)),
            Request::Usage(reply) => _ = reply.send(Err(RequestError::NotRunning)),
            Request::Stop(_) | Request::Detach => {}
        }
    }
}

/// What a driver tells beside the state.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Set once the VMM process is about to be spawned.
    pub spawned_at: Option<std::time::Instant>,
    pub times: BootTimes,
    /// The way into the guest.
    pub reach: Option<Arc<dyn Reach>>,
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

/// A driver's ends of what connects it with the handles of its microVM.
pub(super) struct Reins {
    pub requests: mpsc::Receiver<Request>,
    pub state: watch::Sender<State>,
    pub facts: SharedFacts,
}

impl Reins {
    /// Returns when a stop is requested, or nobody can request anything any more; refuses everything else.
    pub async fn told_to_end(&mut self, stopped: impl Fn() -> Reason) -> End {
        while let Some(request) = self.requests.recv().await {
            match request {
                Request::Stop(_) => break,
                Request::Detach => return End::LetGo,
                other => other.refuse(),
            }
        }
        End::Bury(stopped())
    }
}

/// The handles' ends.
#[derive(Clone, Debug)]
pub(super) struct Line {
    pub requests: mpsc::Sender<Request>,
    pub state: watch::Receiver<State>,
    pub facts: SharedFacts,
}

/// Both ends, for a microVM that is about to be started or taken over.
pub(super) fn line() -> (Line, Reins) {
    let (sender, requests) = mpsc::channel(QUEUE);
    let (publisher, state) = watch::channel(State::Starting);
    let facts = SharedFacts::default();
    (Line { requests: sender, state, facts: facts.clone() }, Reins { requests, state: publisher, facts })
}
