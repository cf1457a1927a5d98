//! Taking connections in: the listening socket, who may connect, one thread for each.

use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, VsockAddr, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use pulau_agent_protocol::AGENT_PORT;
use pulau_agent_protocol::message::{ErrorCode, ErrorReply};

use crate::agent::Agent;
use crate::connection;

/// Connections served at once; further ones are told `busy`.
const MAX_CONNECTIONS: u32 = 1024;
/// A connection's thread holds its buffers on the heap.
const STACK: usize = 256 * 1024;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Vsock(u32),
    /// For tests: a socket only its owner may use.
    Unix(PathBuf),
}

impl Default for Address {
    fn default() -> Self {
        Self::Vsock(AGENT_PORT)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("vsock", port)) => {
                port.parse().map(Self::Vsock).map_err(|_| format!("{port:?} is not a vsock port"))
            }
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            _ => Err(format!("{text:?} is neither vsock:PORT nor unix:/path")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    vsock: bool,
}

impl Listener {
    /// # Errors
    /// Those of socket(2), bind(2) and listen(2); for vsock `EAFNOSUPPORT` if the kernel has none.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let open = |family| socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None);
        let (fd, vsock) = match address {
            Address::Vsock(port) => {
                let fd = open(AddressFamily::Vsock)?;
                socket::bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, *port))?;
                (fd, true)
            }
            Address::Unix(path) => {
                let fd = open(AddressFamily::Unix)?;
                match fs::remove_file(path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
                socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
                fs::set_permissions(path, Permissions::from_mode(0o600))?;
                (fd, false)
            }
        };
        socket::listen(&fd, Backlog::new(128)?)?;
        Ok(Self { fd, vsock })
    }

    fn accept(&self) -> io::Result<Socket> {
        let fd = socket::accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: accept4 has just returned this descriptor; nothing else owns it.
        let socket = Socket(unsafe { OwnedFd::from_raw_fd(fd) });
        // A process in this guest (over vsock's loopback), or a guest of this guest, is not the host: what
        // the agent does on request, only the host may ask for.
        if self.vsock {
            let peer: VsockAddr = socket::getpeername(fd)?;
            if peer.cid() != libc::VMADDR_CID_HOST {
                log::warn!("refused a connection from CID {}: not the host", peer.cid());
                return Err(Errno::ECONNABORTED.into());
            }
        }
        Ok(socket)
    }
}

/// A connected stream socket of any family.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// How long a single read may block; for ever if `None`.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        let secs = timeout.map_or(0, |t| i64::try_from(t.as_secs()).unwrap_or(i64::MAX));
        Ok(socket::setsockopt(self, sockopt::ReceiveTimeout, &TimeVal::seconds(secs))?)
    }

    /// Reads what is there; `WouldBlock` if that is nothing.
    pub fn read_now(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(socket::recv(self.0.as_raw_fd(), buf, MsgFlags::MSG_DONTWAIT)?)
    }

    /// Writes what there is room for; `WouldBlock` if there is none.
    pub fn write_now(&self, buf: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(socket::send(self.0.as_raw_fd(), buf, flags)?)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(socket::recv(self.0.as_raw_fd(), buf, MsgFlags::empty())?)
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(socket::send(self.0.as_raw_fd(), buf, MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves every connection until the listening socket fails; returns why it did.
pub fn serve(listener: &Listener, agent: &Arc<Agent>) -> io::Error {
    loop {
        let socket = match listener.accept() {
            Ok(socket) => socket,
            Err(e) => match e.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EINTR | Errno::ECONNABORTED | Errno::ECONNRESET | Errno::ENOTCONN) => continue,
                Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => {
                    // Passes when a connection ends; the waiting one stays in the backlog.
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
                _ => return e,
            },
        };
        let for_thread = agent.clone();
        let run = move || match for_thread.connections.enter(MAX_CONNECTIONS) {
            Some(_counted) => connection::serve(&socket, &for_thread),
            None => connection::refuse(
                &socket,
                &ErrorReply::new(ErrorCode::Busy, format!("{MAX_CONNECTIONS} connections are open")),
            ),
        };
        if let Err(e) = thread::Builder::new().stack_size(STACK).spawn(run) {
            // The closure, and with it the connection, is gone: the host sees it closed.
            log::warn!("no thread for a connection: {e}");
        }
    }
}
