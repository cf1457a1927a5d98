//! The host's side of a connection, blocking: for tests, command-line tools and threads that wait anyway.
//!
//! A [`Connection`] is one stream on which the hello has been exchanged. [`connect`] makes one through
//! the Unix socket a VMM offers for a guest's vsock; [`Connection::new`] takes any [`Stream`]. Everything
//! the agent sends is checked and bounded: a guest may be hostile.

mod copy;
mod dial;
mod exec;

use std::io::{self, Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use dial::{DialError, connect, dial};
pub use exec::{Exec, ExecInput, ExecOutput, Output, OutputEvent};

use crate::frame::{self, Decoder, Kind};
use crate::message::{
    AgentHello, ClientHello, ErrorReply, Health, Reply, Request, Resumed, Shutdown, WallClock,
};
use crate::network::NetworkConfig;
use crate::{MAX_VERSION, MIN_VERSION};

/// What went wrong with a request.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The agent said no.
    #[error(transparent)]
    Agent(#[from] ErrorReply),
    /// The agent broke the protocol.
    #[error("the agent broke the protocol: {0}")]
    Protocol(String),
    #[error("the connection to the agent ended")]
    Disconnected,
    #[error("the agent did not answer in time")]
    TimedOut,
    #[error("the connection to the agent failed: {0}")]
    Io(#[source] io::Error),
    /// Reading what was to be sent, or writing what was received, failed on this side.
    #[error("local I/O failed: {0}")]
    Local(#[source] io::Error),
}

impl From<io::Error> for ClientError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::InvalidData => Self::Protocol(e.to_string()),
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted => Self::Disconnected,
            _ => Self::Io(e),
        }
    }
}

/// A connected, blocking byte stream with two handles on it for two threads.
pub trait Stream: Read + Write + Send + Sized {
    /// Another handle on the same connection.
    fn try_clone(&self) -> io::Result<Self>;
    /// Ends the connection in both directions, for every handle on it.
    fn shutdown(&self) -> io::Result<()>;
    /// How long a single read or write may block; for ever if `None`.
    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn try_clone(&self) -> io::Result<Self> {
        UnixStream::try_clone(self)
    }

    fn shutdown(&self) -> io::Result<()> {
        UnixStream::shutdown(self, Half::Both)
    }

    fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(timeout)?;
        self.set_write_timeout(timeout)
    }
}

/// A connection to an agent, ready for requests.
#[derive(Debug)]
pub struct Connection<S> {
    wire: Wire<S>,
    agent: AgentHello,
}

impl<S: Stream> Connection<S> {
    /// Exchanges the hello.
    ///
    /// # Errors
    /// [`ClientError::Agent`] with `unsupported_version` if no version is common to both;
    /// [`ClientError::TimedOut`] if the answer is not there by `deadline`; those of the stream.
    pub fn new(stream: S, deadline: Option<Instant>) -> Result<Self, ClientError> {
        let mut wire = Wire { stream, decoder: Decoder::new(), deadline };
        let client = format!("pulau {}", env!("CARGO_PKG_VERSION"));
        wire.send(Kind::Hello, &ClientHello { min_version: MIN_VERSION, max_version: MAX_VERSION, client })?;
        let agent: AgentHello = wire.expect(Kind::Hello)?;
        if !(MIN_VERSION..=MAX_VERSION).contains(&agent.version) {
            return Err(ClientError::Protocol(format!("it chose version {}, not offered", agent.version)));
        }
        Ok(Self { wire, agent })
    }

    /// What the agent said of itself.
    pub fn agent(&self) -> &AgentHello {
        &self.agent
    }

    /// By when the answers to the following requests must have come; no limit if `None`. Once a deadline
    /// has passed, the connection is of no more use. For an exec, it covers the start of the process
    /// only.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<(), ClientError> {
        self.wire.set_deadline(deadline)
    }

    /// # Errors
    /// As every request's: [`ClientError::Agent`] if the agent refuses, else those of the connection.
    pub fn health(&mut self) -> Result<Health, ClientError> {
        match self.request(&Request::Health)? {
            Reply::Health(health) => Ok(health),
            other => Err(unexpected(&other)),
        }
    }

    /// Sets the guest's wall clock.
    ///
    /// # Errors
    /// As [`health`](Self::health).
    pub fn set_time(&mut self, time: WallClock) -> Result<(), ClientError> {
        self.request_done(&Request::SetTime(time))
    }

    /// Sets up one of the guest's interfaces.
    ///
    /// # Errors
    /// As [`health`](Self::health).
    pub fn configure_network(&mut self, config: &NetworkConfig) -> Result<(), ClientError> {
        self.request_done(&Request::ConfigureNetwork(config.clone()))
    }

    /// Tells a restored guest who and when it is. When this returns, all of it has been applied.
    ///
    /// # Errors
    /// As [`health`](Self::health).
    pub fn resumed(&mut self, resumed: &Resumed) -> Result<(), ClientError> {
        self.request_done(&Request::Resumed(resumed.clone()))
    }

    /// Asks the guest to end. Returns when it has agreed to, not when it has ended.
    ///
    /// # Errors
    /// As [`health`](Self::health).
    pub fn shutdown(&mut self, shutdown: Shutdown) -> Result<(), ClientError> {
        self.request_done(&Request::Shutdown(shutdown))
    }

    fn request(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.wire.send(Kind::Request, request)?;
        self.wire.expect(Kind::Reply)
    }

    fn request_done(&mut self, request: &Request) -> Result<(), ClientError> {
        match self.request(request)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Protocol(format!("it answered another question: {reply:?}"))
}

/// A stream cut into frames, with a deadline over all of its reads and writes.
#[derive(Debug)]
struct Wire<S> {
    stream: S,
    decoder: Decoder,
    deadline: Option<Instant>,
}

impl<S: Stream> Wire<S> {
    fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<(), ClientError> {
        self.deadline = deadline;
        if deadline.is_none() {
            self.stream.set_timeout(None)?;
        }
        Ok(())
    }

    fn send(&mut self, kind: Kind, message: &impl Serialize) -> Result<(), ClientError> {
        let json = serde_json::to_vec(message).map_err(|e| ClientError::Local(e.into()))?;
        self.send_bytes(kind, &json)
    }

    fn send_bytes(&mut self, kind: Kind, payload: &[u8]) -> Result<(), ClientError> {
        let mut timed = Timed { stream: &mut self.stream, deadline: self.deadline };
        frame::write(&mut timed, kind, payload).map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput => ClientError::Local(e),
            _ => e.into(),
        })
    }

    /// The next frame; an error frame becomes [`ClientError::Agent`].
    fn receive(&mut self) -> Result<(Kind, &[u8]), ClientError> {
        let mut timed = Timed { stream: &mut self.stream, deadline: self.deadline };
        match self.decoder.read(&mut timed)? {
            None => Err(ClientError::Disconnected),
            Some((Kind::Error, payload)) => Err(ClientError::Agent(parse(payload)?)),
            Some(frame) => Ok(frame),
        }
    }

    /// Waits for the next frame and says its kind; [`receive`](Self::receive) then returns it at once.
    fn wait(&mut self) -> Result<Kind, ClientError> {
        let mut timed = Timed { stream: &mut self.stream, deadline: self.deadline };
        self.decoder.wait(&mut timed)?.ok_or(ClientError::Disconnected)
    }

    /// The next frame, which must be of this kind.
    fn expect<T: DeserializeOwned>(&mut self, kind: Kind) -> Result<T, ClientError> {
        match self.receive()? {
            (got, payload) if got == kind => parse(payload),
            (got, _) => Err(ClientError::Protocol(format!("expected {kind:?}, got {got:?}"))),
        }
    }
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(payload).map_err(|e| ClientError::Protocol(e.to_string()))
}

/// Gives every read and write what is left of the deadline.
struct Timed<'a, S> {
    stream: &'a mut S,
    deadline: Option<Instant>,
}

impl<S: Stream> Timed<'_, S> {
    fn arm(&self) -> io::Result<()> {
        let Some(deadline) = self.deadline else { return Ok(()) };
        match deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => self.stream.set_timeout(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl<S: Stream> Read for Timed<'_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.arm()?;
        self.stream.read(buf)
    }
}

impl<S: Stream> Write for Timed<'_, S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.arm()?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
