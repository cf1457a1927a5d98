//! Reaching a guest's vsock port through the Unix socket its VMM offers, by Firecracker's convention:
//! connect, send `CONNECT <port>\n`, and read `OK <host port>\n`; the bytes after that are the guest's.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::AsRawFd;

use super::{ClientError, Connection, Stream, Timed};
use crate::AGENT_PORT;

/// Why a guest's port could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The VMM's socket; the VMM is not running, or not with a vsock device.
    #[error("{}: {source}", path.display())]
    Socket { path: PathBuf, source: io::Error },
    /// The VMM closed the connection: nothing in the guest listens on the port (yet).
    #[error("nothing in the guest listens on vsock port {port}")]
    Refused { port: u32 },
    #[error("the VMM did not connect to the guest's vsock port {port} in time")]
    TimedOut { port: u32 },
    #[error("the VMM answered CONNECT with {0:?}")]
    Answer(String),
}

impl DialError {
    /// Whether the same call may succeed a moment later, as a guest boots.
    fn may_pass(&self) -> bool {
        match self {
            Self::Refused { .. } => true,
            Self::Socket { source, .. } => {
                matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
            }
            Self::TimedOut { .. } | Self::Answer(_) => false,
        }
    }
}

/// Longest answer to `CONNECT`: `OK 4294967295\n` and room to quote a wrong one.
const MAX_ANSWER: usize = 64;

/// Connects once to a port of the guest whose VMM offers `uds`. The stream has no timeouts set.
///
/// # Errors
/// [`DialError`]; each wait is bounded by `deadline`.
pub fn dial(uds: &Path, port: u32, deadline: Instant) -> Result<UnixStream, DialError> {
    let socket_error = |source| DialError::Socket { path: uds.to_owned(), source };
    let timed_out = |e: io::Error| match e.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => DialError::TimedOut { port },
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            DialError::Refused { port }
        }
        _ => socket_error(e),
    };
    let mut stream = connect_by(uds, deadline).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => DialError::TimedOut { port },
        _ => socket_error(e),
    })?;
    let mut timed = Timed { stream: &mut stream, deadline: Some(deadline) };
    timed.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(timed_out)?;
    // Byte by byte: what follows the line feed belongs to the guest.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") && answer.len() < MAX_ANSWER {
        let mut byte = [0];
        timed.read_exact(&mut byte).map_err(timed_out)?;
        answer.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&answer);
    let number = line.strip_prefix("OK ").and_then(|rest| rest.strip_suffix('\n'));
    if number.is_none_or(|n| n.parse::<u32>().is_err()) {
        return Err(DialError::Answer(line.trim_end().to_owned()));
    }
    Stream::set_timeout(&stream, None).map_err(socket_error)?;
    Ok(stream)
}

/// Connects to the agent in the guest whose VMM offers `uds`, trying again until `deadline` as long as
/// the VMM's socket or the agent is not there yet. The connection keeps the deadline.
///
/// # Errors
/// Those of the hello; if the agent was not reached in time, [`ClientError::Io`] with the last
/// [`DialError`] as source.
pub fn connect(uds: &Path, deadline: Instant) -> Result<Connection<UnixStream>, ClientError> {
    // A VMM may lose a CONNECT sent before the guest's driver is up: give each try a bounded time.
    const ONE_TRY: Duration = Duration::from_secs(3);
    let mut pause = Duration::from_millis(1);
    let mut earlier = None;
    loop {
        let this_try = deadline.min(Instant::now() + ONE_TRY);
        let error = match dial(uds, AGENT_PORT, this_try) {
            Ok(stream) => match Connection::new(stream, Some(deadline)) {
                // The VMM said OK, then the guest refused or was reset.
                Err(ClientError::Disconnected) => DialError::Refused { port: AGENT_PORT },
                other => return other,
            },
            Err(e) => e,
        };
        let timed_out = matches!(error, DialError::TimedOut { .. });
        if !(timed_out || error.may_pass()) || Instant::now() + pause >= deadline {
            // That the last try had too little time says less than why the one before it failed.
            let why = earlier.filter(|_| timed_out).unwrap_or(error);
            return Err(ClientError::Io(io::Error::other(why)));
        }
        earlier = Some(error);
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// `connect` with a deadline: a VMM that accepts no more connections must not hold the caller for ever.
fn connect_by(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let left = deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
    // The kernel takes a timeout of zero for none.
    let micros = i64::try_from(left.as_micros()).unwrap_or(i64::MAX).max(1);
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&fd, sockopt::SendTimeout, &TimeVal::microseconds(micros))?;
    socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(fd))
}

#[cfg(test)]
#[path = "dial_tests.rs"]
mod tests;
