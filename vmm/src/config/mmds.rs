//! The metadata service the guest sees (`/mmds/config`).

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Which requests of the guest are answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Plain requests, and those of V2. Deprecated.
    #[default]
    V1,
    /// Only requests with a session token.
    V2,
}

/// How the guest reaches its metadata.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    #[serde(default)]
    pub version: MmdsVersion,
    /// Ids of the interfaces on which the service answers.
    pub network_interfaces: Vec<String>,
    /// Link-local address of the service; [`Self::DEFAULT_ADDRESS`] when absent.
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether answers are always plain text as EC2's are, whatever the request accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

impl MmdsConfig {
    /// The address metadata has on EC2.
    pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

    /// Address of the service.
    pub fn address(&self) -> Ipv4Addr {
        self.ipv4_address.unwrap_or(Self::DEFAULT_ADDRESS)
    }

    /// Checks the address (RFC 3927 keeps the first and the last 256 link-local ones back) and
    /// that interfaces are given; whether they exist is checked by [`super::VmConfig`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let address = self.address();
        if !matches!(address.octets(), [169, 254, 1..=254, _]) {
            return Err(ConfigError::MmdsAddress { address });
        }
        if self.network_interfaces.is_empty() {
            return Err(ConfigError::MmdsNoInterface);
        }
        Ok(())
    }
}
