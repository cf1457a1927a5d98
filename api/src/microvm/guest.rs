//! Reaching the agent in a guest.
//!
//! The agent's client blocks, so each call here runs on a thread of the runtime's blocking pool, with a
//! bound in time of its own: a guest may do anything, also nothing.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pulau_agent_protocol::AGENT_PORT;
use pulau_agent_protocol::client::{ClientError, Connection, dial};
use pulau_agent_protocol::message::{Shutdown, ShutdownAction};
use tokio::time::sleep;

use super::driver::MicroVm;
use super::ending::Ending;
use super::socket::PinnedSocket;

/// A connection to a guest's agent.
pub type Agent = Connection<UnixStream>;

/// Asking a guest to end, which may be past listening.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// Between tries while the guest boots: the VMM keeps a connection that comes before the guest has a driver,
/// but the guest refuses one that comes before the agent listens.
const PAUSE: Duration = Duration::from_millis(2);

/// The agent was not reached.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error("the microVM ended: {}", .0.reason)]
    Ended(Arc<Ending>),
    #[error("the guest's agent did not answer within {} s: {last}", limit.as_secs())]
    TimedOut { limit: Duration, last: String },
    #[error("the microVM has no vsock device, so its agent cannot be reached")]
    NoVsock,
    #[error(transparent)]
    Client(#[from] ClientError),
}

impl MicroVm {
    /// Connects to the guest's agent, waiting for it at most `limit` if the guest is still booting.
    ///
    /// # Errors
    ///
    /// The microVM ended meanwhile, or the agent did not answer in time.
    pub async fn agent(&self, limit: Duration) -> Result<Agent, GuestError> {
        let deadline = Instant::now() + limit;
        self.started().await.map_err(GuestError::Ended)?;
        let vsock = self.facts().lock().vsock.clone().ok_or(GuestError::NoVsock)?;
        loop {
            let connecting = blocking({
                let vsock = vsock.clone();
                move || connect(&vsock, deadline)
            });
            let error = tokio::select! {
                ending = self.ended() => return Err(GuestError::Ended(ending)),
                result = connecting => match result {
                    Ok(agent) => {
                        self.note_agent();
                        return Ok(agent);
                    }
                    Err(error) => error,
                },
            };
            if Instant::now() >= deadline {
                return Err(GuestError::TimedOut { limit, last: error });
            }
            sleep(PAUSE).await;
        }
    }

    fn note_agent(&self) {
        let mut facts = self.facts().lock();
        let elapsed = facts.spawned_at.map(|at| at.elapsed());
        facts.times.agent = facts.times.agent.or(elapsed);
    }
}

/// Asks the guest to power itself off. Returns whether it agreed.
pub(super) async fn power_off(vsock: Option<PathBuf>, deadline: Instant) -> bool {
    let Some(vsock) = vsock else { return false };
    let until = deadline.min(Instant::now() + ASK_WITHIN);
    let ask = move || {
        let mut agent = connect(&vsock, until)?;
        let grace = deadline.saturating_duration_since(Instant::now()) / 2;
        let grace_ms = u32::try_from(grace.as_millis()).ok();
        agent.shutdown(Shutdown { action: ShutdownAction::PowerOff, grace_ms }).map_err(|e| e.to_string())
    };
    blocking(ask).await.is_ok()
}

/// One try to connect and exchange the hello. The connection keeps the deadline.
fn connect(vsock: &Path, deadline: Instant) -> Result<Agent, String> {
    let socket = PinnedSocket::open(vsock).map_err(|e| format!("{}: {e}", vsock.display()))?;
    let stream = dial(&socket.path(), AGENT_PORT, deadline).map_err(|e| e.to_string())?;
    Connection::new(stream, Some(deadline)).map_err(|e| e.to_string())
}

async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(call).await.unwrap_or_else(|e| Err(e.to_string()))
}
