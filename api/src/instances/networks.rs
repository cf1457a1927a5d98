//! Networks and security groups.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnet::Ipv4Net;
use serde::Deserialize;
use utoipa::ToSchema;

use super::error::Error;
use super::{Service, find};
use crate::model::{
    InstanceState, Kind, Network, Peer, Protocol, Rule, SecurityGroup, check_name, check_tags, id,
};
use crate::network::{addresses, is_label};
use crate::records::{Changes, Tables};

/// The network that is there from the start.
const DEFAULT_SUBNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 77, 0, 0), 16);
const DEFAULT: &str = "default";
/// Rules of one group, each way.
const MAX_RULES: usize = 60;

/// A request to make a network.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    pub name: String,
    /// IPv4, /16 to /28.
    #[schema(value_type = String)]
    pub subnet: Ipv4Net,
    /// Whether instances reach what is outside.
    #[serde(default = "yes")]
    pub nat: bool,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

fn yes() -> bool {
    true
}

/// A request to make a security group.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSecurityGroup {
    pub name: String,
    #[serde(default)]
    pub description: String,
    /// Id or name; the default network if absent.
    #[serde(default)]
    pub network: Option<String>,
    /// Who may connect to its members: nobody if absent.
    #[serde(default)]
    pub ingress: Vec<Rule>,
    /// To whom its members may connect: everybody if absent.
    #[serde(default)]
    pub egress: Option<Vec<Rule>>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// A security group's rules as they are to be; what is absent stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModifyRules {
    #[serde(default)]
    pub ingress: Option<Vec<Rule>>,
    #[serde(default)]
    pub egress: Option<Vec<Rule>>,
}

impl Service {
    /// Makes the default network with its default group, if there is no network at all.
    pub(super) async fn make_defaults(&self) -> Result<(), Error> {
        self.host
            .records
            .update(|tables, changes| {
                if tables.networks.is_empty() {
                    let mut network = self.network(DEFAULT, DEFAULT_SUBNET, true, BTreeMap::new());
                    network.is_default = true;
                    create(changes, &network, &self.default_group(&network));
                }
                Ok(())
            })
            .await
    }

    fn network(&self, name: &str, subnet: Ipv4Net, nat: bool, tags: BTreeMap<String, String>) -> Network {
        let subnet = subnet.trunc();
        Network {
            id: id::new(id::NETWORK),
            name: name.to_owned(),
            subnet,
            gateway: addresses::gateway(subnet),
            nat,
            is_default: false,
            created: self.host.now(),
            tags,
        }
    }

    /// As on EC2: members reach each other, and everything outside; ssh comes in, since there is no other way
    /// for a user to reach a first instance.
    fn default_group(&self, network: &Network) -> SecurityGroup {
        let id = id::new(id::SECURITY_GROUP);
        let members = Rule { peer: Peer::GroupId(id.clone()), ..Rule::all() };
        let ssh = Rule { protocol: Protocol::Tcp, from_port: Some(22), to_port: Some(22), ..Rule::all() };
        let ping = Rule { protocol: Protocol::Icmp, ..Rule::all() };
        SecurityGroup {
            id,
            name: DEFAULT.to_owned(),
            description: "of instances for which no other is named".to_owned(),
            network_id: network.id.clone(),
            ingress: vec![members, ssh, ping],
            egress: vec![Rule::all()],
            created: self.host.now(),
            tags: BTreeMap::new(),
        }
    }

    /// Makes a network, with a security group `default`.
    ///
    /// # Errors
    ///
    /// There is one of this name, or its subnet cannot be or overlaps another's.
    pub async fn create_network(&self, request: CreateNetwork) -> Result<Arc<Network>, Error> {
        check_label(&request.name)?;
        check_tags(&request.tags)?;
        let subnet = request.subnet;
        if addresses::check_subnet(subnet).is_err() {
            let problem =
                "must be a network address of private use with a prefix of 16 to 28, such as 10.78.0.0/16";
            return Err(Error::invalid("subnet", problem));
        }
        let network = self.network(&request.name, subnet, request.nat, request.tags);
        let group = self.default_group(&network);
        self.host
            .records
            .update(|tables, changes| {
                for known in tables.networks.iter() {
                    if known.name == network.name {
                        return Err(Error::Exists { kind: Kind::Network, name: network.name.clone() });
                    }
                    addresses::check_apart(subnet, [known.subnet]).map_err(|overlap| {
                        Error::invalid("subnet", format_args!("{overlap} of network {}", known.name))
                    })?;
                }
                create(changes, &network, &group);
                Ok(())
            })
            .await?;
        Ok(Arc::new(network))
    }

    /// Removes a network and its security groups.
    ///
    /// # Errors
    ///
    /// There is none, it is the default one, or instances are in it.
    pub async fn delete_network(&self, id: &str) -> Result<(), Error> {
        self.host
            .records
            .update(|tables, changes| {
                let network = find::network(tables, Some(id))?;
                let user = tables.instances.iter().find(|instance| {
                    instance.interface.network_id == network.id && instance.state != InstanceState::Terminated
                });
                if let Some(user) = user {
                    let by = format!("instance {}", user.id);
                    return Err(Error::InUse { kind: Kind::Network, id: network.id.clone(), by });
                }
                if network.is_default {
                    let by = "those who name none: it is the default network".to_owned();
                    return Err(Error::InUse { kind: Kind::Network, id: network.id.clone(), by });
                }
                changes.delete::<Network>(tables, &network.id);
                let groups = tables.security_groups.iter().filter(|group| group.network_id == network.id);
                groups.for_each(|group| changes.delete::<SecurityGroup>(tables, &group.id));
                Ok(())
            })
            .await
    }

    /// All networks, in order of their names.
    pub fn networks(&self) -> Vec<Arc<Network>> {
        let mut all: Vec<_> = self.host.records.read().networks.iter().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Makes a security group.
    ///
    /// # Errors
    ///
    /// There is one of this name in the network, or a rule cannot be.
    pub async fn create_security_group(
        &self,
        request: CreateSecurityGroup,
    ) -> Result<Arc<SecurityGroup>, Error> {
        check_name(&request.name)?;
        check_tags(&request.tags)?;
        let mut group = SecurityGroup {
            id: id::new(id::SECURITY_GROUP),
            name: request.name,
            description: request.description,
            network_id: String::new(),
            ingress: request.ingress,
            egress: request.egress.unwrap_or_else(|| vec![Rule::all()]),
            created: self.host.now(),
            tags: request.tags,
        };
        self.host
            .records
            .update(|tables, changes| {
                let network = find::network(tables, request.network.as_deref())?;
                group.network_id.clone_from(&network.id);
                let known = tables.security_groups.iter();
                if known.into_iter().any(|known| known.network_id == network.id && known.name == group.name) {
                    return Err(Error::Exists { kind: Kind::SecurityGroup, name: group.name.clone() });
                }
                check_rules(tables, &group)?;
                changes.create(&group);
                Ok(())
            })
            .await?;
        Ok(Arc::new(group))
    }

    /// Replaces a security group's rules. Members feel it at once.
    ///
    /// # Errors
    ///
    /// There is no such group, or a rule cannot be.
    pub async fn modify_rules(&self, id: &str, request: &ModifyRules) -> Result<Arc<SecurityGroup>, Error> {
        self.host
            .records
            .update(|tables, changes| {
                let known = tables.security_groups.get(id);
                let known = known.ok_or_else(|| Error::not_found(Kind::SecurityGroup, id))?;
                let mut group = (**known).clone();
                group.ingress = request.ingress.clone().unwrap_or(group.ingress);
                group.egress = request.egress.clone().unwrap_or(group.egress);
                check_rules(tables, &group)?;
                changes.replace(tables, &group);
                Ok(Arc::new(group))
            })
            .await
    }

    /// Removes a security group.
    ///
    /// # Errors
    ///
    /// There is none, or an instance or another group's rule uses it, or it is a network's default one.
    pub async fn delete_security_group(&self, id: &str) -> Result<(), Error> {
        self.host
            .records
            .update(|tables, changes| {
                let known = tables.security_groups.get(id);
                let group = known.ok_or_else(|| Error::not_found(Kind::SecurityGroup, id))?;
                let in_use = |by: String| Error::InUse { kind: Kind::SecurityGroup, id: id.to_owned(), by };
                if group.name == DEFAULT {
                    return Err(in_use("its network, which has no other default".to_owned()));
                }
                let member = tables.instances.iter().find(|instance| {
                    instance.state != InstanceState::Terminated
                        && instance.security_groups.iter().any(|group| group == id)
                });
                if let Some(member) = member {
                    return Err(in_use(format!("instance {}", member.id)));
                }
                let names_it = |rule: &Rule| matches!(&rule.peer, Peer::GroupId(peer) if peer == id);
                let user = tables
                    .security_groups
                    .iter()
                    .find(|other| other.id != id && other.ingress.iter().chain(&other.egress).any(names_it));
                if let Some(user) = user {
                    return Err(in_use(format!("a rule of security group {}", user.id)));
                }
                changes.delete::<SecurityGroup>(tables, id);
                Ok(())
            })
            .await
    }

    /// All security groups, in order of their networks and names.
    pub fn security_groups(&self) -> Vec<Arc<SecurityGroup>> {
        let mut all: Vec<_> = self.host.records.read().security_groups.iter().cloned().collect();
        all.sort_by(|a, b| (&a.network_id, &a.name).cmp(&(&b.network_id, &b.name)));
        all
    }
}

fn create(changes: &mut Changes, network: &Network, group: &SecurityGroup) {
    changes.create(network);
    changes.create(group);
}

/// A network's name is part of its instances' DNS names.
fn check_label(name: &str) -> Result<(), Error> {
    if is_label(name, 32) {
        return Ok(());
    }
    Err(Error::invalid("name", "must be 1 to 32 lower-case letters, digits and inner hyphens"))
}

fn check_rules(tables: &Tables, group: &SecurityGroup) -> Result<(), Error> {
    for (field, rules) in [("ingress", &group.ingress), ("egress", &group.egress)] {
        if rules.len() > MAX_RULES {
            return Err(Error::invalid(field, format_args!("at most {MAX_RULES} rules are possible")));
        }
        for rule in rules {
            if let Some(problem) = rule.problem() {
                return Err(Error::invalid(field, problem));
            }
            if let Peer::GroupId(peer) = &rule.peer
                && *peer != group.id
                && tables.security_groups.get(peer).is_none_or(|other| other.network_id != group.network_id)
            {
                return Err(Error::invalid(
                    field,
                    format_args!("there is no security group {peer} in its network"),
                ));
            }
        }
    }
    Ok(())
}
