//! The few rtnetlink(7) requests the agent needs, each sent and acknowledged in turn.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType};
use pulau_agent_protocol::network::{Cidr, Mac};

/// `struct nlmsghdr`: length, type, flags, sequence number, port.
const HEADER: usize = 16;
/// `NLMSG_ERROR`, which also carries acknowledgements, and `NLMSG_DONE`.
const ERROR: u16 = libc::NLMSG_ERROR as u16;
const DONE: u16 = libc::NLMSG_DONE as u16;
/// `RTNH_F_ONLINK` of `linux/rtnetlink.h`: take the gateway to be on the link, whatever the addresses say.
const ONLINK: u32 = 4;

/// A connection to the kernel's routing tables.
#[derive(Debug)]
pub struct Netlink {
    fd: OwnedFd,
    seq: u32,
}

/// A change to an interface; what is `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct Link {
    pub up: Option<bool>,
    pub mtu: Option<u32>,
    pub mac: Option<Mac>,
}

impl Netlink {
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> io::Result<Self> {
        let fd = socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self { fd, seq: 0 })
    }

    /// Changes the interface with this index.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_link(&mut self, index: u32, link: Link) -> io::Result<()> {
        let up = libc::IFF_UP as u32;
        let (flags, change) = match link.up {
            None => (0, 0),
            Some(true) => (up, up),
            Some(false) => (0, up),
        };
        // struct ifinfomsg: family, padding, type; index; flags; mask of the flags to change.
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.push(&[0, 0, 0, 0]);
        message.push(&index.to_ne_bytes());
        message.push(&u32::to_ne_bytes(flags));
        message.push(&u32::to_ne_bytes(change));
        if let Some(mtu) = link.mtu {
            message.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
        }
        if let Some(Mac(mac)) = link.mac {
            message.attribute(libc::IFLA_ADDRESS, &mac);
        }
        self.request(message)
    }

    /// The interface's addresses of global scope.
    ///
    /// # Errors
    /// The kernel's.
    pub fn addresses(&mut self, index: u32) -> io::Result<Vec<Cidr>> {
        let mut message = Message::new(libc::RTM_GETADDR, libc::NLM_F_DUMP);
        message.push(&[0; 8]);
        let mut found = Vec::new();
        self.exchange(message, |kind, body| {
            if kind == libc::RTM_NEWADDR {
                found.extend(parse_address(index, body));
            }
        })?;
        Ok(found)
    }

    /// # Errors
    /// The kernel's.
    pub fn add_address(&mut self, index: u32, address: Cidr) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        self.request(address_message(libc::RTM_NEWADDR, flags, index, address))
    }

    /// # Errors
    /// The kernel's.
    pub fn delete_address(&mut self, index: u32, address: Cidr) -> io::Result<()> {
        self.request(address_message(libc::RTM_DELADDR, 0, index, address))
    }

    /// Makes the default route of the gateway's family go there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let mut message = default_route_message(libc::RTM_NEWROUTE, flags, gateway.is_ipv4(), index);
        message.attribute(libc::RTA_GATEWAY, &octets(gateway));
        self.request(message)
    }

    /// Removes the default route through this interface, if there is one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn delete_default_route(&mut self, index: u32, ipv4: bool) -> io::Result<()> {
        let message = default_route_message(libc::RTM_DELROUTE, 0, ipv4, index);
        match self.request(message) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            // A kernel without IPv6 has no such routes either.
            Err(e) if !ipv4 && matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => {
                Ok(())
            }
            other => other,
        }
    }

    fn request(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message, |_, _| {})
    }

    /// Sends a request and hands each message of the answer to `each`, until it is complete.
    fn exchange(&mut self, message: Message, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.seq = self.seq.wrapping_add(1);
        let bytes = message.finish(self.seq);
        let sent = socket::send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        if sent != bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        let mut buf = vec![0u8; 32 * 1024];
        loop {
            let n = socket::recv(self.fd.as_raw_fd(), &mut buf, MsgFlags::empty())?;
            let mut rest = buf.get(..n).unwrap_or_default();
            while let Some((kind, seq, body, next)) = split_message(rest) {
                rest = next;
                if seq != self.seq {
                    continue;
                }
                match kind {
                    ERROR => {
                        let code = body.first_chunk().map_or(-libc::EIO, |code| i32::from_ne_bytes(*code));
                        return if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code).into()) };
                    }
                    DONE => return Ok(()),
                    _ => each(kind, body),
                }
            }
        }
    }
}

/// A request being put together.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: libc::c_int) -> Self {
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        Self(bytes)
    }

    fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Adds a `struct rtattr` and its value, padded to four bytes. Values here are at most 16 bytes.
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.push(&((4 + value.len()) as u16).to_ne_bytes());
        self.push(&kind.to_ne_bytes());
        self.push(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, seq: u32) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0[8..12].copy_from_slice(&seq.to_ne_bytes());
        self.0
    }
}

fn family(ipv4: bool) -> u8 {
    (if ipv4 { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address_message(kind: u16, flags: libc::c_int, index: u32, cidr: Cidr) -> Message {
    let mut message = Message::new(kind, flags);
    // struct ifaddrmsg: family, prefix length, flags, scope; index.
    message.push(&[family(cidr.address.is_ipv4()), cidr.prefix, 0, libc::RT_SCOPE_UNIVERSE]);
    message.push(&index.to_ne_bytes());
    message.attribute(libc::IFA_LOCAL, &octets(cidr.address));
    message.attribute(libc::IFA_ADDRESS, &octets(cidr.address));
    match cidr.address {
        // The last two prefix lengths leave no broadcast address.
        IpAddr::V4(address) if cidr.prefix < 31 => {
            let broadcast = u32::from(address) | u32::MAX.checked_shr(cidr.prefix.into()).unwrap_or(0);
            message.attribute(libc::IFA_BROADCAST, &broadcast.to_be_bytes());
        }
        IpAddr::V4(_) => {}
        // The host hands addresses out: usable at once, without asking the link for duplicates.
        IpAddr::V6(_) => message.attribute(libc::IFA_FLAGS, &libc::IFA_F_NODAD.to_ne_bytes()),
    }
    message
}

fn default_route_message(kind: u16, flags: libc::c_int, ipv4: bool, index: u32) -> Message {
    let adding = kind == libc::RTM_NEWROUTE;
    let mut message = Message::new(kind, flags);
    // struct rtmsg: family, destination, source and TOS lengths; table, protocol, scope, type; flags.
    message.push(&[family(ipv4), 0, 0, 0]);
    // Scope "nowhere" in a deletion is any scope.
    let scope = if adding { libc::RT_SCOPE_UNIVERSE } else { libc::RT_SCOPE_NOWHERE };
    let protocol = if adding { libc::RTPROT_STATIC } else { libc::RTPROT_UNSPEC };
    message.push(&[libc::RT_TABLE_MAIN, protocol, scope, libc::RTN_UNICAST]);
    message.push(&u32::to_ne_bytes(if adding { ONLINK } else { 0 }));
    message.attribute(libc::RTA_OIF, &index.to_ne_bytes());
    message
}

/// Cuts the first message off: its type, sequence number and body, and what comes after it.
fn split_message(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let len = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let seq = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
    let body = bytes.get(HEADER..len)?;
    let rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, seq, body, rest))
}

/// A `struct ifaddrmsg` and its attributes; `None` for another interface's or scope's.
fn parse_address(index: u32, body: &[u8]) -> Option<Cidr> {
    let (&[_, prefix, _, scope, a, b, c, d], mut rest) = body.split_first_chunk::<8>()?;
    if u32::from_ne_bytes([a, b, c, d]) != index || scope != libc::RT_SCOPE_UNIVERSE {
        return None;
    }
    let mut found = None;
    while let Some((&[a, b, c, d], _)) = rest.split_first_chunk::<4>() {
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let kind = u16::from_ne_bytes([c, d]);
        let value = rest.get(4..len)?;
        // On a point-to-point link ADDRESS is the peer's, and LOCAL this side's.
        if kind == libc::IFA_LOCAL || (kind == libc::IFA_ADDRESS && found.is_none()) {
            found = match value.len() {
                4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
                16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
                _ => None,
            };
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Cidr { address: found?, prefix })
}
