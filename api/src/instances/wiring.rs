//! The network as the services see it: told what the records say, makes the host's network so.

use std::sync::Arc;

use crate::model::{self, Instance, InstanceState, Network, SecurityGroup};
use crate::network::{
    Attachment, Fabric, GroupDef, NetworkDef, NetworkError, Peer, Plan, Ports, Published, Rule, Traffic,
    Transport,
};
use crate::records::{Records, Tables};

/// Largest packet of guests, in bytes.
const MTU: u16 = 1500;

/// A host's network, or none.
#[derive(Clone)]
pub enum Wiring {
    /// Nothing is connected: for tests and simulations.
    Unconnected,
    Host(Fabric),
}

impl Wiring {
    /// Connects an instance's tap, or changes how it is connected. Doing it again changes nothing.
    ///
    /// # Errors
    ///
    /// The host's network cannot be changed.
    pub async fn attach(&self, records: &Records, instance: &str) -> Result<(), NetworkError> {
        let Wiring::Host(fabric) = self else { return Ok(()) };
        let (groups, network, attachment, published) = {
            let tables = records.read();
            let Some(instance) = tables.instances.get(instance) else { return Ok(()) };
            let network = tables.networks.get(&instance.interface.network_id).map(|network| define(network));
            (groups(&tables), network, attachment(instance), published(instance))
        };
        // What the attachment refers to may be so new that the host has not heard of it.
        if let Some(network) = network {
            fabric.set_network(network).await?;
        }
        fabric.set_groups(groups).await?;
        let address = attachment.address;
        fabric.attach(attachment).await?;
        fabric.publish(address, published).await
    }

    /// Removes a tap and all that leads to it, published ports included. Doing it again changes nothing.
    ///
    /// # Errors
    ///
    /// The host's network cannot be changed.
    pub async fn detach(&self, tap: &str) -> Result<(), NetworkError> {
        match self {
            Wiring::Unconnected => Ok(()),
            Wiring::Host(fabric) => fabric.detach(tap).await,
        }
    }

    /// Takes over a network that was made, changed or removed.
    ///
    /// # Errors
    ///
    /// The host's network cannot be changed.
    pub async fn network_changed(&self, id: &str, network: Option<&Network>) -> Result<(), NetworkError> {
        let Wiring::Host(fabric) = self else { return Ok(()) };
        match network {
            Some(network) => fabric.set_network(define(network)).await,
            None => fabric.remove_network(id).await,
        }
    }

    /// Takes over the security groups as they are now.
    ///
    /// # Errors
    ///
    /// The host's network cannot be changed.
    pub async fn groups_changed(&self, records: &Records) -> Result<(), NetworkError> {
        let Wiring::Host(fabric) = self else { return Ok(()) };
        let groups = groups(&records.read());
        fabric.set_groups(groups).await
    }

    /// The name of an instance's tap: at most 15 characters.
    pub fn tap_name(&self, instance: &str) -> String {
        let digits = instance.rsplit('-').next().unwrap_or(instance);
        format!("{TAP_PREFIX}-{}", digits.get(..11).unwrap_or(digits))
    }

    /// Whether instances get an interface.
    pub fn is_connected(&self) -> bool {
        matches!(self, Wiring::Host(_))
    }
}

/// First characters of the names of links, tables and the like that are ours.
pub const TAP_PREFIX: &str = "pl";

/// The network that the records say there should be.
pub fn plan(tables: &Tables) -> Plan {
    let connected = |instance: &&Arc<Instance>| {
        matches!(instance.state, InstanceState::Pending | InstanceState::Running | InstanceState::Stopping)
    };
    let connected = || tables.instances.iter().filter(connected);
    Plan {
        networks: tables.networks.iter().map(|network| define(network)).collect(),
        groups: groups(tables),
        attachments: connected().map(|instance| attachment(instance)).collect(),
        published: connected().flat_map(|instance| published(instance)).collect(),
    }
}

fn define(network: &Network) -> NetworkDef {
    NetworkDef {
        id: network.id.clone(),
        subnet: network.subnet,
        nat: network.nat,
        domain: network.domain(),
        mtu: MTU,
    }
}

fn groups(tables: &Tables) -> Vec<GroupDef> {
    let define = |group: &Arc<SecurityGroup>| GroupDef {
        id: group.id.clone(),
        ingress: group.ingress.iter().map(rule).collect(),
        egress: group.egress.iter().map(rule).collect(),
    };
    tables.security_groups.iter().map(define).collect()
}

fn rule(rule: &model::Rule) -> Rule {
    let ports = match (rule.from_port, rule.to_port) {
        (Some(from), Some(to)) => Ports { from, to },
        _ => Ports::ALL,
    };
    let traffic = match rule.protocol {
        model::Protocol::Tcp => Traffic::Tcp(ports),
        model::Protocol::Udp => Traffic::Udp(ports),
        model::Protocol::Icmp => Traffic::Icmp(None),
        model::Protocol::All => Traffic::All,
    };
    let peer = match &rule.peer {
        model::Peer::Cidr(cidr) => Peer::Cidr(*cidr),
        model::Peer::GroupId(id) => Peer::Group(id.clone()),
    };
    Rule { traffic, peers: vec![peer] }
}

fn published(instance: &Instance) -> Vec<Published> {
    let lead = |port: &model::PublishedPort| Published {
        protocol: match port.protocol {
            model::Transport::Tcp => Transport::Tcp,
            model::Transport::Udp => Transport::Udp,
        },
        host_address: port.host_address,
        host_port: port.host_port,
        address: instance.interface.private_address,
        port: port.port,
    };
    instance.published_ports.iter().map(lead).collect()
}

fn attachment(instance: &Instance) -> Attachment {
    let mut names = vec![instance.hostname.clone()];
    if instance.id != instance.hostname {
        names.push(instance.id.clone());
    }
    Attachment {
        tap: instance.interface.tap.clone(),
        mac: instance.interface.mac,
        address: instance.interface.private_address,
        network: instance.interface.network_id.clone(),
        groups: instance.security_groups.clone(),
        names,
        // The VMM is given its tap before it gives up its rights.
        owner: 0,
    }
}
