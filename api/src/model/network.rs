//! Isolated subnets for instances.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use chrono::{DateTime, Utc};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A network. Its instances reach each other, as their security groups allow, and none of other networks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// `net-` and 17 hexadecimal digits.
    pub id: String,
    /// Unique; also the last part of its instances' DNS names.
    pub name: String,
    /// IPv4, /16 to /28, as `10.77.0.0/16`; overlaps no other network's.
    #[schema(value_type = String)]
    pub subnet: Ipv4Net,
    /// The host's address in it: the first.
    #[schema(value_type = String)]
    pub gateway: Ipv4Addr,
    /// Whether instances reach what is outside, with the host's address.
    pub nat: bool,
    /// Whether instances are put here if no network is named.
    #[serde(default)]
    pub is_default: bool,
    pub created: DateTime<Utc>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

impl Network {
    /// DNS domain of its instances' names.
    pub fn domain(&self) -> String {
        format!("{}.internal", self.name)
    }
}
