//! Publishing instances' ports: what is asked for, whether the host has the port to give, and who has it else.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::sync::Arc;

use super::Service;
use super::error::Error;
use crate::model::{Instance, InstanceState, Kind, LoadBalancer, PublishedPort, Transport};
use crate::records::Tables;

/// Ports of one instance.
const MAX_PORTS: usize = 64;

impl Service {
    /// Has a port of the host lead to one of an instance's, for as long as the instance is there.
    ///
    /// # Errors
    ///
    /// The port is in use, by another instance or by a program of the host, or is none.
    pub async fn publish(&self, id: &str, port: PublishedPort) -> Result<Arc<Instance>, Error> {
        check(&[port])?;
        self.change_ports(id, |tables, instance| {
            if instance.published_ports.contains(&port) {
                return Ok(());
            }
            instance.published_ports.push(port);
            check(&instance.published_ports)?;
            refuse_taken(tables, &[port])?;
            refuse_listening(&[port])
        })
        .await
    }

    /// Takes that back. Connections that exist go on.
    ///
    /// # Errors
    ///
    /// There is no such instance, or it does not publish the port.
    pub async fn unpublish(&self, id: &str, port: PublishedPort) -> Result<Arc<Instance>, Error> {
        self.change_ports(id, |_, instance| {
            let before = instance.published_ports.len();
            instance.published_ports.retain(|published| *published != port);
            match instance.published_ports.len() == before {
                true => Err(Error::not_found(Kind::PublishedPort, &port.to_string())),
                false => Ok(()),
            }
        })
        .await
    }

    async fn change_ports(
        &self,
        id: &str,
        mut change: impl FnMut(&Tables, &mut Instance) -> Result<(), Error>,
    ) -> Result<Arc<Instance>, Error> {
        let changed = self.host.records.update(|tables, changes| {
            let mut instance = (*super::find::instance(tables, id)?).clone();
            if matches!(instance.state, InstanceState::ShuttingDown | InstanceState::Terminated) {
                return Err(Error::State {
                    kind: Kind::Instance,
                    id: id.to_owned(),
                    state: instance.state.name().to_owned(),
                    needed: "its ports cannot be changed any more",
                });
            }
            change(tables, &mut instance)?;
            changes.replace(tables, &instance);
            Ok::<_, Error>(())
        });
        changed.await?;
        self.get(id)
    }
}

/// Checks what can be said of an instance's ports without looking at anything else.
pub(super) fn check(ports: &[PublishedPort]) -> Result<(), Error> {
    let invalid = |problem: String| Err(Error::invalid("published_ports", problem));
    if ports.len() > MAX_PORTS {
        return invalid(format!("at most {MAX_PORTS} are possible"));
    }
    for (index, port) in ports.iter().enumerate() {
        if port.host_port == 0 || port.port == 0 {
            return invalid("ports are 1 to 65535".to_owned());
        }
        if let Some(address) = port.host_address
            && (address.is_loopback() || address.is_unspecified() || address.is_multicast())
        {
            return invalid(format!("host_address: {address} is none that others reach this host by"));
        }
        if ports.iter().take(index).any(|other| other.collides(port)) {
            return invalid(format!("{port} is there twice"));
        }
    }
    Ok(())
}

/// Refuses ports that something of ours has.
pub(super) fn refuse_taken(tables: &Tables, ports: &[PublishedPort]) -> Result<(), Error> {
    for port in ports {
        if let Some(by) = holder(tables, port) {
            return Err(Error::PortInUse { port: port.to_string(), by });
        }
    }
    Ok(())
}

/// Who has the host's port.
pub fn holder(tables: &Tables, port: &PublishedPort) -> Option<String> {
    let listens = |balancer: &&Arc<LoadBalancer>| {
        let address = balancer.listen.ip();
        let same_address = match (port.host_address, address) {
            (Some(one), IpAddr::V4(other)) => one == other || other.is_unspecified(),
            (Some(_), IpAddr::V6(other)) => other.is_unspecified(),
            (None, _) => true,
        };
        port.protocol == Transport::Tcp && balancer.listen.port() == port.host_port && same_address
    };
    if let Some(balancer) = tables.load_balancers.iter().find(listens) {
        return Some(format!("load balancer {}", balancer.name));
    }
    let alive = tables.instances.iter().filter(|instance| instance.state != InstanceState::Terminated);
    let instance = alive.into_iter().find(|i| i.published_ports.iter().any(|other| other.collides(port)));
    instance.map(|instance| format!("instance {}", instance.id))
}

/// Refuses ports on which a program of the host listens: it would not be reached any more.
pub(super) fn refuse_listening(ports: &[PublishedPort]) -> Result<(), Error> {
    ports.iter().try_for_each(|port| {
        let at = SocketAddrV4::new(port.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED), port.host_port);
        let bound = match port.protocol {
            Transport::Tcp => TcpListener::bind(at).map(drop),
            Transport::Udp => UdpSocket::bind(at).map(drop),
        };
        match bound.map_err(|error| error.kind()) {
            Err(io::ErrorKind::AddrInUse) => {
                Err(Error::PortInUse { port: port.to_string(), by: "a program of this host".to_owned() })
            }
            Err(io::ErrorKind::AddrNotAvailable) => {
                let problem = format!("host_address: {} is none of this host's", at.ip());
                Err(Error::invalid("published_ports", problem))
            }
            _ => Ok(()),
        }
    })
}
