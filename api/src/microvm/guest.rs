//! Reaching into a guest: its agent and its console.
//!
//! The agent's client blocks, so each call here runs on a thread of the runtime's blocking pool, with a
//! bound in time of its own: a guest may do anything, also nothing.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pulau_agent_protocol::AGENT_PORT;
use pulau_agent_protocol::client::{ClientError, Connection, dial};
use pulau_agent_protocol::message::{Shutdown, ShutdownAction};
use tokio::time::sleep;

use super::ending::Ending;
use super::handle::MicroVm;
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
    #[error("cannot attach to the microVM's console: {0}")]
    Console(#[source] io::Error),
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// The way into a guest. The methods may block, bounded.
pub(super) trait Reach: fmt::Debug + Send + Sync {
    /// Whether there can be an agent at all.
    fn has_agent(&self) -> bool;
    /// One try to connect to the agent.
    fn agent(&self, deadline: Instant) -> Result<UnixStream, String>;
    /// Attaches to the console.
    fn console(&self) -> io::Result<UnixStream>;
}

/// The sockets of a VMM.
#[derive(Debug)]
pub(super) struct Sockets {
    pub vsock: Option<PathBuf>,
    pub console: Option<PathBuf>,
}

impl Reach for Sockets {
    fn has_agent(&self) -> bool {
        self.vsock.is_some()
    }

    fn agent(&self, deadline: Instant) -> Result<UnixStream, String> {
        let vsock = self.vsock.as_deref().ok_or("the microVM has no vsock device")?;
        let socket = PinnedSocket::open(vsock).map_err(|e| format!("{}: {e}", vsock.display()))?;
        dial(&socket.path(), AGENT_PORT, deadline).map_err(|e| e.to_string())
    }

    fn console(&self) -> io::Result<UnixStream> {
        let none = || io::Error::new(io::ErrorKind::NotFound, "the microVM was started without this");
        let socket = PinnedSocket::open(self.console.as_deref().ok_or_else(none)?)?;
        UnixStream::connect(socket.path())
    }
}

impl MicroVm {
    /// Connects to the guest's agent, waiting for it at most `limit` if the guest is still booting.
    ///
    /// # Errors
    ///
    /// The microVM ended meanwhile, or the agent did not answer in time.
    pub async fn agent(&self, limit: Duration) -> Result<Agent, GuestError> {
        // By the runtime's clock, which tests can move.
        let deadline = tokio::time::Instant::now() + limit;
        self.started().await.map_err(GuestError::Ended)?;
        let reach = self.facts().lock().reach.clone().filter(|reach| reach.has_agent());
        let reach = reach.ok_or(GuestError::NoVsock)?;
        loop {
            let connecting = blocking({
                let reach = reach.clone();
                let deadline = deadline.into_std();
                move || connect(reach.as_ref(), deadline)
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
            if tokio::time::Instant::now() >= deadline {
                return Err(GuestError::TimedOut { limit, last: error });
            }
            sleep(PAUSE).await;
        }
    }

    /// A connection to the guest's agent on which nothing has been said yet, for one who says hello himself. That
    /// the agent answers has been seen on another.
    ///
    /// # Errors
    ///
    /// As [`MicroVm::agent`].
    pub async fn agent_stream(&self, limit: Duration) -> Result<tokio::net::UnixStream, GuestError> {
        let deadline = Instant::now() + limit;
        drop(self.agent(limit).await?);
        let reach = self.facts().lock().reach.clone().ok_or(GuestError::NoVsock)?;
        let stream = blocking(move || {
            let stream = reach.agent(deadline)?;
            stream.set_nonblocking(true).map_err(|e| e.to_string())?;
            Ok(stream)
        });
        let stream = stream.await.map_err(|last| GuestError::TimedOut { limit, last })?;
        tokio::net::UnixStream::from_std(stream).map_err(|e| GuestError::Client(ClientError::Io(e)))
    }

    /// Attaches to the guest's serial console, to read and to type. First comes what the guest wrote last and
    /// nobody attached has seen. One client at a time: another one's connection ends at once. The console's log
    /// is written all the same.
    ///
    /// # Errors
    ///
    /// It is not running, or its console is not attachable ([`super::Console`]).
    pub async fn attach_console(&self) -> Result<tokio::net::UnixStream, GuestError> {
        self.started().await.map_err(GuestError::Ended)?;
        let reach = self.facts().lock().reach.clone().ok_or(GuestError::NoVsock)?;
        let attach = async {
            let stream = tokio::task::spawn_blocking(move || reach.console()).await??;
            stream.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(stream)
        };
        attach.await.map_err(GuestError::Console)
    }

    fn note_agent(&self) {
        let mut facts = self.facts().lock();
        let elapsed = facts.spawned_at.map(|at| at.elapsed());
        facts.times.agent = facts.times.agent.or(elapsed);
    }
}

/// Asks the guest to end itself. Returns whether it agreed.
pub(super) async fn shut_down(
    reach: Option<Arc<dyn Reach>>,
    action: ShutdownAction,
    deadline: Instant,
) -> bool {
    let Some(reach) = reach.filter(|reach| reach.has_agent()) else { return false };
    let until = deadline.min(Instant::now() + ASK_WITHIN);
    let ask = move || {
        let mut agent = connect(reach.as_ref(), until)?;
        let grace = deadline.saturating_duration_since(Instant::now()) / 2;
        let grace_ms = u32::try_from(grace.as_millis()).ok();
        agent.shutdown(Shutdown { action, grace_ms }).map_err(|e| e.to_string())
    };
    blocking(ask).await.is_ok()
}

/// One try to connect and exchange the hello. The connection keeps the deadline.
fn connect(reach: &dyn Reach, deadline: Instant) -> Result<Agent, String> {
    let stream = reach.agent(deadline)?;
    Connection::new(stream, Some(deadline)).map_err(|e| e.to_string())
}

async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    tokio::task::spawn_blocking(call).await.unwrap_or_else(|e| Err(e.to_string()))
}
