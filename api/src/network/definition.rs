//! What the network is to be, as plain data: networks, security groups, attachments and published ports.
//!
//! Whoever makes these keeps them; nothing here touches the host. Names that come from clients end up in rule
//! sets, so their characters are checked here and nowhere else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use pulau_vmm::config::MacAddr;
use serde::{Deserialize, Serialize};

use super::addresses::{self, AddressError};

/// Most groups of one attachment, as in EC2: each is one more look-up for every new connection.
pub const MAX_GROUPS: usize = 5;
/// Smallest and largest packet of a network, in bytes: what IPv4 must carry, and what a tap can.
const MTU: std::ops::RangeInclusive<u16> = 576..=65521;
/// `IFNAMSIZ` without its NUL.
const MAX_LINK_NAME: usize = 15;

/// A subnet that guests are in, apart from every other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkDef {
    /// Letters, digits and `-`.
    pub id: String,
    /// /16 to /28. The first address but one is the gateway's, which also answers DHCP and DNS.
    pub subnet: Ipv4Net,
    /// Whether guests reach what is outside, under the host's address. Otherwise nothing leads out of the
    /// network or into it, but for ports that are published.
    pub nat: bool,
    /// DNS domain of the guests' names, such as `vpc.internal`.
    pub domain: String,
    /// Largest packet in bytes, told to guests by DHCP.
    pub mtu: u16,
}

impl NetworkDef {
    /// The host's address in the network.
    pub fn gateway(&self) -> Ipv4Addr {
        addresses::gateway(self.subnet)
    }
}

/// A security group. What no rule of an attachment's groups allows is dropped; answers are always allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupDef {
    /// Letters, digits and `-`.
    pub id: String,
    /// What may come to its members.
    pub ingress: Vec<Rule>,
    /// What its members may send.
    pub egress: Vec<Rule>,
}

/// Traffic with any of some peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub traffic: Traffic,
    /// With whom; nobody if empty.
    pub peers: Vec<Peer>,
}

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Traffic {
    All,
    Tcp(Ports),
    Udp(Ports),
    /// ICMP of one type, or of all.
    Icmp(Option<u8>),
}

/// Destination ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    pub from: u16,
    pub to: u16,
}

impl Ports {
    pub const ALL: Ports = Ports { from: 0, to: u16::MAX };

    pub const fn one(port: u16) -> Self {
        Self { from: port, to: port }
    }
}

/// The other end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// Addresses.
    Cidr(Ipv4Net),
    /// The members of a group, by its id.
    Group(String),
}

/// A guest's interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Name of the tap: the prefix, `-`, and something of its own; see [`super::Config::prefix`].
    pub tap: String,
    /// The guest's hardware address.
    pub mac: MacAddr,
    /// In its network's subnet, and nobody else's.
    pub address: Ipv4Addr,
    /// The network's id.
    pub network: String,
    /// Ids of at most [`MAX_GROUPS`] groups.
    pub groups: Vec<String>,
    /// Names in the network's domain: single labels. The first is told by DHCP. Several guests may share one.
    pub names: Vec<String>,
    /// User who may attach to the tap: root if the VMM gets it by `--tap`.
    pub owner: u32,
}

/// A port of the host that leads to a guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Published {
    pub protocol: Transport,
    /// One of the host's addresses; None is any of them.
    pub host_address: Option<Ipv4Addr>,
    pub host_port: u16,
    /// The guest's.
    pub address: Ipv4Addr,
    pub port: u16,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    Tcp,
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub networks: Vec<NetworkDef>,
    pub groups: Vec<GroupDef>,
    pub attachments: Vec<Attachment>,
    pub published: Vec<Published>,
}

/// A part of a plan that cannot be meant, or does not fit the rest of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DefinitionError {
    #[error("{what} {name:?}: {problem}")]
    Name { what: &'static str, name: String, problem: &'static str },
    #[error("there is no {what} {id}")]
    Missing { what: &'static str, id: String },
    #[error("{what} {id} is there twice")]
    Twice { what: &'static str, id: String },
    #[error("{what} {id} is still used by {user}")]
    InUse { what: &'static str, id: String, user: String },
    #[error("network {id}: {source}")]
    Subnet { id: String, source: AddressError },
    #[error("network {id}: its subnet and name cannot change")]
    Immutable { id: String },
    #[error("network {id}: its packets must be of {} to {} bytes, not {mtu}", MTU.start(), MTU.end())]
    Mtu { id: String, mtu: u16 },
    #[error("{tap}: {source}")]
    Address { tap: String, source: AddressError },
    #[error("{tap}: {mac} is the address of several stations")]
    Multicast { tap: String, mac: MacAddr },
    #[error("{tap} has {count} groups; at most {MAX_GROUPS} are possible")]
    Groups { tap: String, count: usize },
    #[error("group {id}: ports {from} to {to} are in the wrong order")]
    Ports { id: String, from: u16, to: u16 },
    #[error("{protocol} port {port} of the host leads somewhere else already")]
    Published { protocol: Transport, port: u16 },
}

type Result<T, E = DefinitionError> = std::result::Result<T, E>;

/// A [`Plan`] that makes sense, arranged for looking things up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    pub networks: BTreeMap<String, NetworkDef>,
    pub groups: BTreeMap<String, GroupDef>,
    /// By tap.
    pub attachments: BTreeMap<String, Attachment>,
    pub published: BTreeSet<Published>,
}

impl Checked {
    /// Checks a whole plan; `prefix` is that of the taps' names.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn new(plan: &Plan, prefix: &str) -> Result<Self> {
        let mut checked = Self::default();
        let once = |new: bool, what, id: &str| match new {
            true => Ok(()),
            false => Err(DefinitionError::Twice { what, id: id.to_owned() }),
        };
        for network in &plan.networks {
            once(!checked.networks.contains_key(&network.id), "network", &network.id)?;
            checked.set_network(network.clone())?;
        }
        let mut groups = BTreeMap::new();
        for group in &plan.groups {
            once(groups.insert(group.id.clone(), group.clone()).is_none(), "group", &group.id)?;
        }
        checked.set_groups(groups.into_values())?;
        for attachment in &plan.attachments {
            once(!checked.attachments.contains_key(&attachment.tap), "tap", &attachment.tap)?;
            checked.attach(attachment.clone(), prefix)?;
        }
        for published in &plan.published {
            checked.add_published(*published)?;
        }
        Ok(checked)
    }

    /// Adds a network, or changes what may change of it. Says whether anything did.
    ///
    /// # Errors
    ///
    /// It is malformed, overlaps another, or its subnet would change.
    pub fn set_network(&mut self, network: NetworkDef) -> Result<bool> {
        let id = || network.id.clone();
        check_id("network", &network.id)?;
        let subnet = |source| DefinitionError::Subnet { id: id(), source };
        addresses::check_subnet(network.subnet).map_err(subnet)?;
        let others = self.networks.values().filter(|other| other.id != network.id);
        addresses::check_apart(network.subnet, others.map(|other| other.subnet)).map_err(subnet)?;
        if !MTU.contains(&network.mtu) {
            return Err(DefinitionError::Mtu { id: id(), mtu: network.mtu });
        }
        check_domain(&network.domain)?;
        match self.networks.get(&network.id) {
            Some(old) if (old.subnet, &old.domain) != (network.subnet, &network.domain) => {
                return Err(DefinitionError::Immutable { id: id() });
            }
            Some(old) if *old == network => return Ok(false),
            _ => {}
        }
        self.networks.insert(network.id.clone(), network);
        Ok(true)
    }

    /// Removes a network.
    ///
    /// # Errors
    ///
    /// Something is attached to it.
    pub fn remove_network(&mut self, id: &str) -> Result<Option<NetworkDef>> {
        match self.attachments.values().find(|attachment| attachment.network == id) {
            Some(user) => {
                Err(DefinitionError::InUse { what: "network", id: id.into(), user: user.tap.clone() })
            }
            None => Ok(self.networks.remove(id)),
        }
    }

    /// Replaces all groups.
    ///
    /// # Errors
    ///
    /// One is malformed, names one that is not there, or one that is left out is in use.
    pub fn set_groups(&mut self, groups: impl IntoIterator<Item = GroupDef>) -> Result<()> {
        let groups: BTreeMap<_, _> = groups.into_iter().map(|group| (group.id.clone(), group)).collect();
        for group in groups.values() {
            check_id("group", &group.id)?;
            for rule in group.ingress.iter().chain(&group.egress) {
                check_rule(&group.id, rule, &groups)?;
            }
        }
        for attachment in self.attachments.values() {
            if let Some(id) = attachment.groups.iter().find(|id| !groups.contains_key(*id)) {
                let (id, user) = (id.clone(), attachment.tap.clone());
                return Err(DefinitionError::InUse { what: "group", id, user });
            }
        }
        self.groups = groups;
        Ok(())
    }

    /// Adds an attachment, or replaces the one of the same tap, which is returned.
    ///
    /// # Errors
    ///
    /// It is malformed, or does not fit the networks, groups and other attachments there are.
    pub fn attach(&mut self, attachment: Attachment, prefix: &str) -> Result<Option<Attachment>> {
        let tap = || attachment.tap.clone();
        check_tap(&attachment.tap, prefix)?;
        let missing = |what, id: &str| DefinitionError::Missing { what, id: id.to_owned() };
        let network = self.networks.get(&attachment.network);
        let network = network.ok_or_else(|| missing("network", &attachment.network))?;
        addresses::check(network.subnet, attachment.address)
            .map_err(|source| DefinitionError::Address { tap: tap(), source })?;
        let others = self.attachments.values().filter(|other| other.tap != attachment.tap);
        if others.into_iter().any(|other| other.address == attachment.address) {
            let source = AddressError::Taken { address: attachment.address };
            return Err(DefinitionError::Address { tap: tap(), source });
        }
        if attachment.mac.is_multicast() {
            return Err(DefinitionError::Multicast { tap: tap(), mac: attachment.mac });
        }
        let count = attachment.groups.len();
        if count > MAX_GROUPS {
            return Err(DefinitionError::Groups { tap: tap(), count });
        }
        if attachment.groups.iter().collect::<BTreeSet<_>>().len() != count {
            return Err(DefinitionError::Twice { what: "a group of", id: tap() });
        }
        if let Some(id) = attachment.groups.iter().find(|id| !self.groups.contains_key(*id)) {
            return Err(missing("group", id));
        }
        attachment.names.iter().try_for_each(|name| check_label("host name", name))?;
        Ok(self.attachments.insert(attachment.tap.clone(), attachment))
    }

    /// Has these ports and no others lead to `address`. Says which are gone, and which are new.
    ///
    /// # Errors
    ///
    /// A port leads elsewhere already, or the address is no guest's. Nothing has changed then.
    pub fn publish(
        &mut self,
        address: Ipv4Addr,
        ports: &[Published],
    ) -> Result<(Vec<Published>, Vec<Published>)> {
        let before = self.published.clone();
        self.published.retain(|published| published.address != address);
        if let Err(error) = ports.iter().try_for_each(|port| self.add_published(*port)) {
            self.published = before;
            return Err(error);
        }
        let gone = before.difference(&self.published).copied().collect();
        Ok((gone, self.published.difference(&before).copied().collect()))
    }

    /// Adds a published port.
    ///
    /// # Errors
    ///
    /// The port leads elsewhere already, or the address is no guest's.
    fn add_published(&mut self, published: Published) -> Result<()> {
        if self.published.contains(&published) {
            return Ok(());
        }
        let Published { protocol, host_address, host_port, address, .. } = published;
        if !self.networks.values().any(|network| addresses::check(network.subnet, address).is_ok()) {
            return Err(DefinitionError::Missing { what: "network with", id: address.to_string() });
        }
        let key = (protocol, host_address, host_port);
        if self.published.iter().any(|p| (p.protocol, p.host_address, p.host_port) == key) {
            return Err(DefinitionError::Published { protocol, port: host_port });
        }
        self.published.insert(published);
        Ok(())
    }
}

/// Checks that `prefix` can begin the names of links, tables and what else is ours on the host.
///
/// # Errors
///
/// It is not one to four lower-case letters and digits, the first a letter.
pub fn check_prefix(prefix: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let letter = prefix.bytes().next().is_some_and(|first| first.is_ascii_lowercase());
    if letter && prefix.len() <= 4 && prefix.bytes().all(plain) {
        return Ok(());
    }
    let problem = "must be one to four lower-case letters and digits, the first a letter";
    Err(DefinitionError::Name { what: "prefix", name: prefix.to_owned(), problem })
}

fn check_tap(name: &str, prefix: &str) -> Result<()> {
    let own = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-')).unwrap_or_default();
    let plain = own.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !own.is_empty() && plain && name.len() <= MAX_LINK_NAME {
        return Ok(());
    }
    let problem = "must be the prefix, '-' and lower-case letters and digits, 15 in all";
    Err(DefinitionError::Name { what: "tap", name: name.to_owned(), problem })
}

fn check_id(what: &'static str, id: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    let letter = id.bytes().next().is_some_and(|first| first.is_ascii_alphabetic());
    if letter && id.len() <= 64 && id.bytes().all(plain) {
        return Ok(());
    }
    let problem = "must be 1 to 64 letters, digits and hyphens, the first a letter";
    Err(DefinitionError::Name { what, name: id.to_owned(), problem })
}

/// Whether `label` can be one of a DNS name (RFC 1123, section 2.1), of at most `longest` bytes; in lower case,
/// so that there is one way to write it.
pub fn is_label(label: &str, longest: usize) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edges = !label.starts_with('-') && !label.ends_with('-');
    (1..=longest).contains(&label.len()) && edges && label.bytes().all(plain)
}

fn check_label(what: &'static str, label: &str) -> Result<()> {
    if is_label(label, 63) {
        return Ok(());
    }
    let problem = "must be 1 to 63 lower-case letters, digits and inner hyphens";
    Err(DefinitionError::Name { what, name: label.to_owned(), problem })
}

fn check_domain(domain: &str) -> Result<()> {
    if domain.len() > 180 {
        let problem = "must be at most 180 characters, so that there is room for names in it";
        return Err(DefinitionError::Name { what: "domain", name: domain.to_owned(), problem });
    }
    domain.split('.').try_for_each(|label| check_label("domain", label))
}

fn check_rule(id: &str, rule: &Rule, groups: &BTreeMap<String, GroupDef>) -> Result<()> {
    if let Traffic::Tcp(Ports { from, to }) | Traffic::Udp(Ports { from, to }) = rule.traffic
        && from > to
    {
        return Err(DefinitionError::Ports { id: id.to_owned(), from, to });
    }
    for peer in &rule.peers {
        if let Peer::Group(peer) = peer
            && !groups.contains_key(peer)
        {
            return Err(DefinitionError::Missing { what: "group", id: peer.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
