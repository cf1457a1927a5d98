//! Ports of the host that lead to a guest's.

use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A port of the host that leads to one of an instance's, whatever its security groups say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    #[serde(default)]
    pub protocol: Transport,
    /// One of the host's addresses; all of them if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub host_address: Option<Ipv4Addr>,
    #[schema(minimum = 1)]
    pub host_port: u16,
    /// The instance's.
    #[schema(minimum = 1)]
    pub port: u16,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    #[default]
    Tcp,
    Udp,
}

impl PublishedPort {
    /// Whether both take the same port of the host.
    pub fn collides(&self, other: &Self) -> bool {
        (self.protocol, self.host_port) == (other.protocol, other.host_port)
            && (self.host_address.is_none()
                || other.host_address.is_none()
                || self.host_address == other.host_address)
    }
}

/// The port of the host, as `tcp 8080` or `udp 192.0.2.1:53`.
impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            Transport::Tcp => "tcp ",
            Transport::Udp => "udp ",
        })?;
        match self.host_address {
            Some(address) => write!(f, "{address}:{}", self.host_port),
            None => write!(f, "{}", self.host_port),
        }
    }
}
