//! Netlink messages and the sockets they go through: what rtnetlink, nfnetlink and conntrack have in common.
//!
//! Everything here blocks, briefly: the kernel answers within the call that asks. A request is either
//! acknowledged or refused with the kernel's own words where it has any.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

/// `struct nlmsghdr`: length, type, flags, sequence number, port.
const HEADER: usize = 16;
const ERROR: u16 = libc::NLMSG_ERROR as u16;
const DONE: u16 = libc::NLMSG_DONE as u16;
const DUMP_INTERRUPTED: u16 = libc::NLM_F_DUMP_INTR as u16;
const ACK_TLVS: u16 = 0x200;
/// Of `linux/netlink.h`.
const NLMSGERR_ATTR_MSG: u16 = 1;
const TYPE_MASK: u16 = 0x3fff;
/// Longest answer the kernel makes up at once.
const BUFFER: usize = 64 << 10;
/// The kernel answers at once, unless something is very wrong with it.
const PATIENCE: Duration = Duration::from_secs(10);

pub const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub const ACK: u16 = libc::NLM_F_ACK as u16;
pub const CREATE: u16 = libc::NLM_F_CREATE as u16;
pub const REPLACE: u16 = libc::NLM_F_REPLACE as u16;
pub const EXCLUSIVE: u16 = libc::NLM_F_EXCL as u16;
pub const DUMP: u16 = libc::NLM_F_DUMP as u16;

/// A message under construction.
#[derive(Clone, Debug)]
pub struct Message(Vec<u8>);

impl Message {
    /// A message of `kind` with the fixed part of its body.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        pad(&mut bytes);
        Self(bytes)
    }

    /// Appends an attribute.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        put(&mut self.0, kind, |bytes| bytes.extend_from_slice(value));
        self
    }

    /// Appends a text attribute, which ends with a NUL.
    pub fn text(mut self, kind: u16, value: &str) -> Self {
        put(&mut self.0, kind, |bytes| {
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        });
        self
    }

    /// Appends an attribute that holds attributes.
    pub fn nested(mut self, kind: u16, build: impl FnOnce(&mut Nest<'_>)) -> Self {
        Nest(&mut self.0).nested(kind, build);
        self
    }

    /// The same message with more flags.
    pub fn with_flags(mut self, flags: u16) -> Self {
        let now = u16_at(&self.0, 6).unwrap_or_default() | flags;
        self.0[6..8].copy_from_slice(&now.to_ne_bytes());
        self
    }

    /// The bytes, with the length and sequence number filled in.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// Attributes inside an attribute.
pub struct Nest<'a>(&'a mut Vec<u8>);

impl Nest<'_> {
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        put(self.0, kind, |bytes| bytes.extend_from_slice(value));
    }

    pub fn text(&mut self, kind: u16, value: &str) {
        put(self.0, kind, |bytes| {
            bytes.extend_from_slice(value.as_bytes());
            bytes.push(0);
        });
    }

    pub fn nested(&mut self, kind: u16, build: impl FnOnce(&mut Nest<'_>)) {
        put(self.0, kind | libc::NLA_F_NESTED as u16, |bytes| build(&mut Nest(bytes)));
    }
}

fn put(bytes: &mut Vec<u8>, kind: u16, value: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&kind.to_ne_bytes());
    value(bytes);
    // Every value here is a name, an address or a few of them.
    let length = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
    bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    pad(bytes);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A message of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Received<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// Splits off the first message.
fn split(bytes: &[u8]) -> Option<(Received<'_>, &[u8])> {
    let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
    let body = bytes.get(HEADER..length)?;
    let received =
        Received { kind: u16_at(bytes, 4)?, flags: u16_at(bytes, 6)?, sequence: u32_at(bytes, 8)?, body };
    Some((received, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attributes in `bytes`: kind, without flags, and value. Ends at the first that is malformed.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The attribute of this kind.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A text attribute's text.
pub fn text(value: &[u8]) -> &str {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).unwrap_or_default()
}

pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

/// A socket to one of the kernel's netlink families, for one thread at a time.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        let patience = TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        setsockopt(&fd, sockopt::ReceiveTimeout, &patience)?;
        // A thousand guests' elements in one transaction.
        setsockopt(&fd, sockopt::SndBuf, &(4 << 20))?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            let on: libc::c_int = 1;
            let (value, length) = ((&raw const on).cast(), size_of_val(&on) as libc::socklen_t);
            // SAFETY: the kernel reads one int. That it fails on a kernel that does not know the option only
            // makes its errors less telling.
            unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, option, value, length) };
        }
        Ok(Self { fd, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Has a request carried out.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn request(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message.with_flags(ACK), |_, _| {})
    }

    /// Hands what the kernel answers, kind and body, to `each`.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub fn get(&mut self, message: Message, each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.exchange(message.with_flags(ACK), each)
    }

    /// All the kernel has of something, as a whole: if it changed meanwhile, it is read again.
    ///
    /// # Errors
    ///
    /// The kernel's refusal, or it changes without end.
    pub fn dump<T>(
        &mut self,
        message: &Message,
        mut each: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..20 {
            let mut found = Vec::new();
            let asked = message.clone().with_flags(DUMP);
            match self.exchange(asked, |kind, body| found.extend(each(kind, body))) {
                Ok(()) => return Ok(found),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::other("the kernel's tables change faster than they can be read"))
    }

    /// Sends messages that are one transaction, the last of which asks for an acknowledgement. What the
    /// transaction consists of is the caller's matter.
    ///
    /// # Errors
    ///
    /// The kernel's first refusal; nothing is done then.
    pub fn transact(&mut self, messages: Vec<Message>) -> io::Result<()> {
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            bytes.extend_from_slice(&message.finish(self.sequence));
        }
        self.send(&bytes)?;
        let count = self.sequence.wrapping_sub(first);
        let within = |sequence: u32| sequence.wrapping_sub(first) <= count;
        loop {
            let length = self.receive()?;
            let mut rest = &self.buffer[..length];
            while let Some((received, next)) = split(rest) {
                rest = next;
                if received.kind == ERROR && within(received.sequence) {
                    // Refusals come before the acknowledgement, and no more comes once all is done.
                    let result = refusal(&received);
                    self.drain();
                    return result;
                }
            }
        }
    }

    fn exchange(&mut self, message: Message, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = message.finish(self.sequence);
        self.send(&bytes)?;
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            let mut rest = &self.buffer[..length];
            while let Some((received, next)) = split(rest) {
                rest = next;
                if received.sequence != self.sequence {
                    continue;
                }
                interrupted |= received.flags & DUMP_INTERRUPTED != 0;
                match received.kind {
                    ERROR => return refusal(&received),
                    DONE if interrupted => return Err(io::ErrorKind::Interrupted.into()),
                    // Carries an error number as well, when a dump fails half-way.
                    DONE => {
                        return match u32_at(received.body, 0).map(u32::cast_signed) {
                            Some(error) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                            _ => Ok(()),
                        };
                    }
                    kind => each(kind, received.body),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        if send(self.fd.as_raw_fd(), bytes, MsgFlags::empty())? == bytes.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => {}
                other => return Ok(other?.min(self.buffer.len())),
            }
        }
    }

    /// Forgets what the kernel has said beyond what was waited for.
    fn drain(&mut self) {
        while recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT).is_ok() {}
    }
}

/// What an `NLMSG_ERROR` says: an acknowledgement, or an error number and perhaps words.
fn refusal(received: &Received<'_>) -> io::Result<()> {
    let error = u32_at(received.body, 0).ok_or(io::ErrorKind::InvalidData)?.cast_signed();
    if error == 0 {
        return Ok(());
    }
    let error = io::Error::from_raw_os_error(error.checked_neg().unwrap_or(libc::EINVAL));
    let words = match received.flags & ACK_TLVS {
        0 => None,
        // The error number and, capped, the header of the request.
        _ => attribute(received.body.get(4 + HEADER..).unwrap_or_default(), NLMSGERR_ATTR_MSG),
    };
    Err(match words {
        None => error,
        Some(words) => io::Error::new(error.kind(), Worded { error, words: text(words).to_owned() }),
    })
}

/// An error number with the kernel's own words.
#[derive(Debug, thiserror::Error)]
#[error("{words} ({error})")]
struct Worded {
    error: io::Error,
    words: String,
}

/// The error number of an error of this module.
pub fn errno(error: &io::Error) -> Option<i32> {
    let worded = || error.get_ref()?.downcast_ref::<Worded>()?.error.raw_os_error();
    error.raw_os_error().or_else(worded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_laid_out_as_the_kernel_reads_it() {
        let message =
            Message::new(0x10, ACK, &[7; 5]).text(3, "eth0").nested(2, |nest| nest.attribute(1, &[9, 8]));
        let bytes = message.finish(0x0102_0304);
        #[rustfmt::skip]
        let expected = [
            48, 0, 0, 0,  0x10, 0,  5, 0,  4, 3, 2, 1,  0, 0, 0, 0,
            7, 7, 7, 7, 7, 0, 0, 0,
            9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0,
            12, 0, 2, 0x80, 6, 0, 1, 0, 9, 8, 0, 0,
        ];
        assert_eq!(bytes, expected);
        let (received, rest) = split(&bytes).unwrap();
        assert_eq!((received.kind, received.flags, received.sequence, rest.len()), (0x10, 5, 0x0102_0304, 0));
        let body = &received.body[8..];
        assert_eq!(attribute(body, 3).map(text), Some("eth0"));
        assert_eq!(attributes(attribute(body, 2).unwrap()).collect::<Vec<_>>(), [(1, &[9, 8][..])]);
        assert_eq!(attribute(body, 5), None);
    }

    #[test]
    fn what_is_cut_short_is_not_read() {
        let bytes = Message::new(1, 0, &[]).text(1, "text").finish(1);
        for length in 0..bytes.len() {
            assert_eq!(split(&bytes[..length]), None, "{length}");
        }
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0, "shorter than itself");
        assert_eq!(attributes(&[9, 0, 1, 0, 1]).count(), 0, "longer than there is");
    }

    #[test]
    fn refusals_have_numbers_and_words() {
        fn received(flags: u16, body: &[u8]) -> Received<'_> {
            Received { kind: ERROR, flags, sequence: 1, body }
        }
        assert!(refusal(&received(0, &[0; 20])).is_ok());
        assert!(refusal(&received(0, &[0; 3])).is_err());
        let error = refusal(&received(0, &(-libc::EPERM).to_ne_bytes())).unwrap_err();
        assert_eq!(errno(&error), Some(libc::EPERM));
        let mut body = (-libc::ENOENT).to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; HEADER]);
        body.extend_from_slice(&[8, 0, 1, 0, b'w', b'h', b'y', 0]);
        let error = refusal(&received(ACK_TLVS, &body)).unwrap_err();
        assert_eq!(errno(&error), Some(libc::ENOENT));
        assert!(error.to_string().starts_with("why (No such file"), "{error}");
        assert!(refusal(&received(0, &i32::MIN.to_ne_bytes())).is_err());
    }
}
