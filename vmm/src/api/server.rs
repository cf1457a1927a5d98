//! The Unix socket clients connect to, and their connections, as part of the program's one event loop.
//!
//! There is room for ten connections. One more takes the place of the one that has been quiet for
//! longest, an idle one if there is one: whoever forgets to close its connections, or sends nothing over
//! them, cannot shut others out.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};

use super::connection::{Connection, Handler, Next};
use crate::event_loop::{EventSet, Events};
use crate::http::Limits;
use crate::logger::LogLimit;
use crate::metrics::METRICS;

/// Connections at a time.
pub const MAX_CONNECTIONS: usize = 10;

/// Bytes of a request's line and headers.
const MAX_HEAD: usize = 8192;

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("--api-sock {path:?} already exists: another process may be using it, or left it behind")]
    Exists { path: PathBuf },
    #[error("--api-sock {path:?}: {error}")]
    Bind { path: PathBuf, error: io::Error },
    #[error("--api-sock {path:?} is longer than the 107 bytes of a socket's path")]
    TooLong { path: PathBuf },
    #[error("--api-sock: cannot wait for connections: {0}")]
    Wait(io::Error),
}

/// A bound socket, not yet waited for. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ApiSocket {
    /// Binds `path`, where nothing may be yet. From then on clients can connect and send.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let bind_error = |error: nix::Error| ServerError::Bind { path: path.to_owned(), error: error.into() };
        let address = UnixAddr::new(path).map_err(|_| ServerError::TooLong { path: path.to_owned() })?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(bind_error)?;
        socket::bind(fd.as_raw_fd(), &address).map_err(|error| match error {
            nix::Error::EADDRINUSE => ServerError::Exists { path: path.to_owned() },
            error => bind_error(error),
        })?;
        // From here the file is ours to remove.
        let socket = Self { listener: UnixListener::from(fd), path: path.to_owned() };
        let backlog = Backlog::new(MAX_CONNECTIONS as i32).map_err(bind_error)?;
        socket::listen(&socket.listener, backlog).map_err(bind_error)?;
        Ok(socket)
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A connection and when it was last heard of.
struct Slot {
    connection: Connection<UnixStream>,
    waits_for: Next,
    heard: u64,
}

/// See the module's text.
pub struct ApiServer {
    socket: ApiSocket,
    events: Events,
    first_token: u32,
    limits: Limits,
    slots: [Option<Slot>; MAX_CONNECTIONS],
    /// Counts what was heard of connections.
    clock: u64,
}

impl ApiServer {
    /// Waits for connections. Tokens from `first_token`, as many as [`Self::TOKENS`], are those of this
    /// server; bodies may have up to `max_body` bytes.
    pub fn new(
        socket: ApiSocket,
        events: Events,
        first_token: u32,
        max_body: usize,
    ) -> Result<Self, ServerError> {
        events.add(&socket.listener, first_token, EventSet::IN).map_err(ServerError::Wait)?;
        let limits = Limits { head: MAX_HEAD, body: max_body };
        Ok(Self { socket, events, first_token, limits, slots: Default::default(), clock: 0 })
    }

    /// How many tokens a server has.
    pub const TOKENS: u32 = 1 + MAX_CONNECTIONS as u32;

    /// Takes an event that came with one of the server's tokens. Every request that is complete goes
    /// through `handler`. Never waits.
    pub fn process(&mut self, token: u32, handler: &mut Handler<'_>) {
        match token.checked_sub(self.first_token) {
            Some(0) => self.accept(handler),
            Some(number) => self.advance(number as usize - 1, handler),
            None => {}
        }
    }

    fn accept(&mut self, handler: &mut Handler<'_>) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = match socket::accept4(self.socket.listener.as_raw_fd(), flags) {
            // SAFETY: the descriptor is new and nobody else's.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(error) => {
                let error = io::Error::from(error);
                // The client may be gone again.
                if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) {
                    static LIMIT: LogLimit = LogLimit::new();
                    if LIMIT.allow() {
                        log::error!("API: cannot accept a connection: {error}");
                    }
                    self.make_room();
                }
                return;
            }
        };
        let index = self.slots.iter().position(Option::is_none).unwrap_or_else(|| self.make_room());
        METRICS.api_server.connections.inc();
        let stream = UnixStream::from(fd);
        if let Err(error) = self.events.add(&stream, self.token(index), EventSet::IN) {
            log::error!("API: cannot wait for a connection: {error}");
            return;
        }
        let connection = Connection::new(stream);
        self.slots[index] = Some(Slot { connection, waits_for: Next::Read, heard: 0 });
        // Most clients send at once.
        self.advance(index, handler);
    }

    fn token(&self, index: usize) -> u32 {
        self.first_token + 1 + index as u32
    }

    /// Closes the connection that matters least and returns its place.
    fn make_room(&mut self) -> usize {
        let importance =
            |slot: &Option<Slot>| slot.as_ref().map(|slot| (!slot.connection.is_idle(), slot.heard));
        let index = (0..MAX_CONNECTIONS).min_by_key(|&index| importance(&self.slots[index])).unwrap_or(0);
        if self.slots[index].take().is_some() {
            METRICS.api_server.connections_evicted.inc();
            log::warn!("API: closed the quietest of {MAX_CONNECTIONS} connections for a new one");
        }
        index
    }

    fn advance(&mut self, index: usize, handler: &mut Handler<'_>) {
        let token = self.token(index);
        let Some(Some(slot)) = self.slots.get_mut(index) else { return };
        self.clock += 1;
        slot.heard = self.clock;
        let next = slot.connection.advance(self.limits, handler);
        let events = match next {
            next if next == slot.waits_for => return,
            Next::Read => EventSet::IN,
            Next::Write => EventSet::OUT,
            Next::Close => EventSet::empty(),
        };
        slot.waits_for = next;
        let waits = next != Next::Close
            && match self.events.modify(slot.connection.stream(), token, events) {
                Ok(()) => true,
                Err(error) => {
                    log::error!("API: cannot wait for a connection: {error}");
                    false
                }
            };
        if !waits {
            // Closing the descriptor also ends the waiting for it.
            self.slots[index] = None;
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
