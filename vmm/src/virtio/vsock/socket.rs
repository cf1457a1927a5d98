//! The host's end of a connection: non-blocking Unix stream sockets, read into and written from guest
//! memory without a copy in between.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libc::{c_int, iovec, msghdr};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect as nix_connect, recv, socket,
};

use crate::virtio::buffers::GuestBuffers;

/// Connects to `path`. Never waits: a listener whose backlog is full is an error like a missing one.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    nix_connect(fd.as_raw_fd(), &address)?;
    Ok(UnixStream::from(fd))
}

fn message(pieces: &[iovec]) -> msghdr {
    // SAFETY: all zeroes are a valid `msghdr` (null pointers with zero lengths).
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    message
}

fn send_pieces(stream: &UnixStream, pieces: &[iovec]) -> io::Result<usize> {
    let message = message(pieces);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: every piece is readable memory that lives through the call (both callers see to it).
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Sends what `from` lists and returns how much of it went.
pub fn send_guest(stream: &UnixStream, from: &GuestBuffers) -> io::Result<usize> {
    send_pieces(stream, from.pieces())
}

/// Sends `parts` one after the other and returns how much of them went.
pub fn send(stream: &UnixStream, parts: [&[u8]; 2]) -> io::Result<usize> {
    let pieces = parts.map(|part| iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    send_pieces(stream, &pieces)
}

/// What a read brought.
pub struct Received {
    /// Bytes; 0 is the end of the stream.
    pub len: usize,
    /// Descriptors came along and were dropped, which ends a read early though more may wait.
    pub truncated: bool,
}

/// Receives into what `to` lists.
pub fn receive_guest(stream: &UnixStream, to: &GuestBuffers) -> io::Result<Received> {
    let mut message = message(to.pieces());
    let flags: c_int = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every piece is guest memory, writable, and kept alive by `to`; nothing else is passed in.
    let received = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, flags) };
    let len = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    Ok(Received { len, truncated: message.msg_flags & libc::MSG_CTRUNC != 0 })
}

/// Copies what waits to be read into `to` and leaves it waiting.
pub fn peek(stream: &UnixStream, to: &mut [u8]) -> io::Result<usize> {
    Ok(recv(stream.as_raw_fd(), to, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?)
}
