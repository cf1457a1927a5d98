//! Makes the host what the plan says, step by step. All of it blocks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::Ipv4Net;
use pulau_vmm::config::MacAddr;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::conntrack::Forgetting;
use super::definition::{
    Attachment, Checked, DefinitionError, GroupDef, NetworkDef, Plan, Published, check_prefix,
};
use super::directory::Directory;
use super::dns::{self, Resolvers};
use super::nft::{self, Element, Nft, NftError};
use super::route::{Counters, Link, PROTOCOL, Route, Routing};
use super::{dhcp, sysctl, tap};
use crate::fault;

/// The host's hardware address on every link, so that what guests remember of their gateway stays true when a
/// tap is made anew, and in another guest that is made from a snapshot.
const HOST_MAC: MacAddr = MacAddr([0x0a, b'p', b'u', b'l', b'a', b'u']);
/// Largest packet of the link with the gateways' addresses, through which none ever go.
const GATEWAY_MTU: u16 = 1500;
/// The user that taps belong to which nobody is to attach to.
const ROOT: u32 = 0;

/// What is different between daemons.
#[derive(Clone, Debug)]
pub struct Config {
    /// One to four lower-case letters and digits that begin the names of all links and are the tables' name.
    /// Daemons on one host need different ones, and different subnets.
    pub prefix: String,
    /// Where the host's name servers are written.
    pub resolv_conf: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self { prefix: "pl".to_owned(), resolv_conf: "/etc/resolv.conf".into() }
    }
}

/// The network cannot be what it is to be.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    #[error(transparent)]
    Nft(#[from] NftError),
    #[error("cannot {what} {name}: {source}")]
    Host { what: &'static str, name: String, source: io::Error },
    #[error("{subnet} is in use on this host: it has a route to {route}")]
    HostRoute { subnet: Ipv4Net, route: Ipv4Net },
    #[error(
        "this host does not answer ARP for its own addresses on other links, as guests need it to: \
         `sysctl net.ipv4.conf.all.arp_ignore=0`"
    )]
    ArpIgnore,
    #[error("cannot answer {what}: {source}; does another server of this host listen on all addresses?")]
    Listen { what: String, source: io::Error },
    #[error("the daemon is ending")]
    Ending,
}

type Result<T, E = NetworkError> = std::result::Result<T, E>;

fn failed(what: &'static str, name: impl ToString) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Host { what, name: name.to_string(), source }
}

/// The host, and what it was last told to be.
#[derive(Debug)]
pub struct Host {
    config: Config,
    plan: Checked,
    routing: Routing,
    nft: Nft,
    connections: Arc<Forgetting>,
    /// The rule set is perhaps not what the plan says.
    stale_rules: bool,
    /// All was removed, to stay so.
    cleared: bool,
    directory: Directory,
    resolvers: Resolvers,
    runtime: Handle,
    dhcp: JoinHandle<io::Result<()>>,
    dns: HashMap<String, JoinHandle<io::Result<()>>>,
}

impl Host {
    /// Checks and prepares the host. Servers run on `runtime`.
    pub fn start(config: Config, runtime: Handle) -> Result<Self> {
        check_prefix(&config.prefix)?;
        if sysctl::get("ipv4/conf/all/arp_ignore").is_ok_and(|value| value != "0") {
            return Err(NetworkError::ArpIgnore);
        }
        sysctl::set("ipv4/ip_forward", "1").map_err(failed("turn on", "forwarding"))?;
        let routing = Routing::open().map_err(failed("speak", "rtnetlink"))?;
        let connections = Arc::new(Forgetting::new().map_err(failed("speak", "conntrack"))?);
        let nft = Nft::open(&config.prefix)?;
        let directory = Directory::default();
        let socket =
            dhcp::bind_socket().map_err(|source| NetworkError::Listen { what: "DHCP".into(), source })?;
        let dhcp = runtime.spawn(dhcp::serve(socket, directory.clone()));
        Ok(Self {
            resolvers: Resolvers::new(config.resolv_conf.clone()),
            config,
            plan: Checked::default(),
            routing,
            nft,
            connections,
            stale_rules: true,
            cleared: false,
            directory,
            runtime,
            dhcp,
            dns: HashMap::new(),
        })
    }

    /// Addresses of guests that are gone, whose connections are forgotten when somebody gets to it.
    pub fn connections(&self) -> Arc<Forgetting> {
        self.connections.clone()
    }

    /// See [`super::Fabric::reconcile`].
    pub fn reconcile(&mut self, plan: &Plan) -> Result<()> {
        self.plan = Checked::new(plan, &self.config.prefix)?;
        self.stale_rules = true;
        let prefix = self.link_prefix();
        let links = self.routing.links().map_err(failed("list", "links"))?;
        let routes = self.routing.routes().map_err(failed("list", "routes"))?;
        for link in links.iter().filter(|link| link.name.starts_with(&prefix)) {
            if !self.plan.attachments.contains_key(&link.name) {
                self.delete_link(&link.name)?;
            }
        }
        // Rules before links, so that no packet passes without.
        self.write_rules()?;
        let networks: Vec<_> = self.plan.networks.values().cloned().collect();
        self.set_gateways(&networks)?;
        self.set_subnets(&networks)?;
        self.directory.clear();
        let gone: Vec<_> =
            self.dns.keys().filter(|id| !self.plan.networks.contains_key(*id)).cloned().collect();
        gone.iter().for_each(|id| self.stop_dns(id));
        for network in &networks {
            self.directory.set_network(network);
            self.start_dns(network)?;
        }
        let attachments: Vec<_> = self.plan.attachments.values().cloned().collect();
        for attachment in &attachments {
            let index = self.set_link(attachment)?;
            self.remove_other_places(index, attachment)?;
            self.directory.attach(index, attachment);
        }
        // Who was not there before inherits nothing from who had the address.
        let was_there = |attachment: &&Attachment| {
            let link = links.iter().find(|link| link.name == attachment.tap);
            let leads = |link: &Link, route: &Route| {
                route.link == Some(link.index) && route.to == attachment.address.into()
            };
            link.is_some_and(|link| routes.iter().any(|route| leads(link, route)))
        };
        let taken: BTreeSet<_> =
            attachments.iter().filter(was_there).map(|attachment| attachment.address).collect();
        self.connections
            .all_where(|address| {
                let ours =
                    |network: &NetworkDef| network.subnet.contains(&address) && network.gateway() != address;
                !taken.contains(&address) && networks.iter().any(ours)
            })
            .map_err(failed("forget", "connections"))
    }

    pub fn set_network(&mut self, network: NetworkDef) -> Result<()> {
        let old = self.plan.networks.get(&network.id).cloned();
        if !self.plan.set_network(network.clone())? {
            return Ok(());
        }
        let result = match old {
            None => self.add_network(&network),
            Some(_) => self.change_network(&network),
        };
        if result.is_err() {
            // What is left of the attempt does no harm, and goes when it is tried again.
            match old {
                None => _ = self.remove_network(&network.id),
                Some(old) => {
                    self.plan.networks.insert(old.id.clone(), old.clone());
                    let _ = self.change_network(&old);
                }
            }
        }
        result
    }

    fn add_network(&mut self, network: &NetworkDef) -> Result<()> {
        self.check_free(network.subnet)?;
        self.write_rules()?;
        let networks: Vec<_> = self.plan.networks.values().cloned().collect();
        self.set_gateways(&networks)?;
        self.set_subnets(&networks)?;
        self.directory.set_network(network);
        self.start_dns(network)
    }

    fn change_network(&mut self, network: &NetworkDef) -> Result<()> {
        self.write_rules()?;
        self.directory.set_network(network);
        let inside = self.plan.attachments.values().filter(|a| a.network == network.id);
        for attachment in inside.cloned().collect::<Vec<_>>() {
            self.set_link(&attachment)?;
        }
        Ok(())
    }

    pub fn remove_network(&mut self, id: &str) -> Result<()> {
        let removed = self.plan.remove_network(id)?;
        if removed.is_none() && !self.stale_rules {
            return Ok(());
        }
        // If it fails half-way, it is all to be done again.
        self.stale_rules = true;
        self.stop_dns(id);
        self.directory.remove_network(id);
        let networks: Vec<_> = self.plan.networks.values().cloned().collect();
        self.set_subnets(&networks)?;
        fault::point("network.subnet-removed");
        self.set_gateways(&networks)?;
        self.write_rules()
    }

    pub fn set_groups(&mut self, groups: Vec<GroupDef>) -> Result<()> {
        let old = self.plan.groups.clone();
        self.plan.set_groups(groups)?;
        if self.plan.groups == old && !self.stale_rules {
            return Ok(());
        }
        let result = self.write_rules();
        if result.is_err() {
            self.plan.groups = old;
        }
        result
    }

    pub fn attach(&mut self, attachment: Attachment) -> Result<()> {
        let old = self.plan.attach(attachment.clone(), &self.config.prefix)?;
        let result = self.place(&attachment, old.as_ref());
        if result.is_err() {
            match old {
                None => _ = self.detach(&attachment.tap),
                Some(old) => {
                    self.plan.attachments.insert(old.tap.clone(), old.clone());
                    let _ = self.place(&old, Some(&attachment));
                }
            }
        }
        result
    }

    /// Makes a tap what `attachment` says. It was what `old` says.
    fn place(&mut self, attachment: &Attachment, old: Option<&Attachment>) -> Result<()> {
        let address = attachment.address;
        self.connections.now(address).map_err(failed("forget connections of", address))?;
        let out = old.map(|old| self.elements_of(old)).unwrap_or_default();
        self.change_rules(&out, &self.elements_of(attachment))?;
        fault::point("network.rules");
        let index = self.set_link(attachment)?;
        fault::point("network.link");
        if let Some(old) = old {
            self.remove_other_places(index, attachment)?;
            self.directory.detach(old);
            if old.address != attachment.address {
                self.connections.later(old.address);
            }
        }
        self.directory.attach(index, attachment);
        Ok(())
    }

    pub fn detach(&mut self, tap: &str) -> Result<()> {
        let known = self.plan.attachments.remove(tap);
        let mut out = known.as_ref().map(|known| self.elements_of(known)).unwrap_or_default();
        if let Some(known) = &known {
            self.directory.detach(known);
        }
        // The link first: without it no packet comes, and its routes go with it. A name that is not of ours
        // has nothing to do with us.
        let link = match tap.starts_with(&self.link_prefix()) {
            true => self.delete_link(tap),
            false => Ok(()),
        };
        fault::point("network.unlinked");
        if let Some(known) = &known {
            let (gone, _) = self.plan.publish(known.address, &[])?;
            out.extend(gone.iter().map(nft::of_published));
        }
        let rules = self.change_rules(&out, &BTreeSet::new());
        if let Some(known) = known {
            self.connections.later(known.address);
        }
        link.and(rules)
    }

    pub fn publish(&mut self, address: Ipv4Addr, ports: &[Published]) -> Result<()> {
        let before = self.plan.published.clone();
        let (gone, new) = self.plan.publish(address, ports)?;
        if gone.is_empty() && new.is_empty() && !self.stale_rules {
            return Ok(());
        }
        let elements = |ports: Vec<Published>| ports.iter().map(nft::of_published).collect();
        let result = self.change_rules(&elements(gone), &elements(new));
        if result.is_err() {
            self.plan.published = before;
        }
        result
    }

    pub fn counters(&mut self) -> Result<BTreeMap<String, Counters>> {
        let prefix = self.link_prefix();
        self.routing.counters(&prefix).map_err(failed("read", "counters"))
    }

    /// Puts the rule set back if it is gone.
    pub fn mend(&mut self) -> Result<()> {
        if self.cleared || !self.stale_rules && self.nft.is_there()? {
            return Ok(());
        }
        self.write_rules()
    }

    pub fn clear(&mut self) -> Result<()> {
        self.reconcile(&Plan::default())?;
        self.delete_link(&self.gateway_link())?;
        self.cleared = true;
        Ok(self.nft.delete()?)
    }

    /// The elements of an attachment whose network is in the plan.
    fn elements_of(&self, attachment: &Attachment) -> BTreeSet<Element> {
        let network = self.plan.networks.get(&attachment.network);
        network.map(|network| nft::of_attachment(attachment, network)).unwrap_or_default()
    }

    /// Changes elements; if that does not go because the rule set is not what it should be, writes it anew.
    fn change_rules(&mut self, out: &BTreeSet<Element>, into: &BTreeSet<Element>) -> Result<()> {
        if !self.stale_rules && self.nft.change(out, into).is_ok() {
            return Ok(());
        }
        self.write_rules()
    }

    fn write_rules(&mut self) -> Result<()> {
        self.stale_rules = true;
        self.nft.run(&nft::whole(&self.config.prefix, &self.plan))?;
        self.stale_rules = false;
        Ok(())
    }

    /// Beginning of the names of guests' links.
    fn link_prefix(&self) -> String {
        format!("{}-", self.config.prefix)
    }

    /// The link with the gateways' addresses.
    fn gateway_link(&self) -> String {
        format!("{}gw", self.config.prefix)
    }

    fn delete_link(&mut self, name: &str) -> Result<()> {
        self.routing.delete_link(name).map_err(failed("delete link", name))
    }

    /// A tap of this owner. It may be there already.
    fn ensure_tap(&mut self, name: &str, owner: u32) -> Result<Link> {
        let found = self.routing.link(name).map_err(failed("look up link", name))?;
        match found {
            Some(link) if link.tap_owner == Some(owner) => return Ok(link),
            Some(_) => self.delete_link(name)?,
            None => {}
        }
        tap::create(name, owner).map_err(failed("make tap", name))?;
        fault::point("network.tap");
        let made = self.routing.link(name).map_err(failed("look up link", name))?;
        made.ok_or_else(|| failed("find tap", name)(io::ErrorKind::NotFound.into()))
    }

    fn ensure_up(&mut self, link: &Link, mtu: u16) -> Result<()> {
        if link.up && link.mac == Some(HOST_MAC) && link.mtu == u32::from(mtu) {
            return Ok(());
        }
        self.routing.set_up(link.index, HOST_MAC, mtu).map_err(failed("turn on link", &link.name))
    }

    /// The guest's tap, with the way to the guest. Returns its index.
    fn set_link(&mut self, attachment: &Attachment) -> Result<u32> {
        let Attachment { tap, address, mac, network, .. } = attachment;
        let network = self.plan.networks.get(network);
        let network = network
            .ok_or_else(|| DefinitionError::Missing { what: "network", id: attachment.network.clone() })?;
        let (gateway, mtu) = (network.gateway(), network.mtu);
        let link = self.ensure_tap(tap, attachment.owner)?;
        sysctl::set_link(tap).map_err(failed("set up link", tap))?;
        self.ensure_up(&link, mtu)?;
        let route = Route::to_guest(*address, link.index, gateway);
        fault::point("network.tap-up");
        self.routing.set_neighbour(link.index, *address, *mac).map_err(failed("set neighbour", address))?;
        self.routing.set_route(&route).map_err(failed("route", address))?;
        Ok(link.index)
    }

    /// Removes what an earlier attachment left on a link that is still there.
    fn remove_other_places(&mut self, index: u32, attachment: &Attachment) -> Result<()> {
        let other = |address: &Ipv4Addr| *address != attachment.address;
        let routes = self.routing.routes().map_err(failed("list", "routes"))?;
        for route in routes.iter().filter(|route| route.link == Some(index) && other(&route.to.addr())) {
            self.routing.delete_route(route).map_err(failed("remove route", route.to))?;
        }
        let neighbours = self.routing.neighbours(index).map_err(failed("list", "neighbours"))?;
        for address in neighbours.into_iter().filter(other) {
            self.routing.delete_neighbour(index, address).map_err(failed("forget neighbour", address))?;
        }
        Ok(())
    }

    /// Gives the host the addresses of these networks' gateways, and no others.
    fn set_gateways(&mut self, networks: &[NetworkDef]) -> Result<()> {
        let name = self.gateway_link();
        let link = self.ensure_tap(&name, ROOT)?;
        sysctl::set_link(&name).map_err(failed("set up link", &name))?;
        self.ensure_up(&link, GATEWAY_MTU)?;
        let wanted: BTreeSet<_> = networks.iter().map(NetworkDef::gateway).collect();
        let found = self.routing.addresses(link.index).map_err(failed("list", "addresses"))?;
        let found: BTreeSet<_> = found.iter().map(Ipv4Net::addr).collect();
        for address in found.difference(&wanted) {
            let deleted = self.routing.delete_address(link.index, *address);
            deleted.map_err(failed("remove address", address))?;
        }
        for address in wanted.difference(&found) {
            self.routing.add_address(link.index, *address).map_err(failed("add address", address))?;
        }
        Ok(())
    }

    /// Has addresses of these networks that are nobody's lead nowhere, and no others.
    fn set_subnets(&mut self, networks: &[NetworkDef]) -> Result<()> {
        let metric = metric(&self.config.prefix);
        let wanted: Vec<_> = networks.iter().map(|n| Route::unreachable(n.subnet, metric)).collect();
        let found = self.routing.routes().map_err(failed("list", "routes"))?;
        let ours =
            |route: &&Route| route.is_unreachable() && route.protocol == PROTOCOL && route.metric == metric;
        for route in found.iter().filter(ours).filter(|route| wanted.iter().all(|w| w.to != route.to)) {
            self.routing.delete_route(route).map_err(failed("remove route", route.to))?;
        }
        for route in &wanted {
            self.routing.set_route(route).map_err(failed("route", route.to))?;
        }
        Ok(())
    }

    /// Refuses a subnet that the host itself is in, or knows another way to.
    fn check_free(&mut self, subnet: Ipv4Net) -> Result<()> {
        let metric = metric(&self.config.prefix);
        let links = self.routing.links().map_err(failed("list", "links"))?;
        let prefix = self.link_prefix();
        let ours: BTreeSet<_> =
            links.iter().filter(|link| link.name.starts_with(&prefix)).map(|link| link.index).collect();
        let routes = self.routing.routes().map_err(failed("list", "routes"))?;
        let taken = routes.iter().find(|route| {
            let own = route.protocol == PROTOCOL && route.metric == metric
                || route.link.is_some_and(|link| ours.contains(&link));
            // A router behind which everything is, as for the default route, may lead to more than there is.
            let covers = route.to.contains(&subnet) && !route.by_router;
            !own && route.to.prefix_len() > 0 && (covers || subnet.contains(&route.to))
        });
        match taken {
            Some(route) => Err(NetworkError::HostRoute { subnet, route: route.to }),
            None => Ok(()),
        }
    }

    fn start_dns(&mut self, network: &NetworkDef) -> Result<()> {
        if self.dns.get(&network.id).is_some_and(|server| !server.is_finished()) {
            return Ok(());
        }
        let sockets = dns::Sockets::bind(network.gateway()).map_err(|source| NetworkError::Listen {
            what: format!("DNS on {}", network.gateway()),
            source,
        })?;
        let server = dns::serve(sockets, network.id.clone(), self.directory.clone(), self.resolvers.clone());
        self.dns.insert(network.id.clone(), self.runtime.spawn(server));
        Ok(())
    }

    fn stop_dns(&mut self, network: &str) {
        if let Some(server) = self.dns.remove(network) {
            server.abort();
            // Its sockets are closed when it has ended, and not before.
            let _ = self.runtime.block_on(server);
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.dhcp.abort();
        self.dns.values().for_each(JoinHandle::abort);
    }
}

/// Tells the routes of this daemon to nowhere from those of others: a link tells the others.
fn metric(prefix: &str) -> u32 {
    const BASE: u32 = 1 << 30;
    // At most four of 36 characters.
    let digit = |sum: u32, b: u8| sum * 37 + (b as char).to_digit(36).unwrap_or_default() + 1;
    BASE + prefix.bytes().take(4).fold(0, digit)
}
