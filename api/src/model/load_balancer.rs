//! Ports of the host behind which many instances are.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::StateReason;

/// A load balancer: hands what comes in at a port of the host on to healthy instances.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LoadBalancer {
    /// `lb-` and 17 hexadecimal digits.
    pub id: String,
    /// Unique.
    pub name: String,
    pub created: DateTime<Utc>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    pub state: LoadBalancerState,
    /// Why it does not listen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<StateReason>,
    pub protocol: BalancerProtocol,
    /// Where it listens: an address and port of the host.
    #[schema(value_type = String)]
    pub listen: SocketAddr,
    /// Whose members it leads to; or else `instance_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_id: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instance_ids: Vec<String>,
    /// The instances'.
    pub target_port: u16,
    #[serde(default)]
    pub algorithm: Algorithm,
    pub health_check: HealthCheck,
    /// How long connections to a target that is taken away may go on.
    pub deregistration_delay_seconds: u64,
    /// Connections at once; more wait.
    pub max_connections: u32,
    #[serde(default)]
    pub targets: Vec<Target>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LoadBalancerState {
    /// It does not listen yet.
    Provisioning,
    Active,
    /// It cannot listen; that is tried again.
    Failed,
}

impl LoadBalancerState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Provisioning => "provisioning",
            Self::Active => "active",
            Self::Failed => "failed",
        }
    }
}

/// What it understands of what it hands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum BalancerProtocol {
    /// Each request of HTTP/1.1 goes to a target.
    Http,
    /// Each connection does.
    Tcp,
}

/// Which of the healthy targets is next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    /// Each in turn.
    #[default]
    RoundRobin,
    /// The one with the fewest requests or connections.
    LeastConnections,
}

/// When a target is healthy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthCheck {
    /// Asked for by HTTP and answered by a status of 200 to 399; if absent, it is enough that a connection is
    /// taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Between two checks: 1 to 300.
    pub interval_seconds: u64,
    /// For one: 1 to 60.
    pub timeout_seconds: u64,
    /// So many good ones in a row make it healthy: 1 to 10.
    pub healthy_threshold: u32,
    /// So many bad ones make it unhealthy: 1 to 10.
    pub unhealthy_threshold: u32,
}

impl Default for HealthCheck {
    fn default() -> Self {
        HealthCheck {
            path: None,
            interval_seconds: 5,
            timeout_seconds: 3,
            healthy_threshold: 2,
            unhealthy_threshold: 2,
        }
    }
}

/// An instance that a load balancer leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Target {
    pub instance_id: String,
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    pub state: TargetState,
    /// When `state` became what it is.
    pub since: DateTime<Utc>,
    /// Of the last check that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// It has not been checked often enough yet.
    Initial,
    Healthy,
    Unhealthy,
    /// It is taken away; connections to it go on for a while.
    Draining,
}

impl TargetState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Initial => "initial",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
        }
    }
}
