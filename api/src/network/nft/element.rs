//! Elements of the rule set's sets and maps: what attaching a guest or publishing a port comes down to. Each
//! can be written both ways: as text of a whole rule set, and as a netlink message of a change.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;

use super::super::definition::{Attachment, NetworkDef, Published, Transport};
use super::super::netlink::{Message, Nest};

/// `NFNL_SUBSYS_NFTABLES` and its messages, from linux/netfilter/nfnetlink.h and nf_tables.h.
const NEW_ELEMENT: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8 | libc::NFT_MSG_NEWSETELEM as u16;
const DELETE_ELEMENT: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8 | libc::NFT_MSG_DELSETELEM as u16;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NFPROTO_INET: u8 = 1;
const NFPROTO_ARP: u8 = 3;
/// `IFNAMSIZ`.
const LINK_NAME: usize = 16;

/// One of the sets and maps that change while guests come and go.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Set {
    /// Which address is behind which tap.
    Guests,
    /// The same, for ARP.
    ArpGuests,
    /// Which address of the host's a tap may speak to.
    Gateways,
    /// By the sender's address: the chain of its n-th group.
    Egress(u8),
    /// By the receiver's.
    Ingress(u8),
    /// Addresses of a group's members.
    Members(String),
    /// By protocol, address and port of the host: a guest's address and port.
    Published,
    /// By protocol and port, whatever address of the host.
    PublishedAnywhere,
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guests | Self::ArpGuests => f.write_str("guests"),
            Self::Gateways => f.write_str("gateways"),
            Self::Egress(slot) => write!(f, "egress{slot}"),
            Self::Ingress(slot) => write!(f, "ingress{slot}"),
            Self::Members(group) => write!(f, "{group}.members"),
            Self::Published => f.write_str("published"),
            Self::PublishedAnywhere => f.write_str("published_anywhere"),
        }
    }
}

/// A part of a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Field {
    Link(String),
    Address(Ipv4Addr),
    Protocol(Transport),
    Port(u16),
}

/// What a map leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Target {
    /// A chain.
    Jump(String),
    Guest(Ipv4Addr, u16),
}

/// An element.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    pub set: Set,
    key: Vec<Field>,
    target: Option<Target>,
}

/// The elements that an attachment is.
pub fn of_attachment(attachment: &Attachment, network: &NetworkDef) -> BTreeSet<Element> {
    let link = || Field::Link(attachment.tap.clone());
    let address = || Field::Address(attachment.address);
    let element = |set, key| Element { set, key, target: None };
    let mut elements = BTreeSet::from([
        element(Set::Guests, vec![link(), address()]),
        element(Set::ArpGuests, vec![link(), address()]),
        element(Set::Gateways, vec![link(), Field::Address(network.gateway())]),
    ]);
    for (slot, group) in (0_u8..).zip(&attachment.groups) {
        let jump = |set, way| Element {
            set,
            key: vec![address()],
            target: Some(Target::Jump(format!("{group}.{way}"))),
        };
        elements.insert(jump(Set::Egress(slot), "out"));
        elements.insert(jump(Set::Ingress(slot), "in"));
        elements.insert(element(Set::Members(group.clone()), vec![address()]));
    }
    elements
}

/// The element that a published port is.
pub fn of_published(published: &Published) -> Element {
    let (protocol, port) = (Field::Protocol(published.protocol), Field::Port(published.host_port));
    let (set, key) = match published.host_address {
        Some(address) => (Set::Published, vec![protocol, Field::Address(address), port]),
        None => (Set::PublishedAnywhere, vec![protocol, port]),
    };
    Element { set, key, target: Some(Target::Guest(published.address, published.port)) }
}

/// As nft(8) reads it.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, field) in self.key.iter().enumerate() {
            let dot = if index == 0 { "" } else { " . " };
            match field {
                Field::Link(name) => write!(f, "{dot}\"{name}\"")?,
                Field::Address(address) => write!(f, "{dot}{address}")?,
                Field::Protocol(protocol) => write!(f, "{dot}{protocol}")?,
                Field::Port(port) => write!(f, "{dot}{port}")?,
            }
        }
        match &self.target {
            None => Ok(()),
            Some(Target::Jump(chain)) => write!(f, " : jump {chain}"),
            Some(Target::Guest(address, port)) => write!(f, " : {address} . {port}"),
        }
    }
}

impl Element {
    /// The message that adds the element to its set in table `table`.
    pub fn adding(&self, table: &str) -> Message {
        self.message(NEW_ELEMENT, libc::NLM_F_CREATE as u16, table, true)
    }

    /// The message that takes it out.
    pub fn deleting(&self, table: &str) -> Message {
        self.message(DELETE_ELEMENT, 0, table, false)
    }

    fn message(&self, kind: u16, flags: u16, table: &str, with_target: bool) -> Message {
        let family = if self.set == Set::ArpGuests { NFPROTO_ARP } else { NFPROTO_INET };
        // struct nfgenmsg: family, version, resource.
        Message::new(kind, flags, &[family, 0, 0, 0])
            .text(NFTA_SET_ELEM_LIST_TABLE, table)
            .text(NFTA_SET_ELEM_LIST_SET, &self.set.to_string())
            .nested(NFTA_SET_ELEM_LIST_ELEMENTS, |elements| {
                elements.nested(NFTA_LIST_ELEM, |element| {
                    element.nested(NFTA_SET_ELEM_KEY, |key| {
                        key.attribute(NFTA_DATA_VALUE, &self.key_bytes());
                    });
                    if let Some(target) = self.target.as_ref().filter(|_| with_target) {
                        element.nested(NFTA_SET_ELEM_DATA, |data| put_target(data, target));
                    }
                });
            })
    }

    /// The key as the kernel has it in its registers: every part fills whole ones.
    fn key_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in &self.key {
            match field {
                Field::Link(name) => {
                    let start = bytes.len();
                    bytes.extend_from_slice(name.as_bytes());
                    bytes.resize(start + LINK_NAME, 0);
                }
                Field::Address(address) => bytes.extend_from_slice(&address.octets()),
                Field::Protocol(protocol) => bytes.extend_from_slice(&[number(*protocol), 0, 0, 0]),
                Field::Port(port) => put_port(&mut bytes, *port),
            }
        }
        bytes
    }
}

fn put_target(data: &mut Nest<'_>, target: &Target) {
    match target {
        Target::Jump(chain) => data.nested(NFTA_DATA_VERDICT, |verdict| {
            verdict.attribute(NFTA_VERDICT_CODE, &libc::NFT_JUMP.to_be_bytes());
            verdict.text(NFTA_VERDICT_CHAIN, chain);
        }),
        Target::Guest(address, port) => {
            let mut bytes = address.octets().to_vec();
            put_port(&mut bytes, *port);
            data.attribute(NFTA_DATA_VALUE, &bytes);
        }
    }
}

fn put_port(bytes: &mut Vec<u8>, port: u16) {
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
}

fn number(protocol: Transport) -> u8 {
    match protocol {
        Transport::Tcp => libc::IPPROTO_TCP as u8,
        Transport::Udp => libc::IPPROTO_UDP as u8,
    }
}
