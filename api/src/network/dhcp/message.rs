//! The little of DHCP (RFC 2131, RFC 2132) that telling a guest its one address takes.
//!
//! What guests send is read field by field, and only the fields that matter here: of the hundred options there
//! are, three. Nothing a guest sends is copied into the answer but what is of fixed size.

use std::net::Ipv4Addr;

/// Length of what comes before the options, with the magic number (RFC 2131, section 2).
const FIXED: usize = 240;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
/// Shortest message that every client and relay takes (RFC 1542, section 2.1).
const MIN_LENGTH: usize = 300;
const BOOT_REQUEST: u8 = 1;
const BOOT_REPLY: u8 = 2;
const ETHERNET: u8 = 1;
const HARDWARE_ADDRESS: usize = 6;
const BROADCAST: u16 = 1 << 15;

/// Options (RFC 2132).
mod option {
    pub const PAD: u8 = 0;
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const HOST_NAME: u8 = 12;
    pub const DOMAIN_NAME: u8 = 15;
    pub const MTU: u8 = 26;
    pub const BROADCAST_ADDRESS: u8 = 28;
    pub const REQUESTED_ADDRESS: u8 = 50;
    pub const LEASE_TIME: u8 = 51;
    pub const KIND: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const END: u8 = 255;
}

/// Message types (RFC 2132, section 9.6) that a client sends and a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Discover,
    Request,
    Inform,
}

/// Message types that a server sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Offer = 2,
    Ack = 5,
    Nak = 6,
}

/// A client's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub asked: Asked,
    pub transaction: [u8; 4],
    seconds: [u8; 2],
    flags: u16,
    /// `ciaddr`: the address the client has already.
    pub current: Ipv4Addr,
    /// Its hardware address.
    pub hardware: [u8; HARDWARE_ADDRESS],
    /// Option 50.
    pub requested: Option<Ipv4Addr>,
    /// Option 54: the server that the client has chosen.
    pub server: Option<Ipv4Addr>,
}

impl Request {
    /// Reads a message. None if it is none, or none that a server answers.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (fixed, options) = bytes.split_at_checked(FIXED)?;
        let right = fixed[0] == BOOT_REQUEST && fixed[1] == ETHERNET && fixed[236..240] == MAGIC;
        if !right || usize::from(fixed[2]) != HARDWARE_ADDRESS {
            return None;
        }
        let (mut kind, mut requested, mut server) = (None, None, None);
        for (code, value) in each_option(options) {
            match code {
                option::KIND => kind = value.first().copied(),
                option::REQUESTED_ADDRESS => requested = address(value),
                option::SERVER => server = address(value),
                _ => {}
            }
        }
        let asked = match kind? {
            1 => Asked::Discover,
            3 => Asked::Request,
            8 => Asked::Inform,
            _ => return None,
        };
        Some(Self {
            asked,
            transaction: fixed[4..8].try_into().ok()?,
            seconds: fixed[8..10].try_into().ok()?,
            flags: u16::from_be_bytes([fixed[10], fixed[11]]),
            current: address(&fixed[12..16])?,
            hardware: fixed[28..28 + HARDWARE_ADDRESS].try_into().ok()?,
            requested,
            server,
        })
    }

    /// Whether the client cannot take an answer sent to its address yet.
    pub fn wants_broadcast(&self) -> bool {
        self.flags & BROADCAST != 0
    }
}

/// The options up to the end; none after the first that is cut short.
fn each_option(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        loop {
            let (code, rest) = bytes.split_first()?;
            match *code {
                option::PAD => bytes = rest,
                option::END => return None,
                code => {
                    let (length, rest) = rest.split_first()?;
                    let (value, rest) = rest.split_at_checked(usize::from(*length))?;
                    bytes = rest;
                    return Some((code, value));
                }
            }
        }
    })
}

fn address(value: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from)
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer<'a> {
    pub address: Ipv4Addr,
    pub mask: Ipv4Addr,
    pub broadcast: Ipv4Addr,
    /// The router, DNS server and DHCP server.
    pub gateway: Ipv4Addr,
    pub mtu: u16,
    pub domain: &'a str,
    pub host_name: Option<&'a str>,
}

/// The answer to `request`.
pub fn answer(request: &Request, reply: Reply, offer: &Offer<'_>) -> Vec<u8> {
    let mut bytes = vec![0; FIXED];
    bytes[0] = BOOT_REPLY;
    bytes[1] = ETHERNET;
    bytes[2] = HARDWARE_ADDRESS as u8;
    bytes[4..8].copy_from_slice(&request.transaction);
    bytes[8..10].copy_from_slice(&request.seconds);
    bytes[10..12].copy_from_slice(&(request.flags & BROADCAST).to_be_bytes());
    bytes[28..28 + HARDWARE_ADDRESS].copy_from_slice(&request.hardware);
    bytes[236..240].copy_from_slice(&MAGIC);
    let mut put = |code, value: &[u8]| {
        // Names are of at most 253 bytes.
        if let Ok(length) = u8::try_from(value.len()) {
            bytes.extend_from_slice(&[code, length]);
            bytes.extend_from_slice(value);
        }
    };
    put(option::KIND, &[reply as u8]);
    put(option::SERVER, &offer.gateway.octets());
    if reply != Reply::Nak {
        put(option::SUBNET_MASK, &offer.mask.octets());
        put(option::BROADCAST_ADDRESS, &offer.broadcast.octets());
        put(option::ROUTER, &offer.gateway.octets());
        put(option::DNS, &offer.gateway.octets());
        put(option::MTU, &offer.mtu.to_be_bytes());
        put(option::DOMAIN_NAME, offer.domain.as_bytes());
        if let Some(name) = offer.host_name {
            put(option::HOST_NAME, name.as_bytes());
        }
        // Without end: the address is the guest's until it is no more, whether or not anybody is there to ask.
        if request.asked != Asked::Inform {
            put(option::LEASE_TIME, &u32::MAX.to_be_bytes());
        }
    }
    match (reply, request.asked) {
        (Reply::Nak, _) => {}
        (_, Asked::Inform) => bytes[12..16].copy_from_slice(&request.current.octets()),
        _ => bytes[16..20].copy_from_slice(&offer.address.octets()),
    }
    bytes.push(option::END);
    bytes.resize(bytes.len().max(MIN_LENGTH), 0);
    bytes
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
