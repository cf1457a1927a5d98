//! What users ask of load balancers. Each request only writes down what is wanted.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;

use serde::Deserialize;
use utoipa::ToSchema;

use super::{Balancers, find};
use crate::groups;
use crate::instances::{Error, ports};
use crate::model::{
    Algorithm, BalancerProtocol, HealthCheck, InstanceState, Kind, LoadBalancer, LoadBalancerState,
    PublishedPort, Transport, check_name, check_tags, id,
};
use crate::records::Tables;

/// Instances named one by one.
const MAX_INSTANCES: usize = 1000;
const MAX_CONNECTIONS: u32 = 100_000;
/// Longest deregistration delay, in seconds: EC2's.
const LONGEST_DELAY: u64 = 3600;

/// A request to make a load balancer.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateLoadBalancer {
    pub name: String,
    pub protocol: BalancerProtocol,
    /// An address and port of the host: `127.0.0.1:8080`, or `0.0.0.0:80` for all of its addresses.
    #[schema(value_type = String)]
    pub listen: SocketAddr,
    /// Id or name of the group whose members it leads to; or else `instance_ids`.
    #[serde(default)]
    pub group: Option<String>,
    #[serde(default)]
    pub instance_ids: Vec<String>,
    /// The instances' port; that of `listen` if absent.
    #[serde(default)]
    pub target_port: Option<u16>,
    #[serde(default)]
    pub algorithm: Algorithm,
    #[serde(default)]
    pub health_check: HealthCheck,
    /// How long connections to a target that is taken away may go on: 0 to 3600; 30 if absent.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 3600)]
    pub deregistration_delay_seconds: Option<u64>,
    /// Connections at once: 1 to 100000; 4096 if absent.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 100000)]
    pub max_connections: Option<u32>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// What of a load balancer is to be changed; the rest stays. Open connections are not disturbed.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModifyLoadBalancer {
    /// All of them, of one that leads to instances named one by one.
    #[serde(default)]
    pub instance_ids: Option<Vec<String>>,
    #[serde(default)]
    pub algorithm: Option<Algorithm>,
    #[serde(default)]
    pub health_check: Option<HealthCheck>,
    #[serde(default)]
    #[schema(minimum = 0, maximum = 3600)]
    pub deregistration_delay_seconds: Option<u64>,
    #[serde(default)]
    #[schema(minimum = 1, maximum = 100000)]
    pub max_connections: Option<u32>,
    /// All of them.
    #[serde(default)]
    pub tags: Option<BTreeMap<String, String>>,
}

impl Balancers {
    /// Makes a load balancer. It listens a moment later.
    ///
    /// # Errors
    ///
    /// There is one of this name, its port is in use, or something in the request cannot be.
    pub async fn create(&self, request: CreateLoadBalancer) -> Result<Arc<LoadBalancer>, Error> {
        check_name(&request.name)?;
        if request.listen.port() == 0 {
            return Err(Error::invalid("listen", "the port must be 1 to 65535"));
        }
        if request.group.is_some() != request.instance_ids.is_empty() {
            return Err(Error::invalid("group", "give either group or instance_ids"));
        }
        let mut balancer = LoadBalancer {
            id: id::new(id::LOAD_BALANCER),
            name: request.name,
            created: self.instances.host().now(),
            tags: request.tags,
            state: LoadBalancerState::Provisioning,
            state_reason: None,
            protocol: request.protocol,
            listen: request.listen,
            group_id: None,
            instance_ids: request.instance_ids,
            target_port: request.target_port.unwrap_or(request.listen.port()),
            algorithm: request.algorithm,
            health_check: request.health_check,
            deregistration_delay_seconds: request.deregistration_delay_seconds.unwrap_or(30),
            max_connections: request.max_connections.unwrap_or(4096),
            targets: Vec::new(),
        };
        check(&balancer)?;
        self.records()
            .update(|tables, changes| {
                if tables.load_balancers.iter().any(|known| known.name == balancer.name) {
                    return Err(Error::Exists { kind: Kind::LoadBalancer, name: balancer.name.clone() });
                }
                refuse_taken(tables, balancer.listen)?;
                if let Some(group) = &request.group {
                    let group = groups::find(tables, group)?;
                    if group.deletion.is_some() {
                        return Err(Error::not_found(Kind::Group, &group.name));
                    }
                    // It is not deleted in between.
                    changes.expect_unchanged::<crate::model::Group>(tables, &group.id);
                    balancer.group_id = Some(group.id.clone());
                }
                check_instances(tables, &balancer.instance_ids)?;
                changes.create(&balancer);
                Ok(())
            })
            .await?;
        Ok(Arc::new(balancer))
    }

    /// Changes a load balancer.
    ///
    /// # Errors
    ///
    /// There is none, or a value cannot be.
    pub async fn modify(&self, id: &str, request: ModifyLoadBalancer) -> Result<Arc<LoadBalancer>, Error> {
        self.records()
            .update(|tables, changes| {
                let known = find(tables, id)?;
                let mut balancer = (*known).clone();
                if let Some(ids) = &request.instance_ids {
                    if balancer.group_id.is_some() {
                        return Err(Error::invalid("instance_ids", "this one leads to a group's members"));
                    }
                    if ids.is_empty() {
                        return Err(Error::invalid("instance_ids", "must not be empty"));
                    }
                    let new = ids.iter().filter(|id| !balancer.instance_ids.contains(id));
                    check_instances(tables, &new.cloned().collect::<Vec<_>>())?;
                    balancer.instance_ids.clone_from(ids);
                }
                balancer.algorithm = request.algorithm.unwrap_or(balancer.algorithm);
                balancer.health_check = request.health_check.clone().unwrap_or(balancer.health_check);
                balancer.deregistration_delay_seconds =
                    request.deregistration_delay_seconds.unwrap_or(balancer.deregistration_delay_seconds);
                balancer.max_connections = request.max_connections.unwrap_or(balancer.max_connections);
                if let Some(tags) = &request.tags {
                    balancer.tags.clone_from(tags);
                }
                check(&balancer)?;
                if balancer != *known {
                    changes.replace(tables, &balancer);
                }
                Ok(Arc::new(balancer))
            })
            .await
    }

    /// Deletes a load balancer. Connections through it are closed.
    ///
    /// # Errors
    ///
    /// There is none.
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        self.records()
            .update(|tables, changes| {
                let balancer = find(tables, id)?;
                changes.delete::<LoadBalancer>(tables, &balancer.id);
                Ok(())
            })
            .await
    }
}

fn check(balancer: &LoadBalancer) -> Result<(), Error> {
    check_tags(&balancer.tags)?;
    if balancer.target_port == 0 {
        return Err(Error::invalid("target_port", "must be 1 to 65535"));
    }
    if balancer.deregistration_delay_seconds > LONGEST_DELAY {
        let problem = format!("must be at most {LONGEST_DELAY}");
        return Err(Error::invalid("deregistration_delay_seconds", problem));
    }
    if !(1..=MAX_CONNECTIONS).contains(&balancer.max_connections) {
        return Err(Error::invalid("max_connections", format_args!("must be 1 to {MAX_CONNECTIONS}")));
    }
    let how = &balancer.health_check;
    let invalid = |problem: &str| Err(Error::invalid("health_check", problem));
    if let Some(path) = &how.path
        && (!path.starts_with('/') || path.len() > 1024 || path.parse::<hyper::Uri>().is_err())
    {
        return invalid("path must begin with / and be a URL's path, of at most 1024 characters");
    }
    if !(1..=300).contains(&how.interval_seconds) {
        return invalid("interval_seconds must be 1 to 300");
    }
    if !(1..=60).contains(&how.timeout_seconds) {
        return invalid("timeout_seconds must be 1 to 60");
    }
    if !(1..=10).contains(&how.healthy_threshold) || !(1..=10).contains(&how.unhealthy_threshold) {
        return invalid("thresholds must be 1 to 10");
    }
    Ok(())
}

fn check_instances(tables: &Tables, ids: &[String]) -> Result<(), Error> {
    if ids.len() > MAX_INSTANCES {
        return Err(Error::invalid("instance_ids", format_args!("at most {MAX_INSTANCES} are possible")));
    }
    for id in ids {
        let instance = tables.instances.get(id);
        if instance.is_none_or(|instance| instance.state == InstanceState::Terminated) {
            return Err(Error::not_found(Kind::Instance, id));
        }
    }
    Ok(())
}

/// Refuses a place at which somebody else listens, or which leads elsewhere.
fn refuse_taken(tables: &Tables, listen: SocketAddr) -> Result<(), Error> {
    let in_use = |by: String| Error::PortInUse { port: format!("tcp {listen}"), by };
    let host_address = match listen.ip() {
        IpAddr::V4(address) => Some(address).filter(|address| !address.is_unspecified()),
        IpAddr::V6(_) => None,
    };
    let port = PublishedPort { protocol: Transport::Tcp, host_address, host_port: listen.port(), port: 1 };
    if let Some(by) = ports::holder(tables, &port) {
        return Err(in_use(by));
    }
    match TcpListener::bind(listen).map(drop).map_err(|error| error.kind()) {
        Err(io::ErrorKind::AddrInUse) => Err(in_use("a program of this host".to_owned())),
        Err(io::ErrorKind::AddrNotAvailable) => {
            Err(Error::invalid("listen", format_args!("{} is none of this host's addresses", listen.ip())))
        }
        Err(io::ErrorKind::PermissionDenied) => {
            Err(Error::invalid("listen", format_args!("the daemon may not listen on port {}", listen.port())))
        }
        _ => Ok(()),
    }
}
