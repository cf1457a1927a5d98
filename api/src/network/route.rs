//! Links, addresses, routes and neighbours of the host, by rtnetlink(7): the few requests that are needed.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use nix::sys::socket::SockProtocol;
use pulau_vmm::config::MacAddr;
use serde::Serialize;

use super::netlink::{self, ACK, CREATE, EXCLUSIVE, Message, REPLACE, Socket, attribute, u32_at, u64_at};

/// `rtm_protocol` of the routes that are Pulau's: who made them. Free in `/etc/iproute2/rt_protos`.
pub const PROTOCOL: u8 = 112;

const INET: u8 = libc::AF_INET as u8;
const UP: u32 = libc::IFF_UP as u32;
// Of linux/if_link.h and linux/if_tun.h, which the `libc` crate lacks.
const IFLA_TUN_OWNER: u16 = 1;
const IFLA_EXT_MASK: u16 = 29;
/// `RTEXT_FILTER_SKIP_STATS`: counters make up most of a link's message.
const SKIP_STATISTICS: u32 = 1 << 3;

/// A link of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub mac: Option<MacAddr>,
    pub mtu: u32,
    /// User that a tap belongs to. None for what is no tap.
    pub tap_owner: Option<u32>,
}

/// What has gone through a link, by its own account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// To the guest.
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_dropped: u64,
    /// From the guest.
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_dropped: u64,
}

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub to: Ipv4Net,
    /// Where it leads. None: packets are refused.
    pub link: Option<u32>,
    /// Address that the host itself sends from.
    pub source: Option<Ipv4Addr>,
    pub metric: u32,
    pub protocol: u8,
    /// Whether it leads to a router rather than to who is meant.
    pub by_router: bool,
    unreachable: bool,
}

impl Route {
    /// To a guest, through its tap.
    pub fn to_guest(address: Ipv4Addr, link: u32, source: Ipv4Addr) -> Self {
        let (link, source) = (Some(link), Some(source));
        let (protocol, by_router) = (PROTOCOL, false);
        Self { to: address.into(), link, source, metric: 0, protocol, by_router, unreachable: false }
    }

    /// To nobody: for what no better route is there.
    pub fn unreachable(to: Ipv4Net, metric: u32) -> Self {
        let (protocol, by_router) = (PROTOCOL, false);
        Self { to, link: None, source: None, metric, protocol, by_router, unreachable: true }
    }

    /// Whether it refuses packets.
    pub fn is_unreachable(&self) -> bool {
        self.unreachable
    }
}

/// A connection to the kernel's tables.
#[derive(Debug)]
pub struct Routing(Socket);

impl Routing {
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn open() -> io::Result<Self> {
        Ok(Self(Socket::open(SockProtocol::NetlinkRoute)?))
    }

    /// All links.
    ///
    /// # Errors
    ///
    /// The kernel's, as in all that follow.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let message = Message::new(libc::RTM_GETLINK, 0, &link_info(0, 0, 0))
            .attribute(IFLA_EXT_MASK, &SKIP_STATISTICS.to_ne_bytes());
        self.0.dump(&message, |kind, body| (kind == libc::RTM_NEWLINK).then(|| parse_link(body))?)
    }

    /// The link of this name.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let message = Message::new(libc::RTM_GETLINK, 0, &link_info(0, 0, 0))
            .text(libc::IFLA_IFNAME, name)
            .attribute(IFLA_EXT_MASK, &SKIP_STATISTICS.to_ne_bytes());
        let mut found = None;
        let each = |kind, body: &[u8]| {
            if kind == libc::RTM_NEWLINK {
                found = parse_link(body);
            }
        };
        match self.0.get(message, each) {
            Ok(()) => Ok(found),
            Err(e) if netlink::errno(&e) == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Counters of the links whose names begin with `prefix`, by name.
    pub fn counters(&mut self, prefix: &str) -> io::Result<BTreeMap<String, Counters>> {
        let message = Message::new(libc::RTM_GETLINK, 0, &link_info(0, 0, 0));
        let found = self.0.dump(&message, |kind, body| {
            let attributes = body.get(16..).filter(|_| kind == libc::RTM_NEWLINK)?;
            let name = netlink::text(attribute(attributes, libc::IFLA_IFNAME)?);
            let counters = parse_counters(attribute(attributes, libc::IFLA_STATS64)?)?;
            name.starts_with(prefix).then(|| (name.to_owned(), counters))
        })?;
        Ok(found.into_iter().collect())
    }

    /// Turns a link on, with this hardware address and largest packet.
    pub fn set_up(&mut self, index: u32, mac: MacAddr, mtu: u16) -> io::Result<()> {
        let message = Message::new(libc::RTM_NEWLINK, 0, &link_info(index, UP, UP))
            .attribute(libc::IFLA_ADDRESS, &mac.0)
            .attribute(libc::IFLA_MTU, &u32::from(mtu).to_ne_bytes());
        self.0.request(message)
    }

    /// Deletes a link and all that leads through it. It may be gone already.
    pub fn delete_link(&mut self, name: &str) -> io::Result<()> {
        let message = Message::new(libc::RTM_DELLINK, 0, &link_info(0, 0, 0)).text(libc::IFLA_IFNAME, name);
        unless_gone(self.0.request(message))
    }

    /// The IPv4 addresses of a link.
    pub fn addresses(&mut self, index: u32) -> io::Result<Vec<Ipv4Net>> {
        let found = self.all_addresses()?.into_iter();
        Ok(found.filter(|(link, _)| *link == index).map(|(_, address)| address).collect())
    }

    /// The IPv4 addresses of all links, with the links' indices.
    pub fn all_addresses(&mut self) -> io::Result<Vec<(u32, Ipv4Net)>> {
        let message = Message::new(libc::RTM_GETADDR, 0, &[INET, 0, 0, 0, 0, 0, 0, 0]);
        self.0.dump(&message, |kind, body| {
            let attributes = body.get(8..).filter(|_| kind == libc::RTM_NEWADDR)?;
            let address = address(attribute(attributes, libc::IFA_LOCAL)?)?;
            Some((u32_at(body, 4)?, Ipv4Net::new(address, *body.get(1)?).ok()?))
        })
    }

    /// Gives a link an address that no route comes with. It may be there already.
    pub fn add_address(&mut self, index: u32, address: Ipv4Addr) -> io::Result<()> {
        self.0.request(address_message(libc::RTM_NEWADDR, CREATE | REPLACE, index, address))
    }

    /// Takes an address away. It may be gone already.
    pub fn delete_address(&mut self, index: u32, address: Ipv4Addr) -> io::Result<()> {
        unless_gone(self.0.request(address_message(libc::RTM_DELADDR, 0, index, address)))
    }

    /// The IPv4 routes of the main table.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let message = Message::new(libc::RTM_GETROUTE, 0, &[INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.0.dump(&message, |kind, body| (kind == libc::RTM_NEWROUTE).then(|| parse_route(body))?)
    }

    /// Adds a route, or puts it in the place of another to the same addresses with the same metric.
    pub fn set_route(&mut self, route: &Route) -> io::Result<()> {
        self.0.request(route_message(libc::RTM_NEWROUTE, CREATE | REPLACE, route))
    }

    /// Removes a route. It may be gone already.
    pub fn delete_route(&mut self, route: &Route) -> io::Result<()> {
        unless_gone(self.0.request(route_message(libc::RTM_DELROUTE, 0, route)))
    }

    /// Tells the host for good which hardware address is behind a link, so that it never asks and cannot be
    /// told otherwise.
    pub fn set_neighbour(&mut self, index: u32, address: Ipv4Addr, mac: MacAddr) -> io::Result<()> {
        // struct ndmsg: family, padding, link, state, flags, type.
        let mut fixed = vec![INET, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        fixed.extend_from_slice(&[0, 0]);
        let message = Message::new(libc::RTM_NEWNEIGH, CREATE | REPLACE, &fixed)
            .attribute(libc::NDA_DST, &address.octets())
            .attribute(libc::NDA_LLADDR, &mac.0);
        self.0.request(message)
    }

    /// The permanent IPv4 neighbours of a link.
    pub fn neighbours(&mut self, index: u32) -> io::Result<Vec<Ipv4Addr>> {
        let message = Message::new(libc::RTM_GETNEIGH, 0, &[INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.0.dump(&message, |kind, body| {
            let permanent = netlink::u16_at(body, 8)? & libc::NUD_PERMANENT != 0;
            let ours = kind == libc::RTM_NEWNEIGH && permanent && u32_at(body, 4)? == index;
            ours.then(|| address(attribute(body.get(12..)?, libc::NDA_DST)?))?
        })
    }

    /// Forgets a neighbour. It may be gone already.
    pub fn delete_neighbour(&mut self, index: u32, address: Ipv4Addr) -> io::Result<()> {
        let mut fixed = vec![INET, 0, 0, 0];
        fixed.extend_from_slice(&index.to_ne_bytes());
        fixed.extend_from_slice(&[0; 4]);
        let message =
            Message::new(libc::RTM_DELNEIGH, ACK, &fixed).attribute(libc::NDA_DST, &address.octets());
        unless_gone(self.0.request(message))
    }
}

/// Deleting what is not there is done.
fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    const GONE: [i32; 4] = [libc::ENODEV, libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL];
    match result {
        Err(e) if netlink::errno(&e).is_some_and(|errno| GONE.contains(&errno)) => Ok(()),
        other => other,
    }
}

/// `struct ifinfomsg`: family and padding, type, index, flags, and which of them are meant.
fn link_info(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..16].copy_from_slice(&change.to_ne_bytes());
    bytes
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let attributes = body.get(16..)?;
    let tap_owner = attribute(attributes, libc::IFLA_LINKINFO).and_then(|info| {
        let kind = netlink::text(attribute(info, libc::IFLA_INFO_KIND)?);
        let data = attribute(info, libc::IFLA_INFO_DATA)?;
        // Without an owner there is no such attribute; then it is nobody's.
        let owner = attribute(data, IFLA_TUN_OWNER).and_then(|owner| u32_at(owner, 0));
        (kind == "tun").then(|| owner.unwrap_or(u32::MAX))
    });
    Some(Link {
        index: u32_at(body, 4)?,
        name: netlink::text(attribute(attributes, libc::IFLA_IFNAME)?).to_owned(),
        up: u32_at(body, 8)? & UP != 0,
        mac: attribute(attributes, libc::IFLA_ADDRESS).and_then(|mac| mac.try_into().ok()).map(MacAddr),
        mtu: u32_at(attribute(attributes, libc::IFLA_MTU)?, 0)?,
        tap_owner,
    })
}

/// `struct rtnl_link_stats64`. A link's receiving side is the guest's sending one.
fn parse_counters(statistics: &[u8]) -> Option<Counters> {
    let at = |index: usize| u64_at(statistics, index * 8);
    Some(Counters {
        tx_packets: at(0)?,
        rx_packets: at(1)?,
        tx_bytes: at(2)?,
        rx_bytes: at(3)?,
        tx_dropped: at(6)?,
        rx_dropped: at(7)?,
    })
}

fn address(value: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(value).ok().map(Ipv4Addr::from)
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, link.
fn address_message(kind: u16, flags: u16, index: u32, address: Ipv4Addr) -> Message {
    let mut fixed = vec![INET, 32, 0, 0];
    fixed.extend_from_slice(&index.to_ne_bytes());
    Message::new(kind, flags, &fixed)
        .attribute(libc::IFA_LOCAL, &address.octets())
        .attribute(libc::IFA_ADDRESS, &address.octets())
}

/// `struct rtmsg`: family, lengths of destination and source, TOS, table, protocol, scope, type, flags.
fn route_message(kind: u16, flags: u16, route: &Route) -> Message {
    let (scope, what) = match route.unreachable {
        true => (libc::RT_SCOPE_UNIVERSE, libc::RTN_UNREACHABLE),
        false => (libc::RT_SCOPE_LINK, libc::RTN_UNICAST),
    };
    let table = libc::RT_TABLE_MAIN;
    let fixed = [INET, route.to.prefix_len(), 0, 0, table, route.protocol, scope, what, 0, 0, 0, 0];
    let mut message =
        Message::new(kind, flags & !EXCLUSIVE, &fixed).attribute(libc::RTA_DST, &route.to.addr().octets());
    if let Some(link) = route.link {
        message = message.attribute(libc::RTA_OIF, &link.to_ne_bytes());
    }
    if let Some(source) = route.source {
        message = message.attribute(libc::RTA_PREFSRC, &source.octets());
    }
    if route.metric != 0 {
        message = message.attribute(libc::RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    message
}

fn attributes_of_a_router(attributes: &[u8]) -> bool {
    let router = |kind| attribute(attributes, kind).is_some();
    // Several next hops are those of routers as well, or the link is in one of them.
    router(libc::RTA_GATEWAY) || router(libc::RTA_VIA) || router(libc::RTA_MULTIPATH)
}

fn parse_route(body: &[u8]) -> Option<Route> {
    let attributes = body.get(12..)?;
    let number = |kind| attribute(attributes, kind).and_then(|value| u32_at(value, 0));
    if number(libc::RTA_TABLE).unwrap_or(u32::from(*body.get(4)?)) != u32::from(libc::RT_TABLE_MAIN) {
        return None;
    }
    let to = match attribute(attributes, libc::RTA_DST) {
        Some(to) => address(to)?,
        None => Ipv4Addr::UNSPECIFIED,
    };
    Some(Route {
        to: Ipv4Net::new(to, *body.get(1)?).ok()?,
        link: number(libc::RTA_OIF),
        source: attribute(attributes, libc::RTA_PREFSRC).and_then(address),
        metric: number(libc::RTA_PRIORITY).unwrap_or_default(),
        protocol: *body.get(5)?,
        by_router: attributes_of_a_router(attributes),
        unreachable: *body.get(7)? == libc::RTN_UNREACHABLE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_read_as_they_were_written() {
        let guest = Route::to_guest(Ipv4Addr::new(10, 0, 0, 4), 7, Ipv4Addr::new(10, 0, 0, 1));
        let none = Route::unreachable("10.0.0.0/24".parse().unwrap(), 0x4000_0001);
        for route in [guest, none] {
            let bytes = route_message(libc::RTM_NEWROUTE, CREATE, &route).finish(1);
            assert_eq!(parse_route(&bytes[16..]), Some(route));
        }
        let default = [INET, 0, 0, 0, libc::RT_TABLE_MAIN, 3, 0, 1, 0, 0, 0, 0];
        assert_eq!(parse_route(&default).unwrap().to, Ipv4Net::default());
        let other_table = [INET, 0, 0, 0, libc::RT_TABLE_LOCAL, 3, 0, 1, 0, 0, 0, 0];
        assert_eq!(parse_route(&other_table), None);
        assert_eq!(parse_route(&default[..11]), None);
    }

    #[test]
    fn links_are_read_whatever_else_is_said_of_them() {
        let message = Message::new(libc::RTM_NEWLINK, 0, &link_info(5, UP, 0))
            .attribute(0x1234, &[1, 2, 3])
            .text(libc::IFLA_IFNAME, "pl-1")
            .attribute(libc::IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1])
            .attribute(libc::IFLA_MTU, &1500_u32.to_ne_bytes())
            .nested(libc::IFLA_LINKINFO, |info| {
                info.text(libc::IFLA_INFO_KIND, "tun");
                info.nested(libc::IFLA_INFO_DATA, |data| {
                    data.attribute(IFLA_TUN_OWNER, &7_u32.to_ne_bytes());
                });
            });
        let bytes = message.finish(1);
        let link = parse_link(&bytes[16..]).unwrap();
        assert_eq!((link.index, link.name.as_str(), link.up, link.mtu), (5, "pl-1", true, 1500));
        assert_eq!((link.mac, link.tap_owner), (Some(MacAddr([2, 0, 0, 0, 0, 1])), Some(7)));
        assert_eq!(parse_link(&bytes[16..30]), None);
    }

    #[test]
    fn counters_are_the_guests() {
        let statistics: Vec<u8> = (1..=24_u64).flat_map(u64::to_ne_bytes).collect();
        let expected =
            Counters { rx_packets: 2, tx_packets: 1, rx_bytes: 4, tx_bytes: 3, rx_dropped: 8, tx_dropped: 7 };
        assert_eq!(parse_counters(&statistics), Some(expected));
        assert_eq!(parse_counters(&statistics[..40]), None);
    }
}
