//! Network interfaces (`/network-interfaces/{iface_id}`).

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ConfigError, RateLimiterConfig, check_device_id};

/// An Ethernet address, written `06:00:ac:10:00:02`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether it names a group of stations and so cannot be the address of one.
    pub fn is_multicast(&self) -> bool {
        self.0[0] & 1 == 1
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not six pairs of hexadecimal digits with colons between.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address; one looks like 06:00:ac:10:00:02")]
pub struct MacAddrError(String);

impl FromStr for MacAddr {
    type Err = MacAddrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MacAddrError(text.chars().take(32).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(error()),
        }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// A network interface, joined to a tap device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceConfig {
    pub iface_id: String,
    /// Name of the tap device.
    pub host_dev_name: String,
    /// Address of the interface; the guest chooses one when absent.
    pub guest_mac: Option<MacAddr>,
    /// Largest packet in bytes, told to the guest when given.
    pub mtu: Option<u16>,
    /// Limit on what the guest receives.
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limit on what the guest sends.
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

impl NetworkInterfaceConfig {
    /// Checks everything that can be checked without opening the tap device.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_device_id("network-interfaces", "iface_id", &self.iface_id)?;
        let id = || self.iface_id.clone();
        // IFNAMSIZ is 16 with the final NUL; the kernel refuses '/' and white space.
        let name = &self.host_dev_name;
        let bad = |c: char| c == '/' || c == '\0' || c.is_whitespace();
        if !(1..=15).contains(&name.len()) || name.contains(bad) {
            let name = name.chars().take(32).collect();
            return Err(ConfigError::HostDevName { id: id(), name });
        }
        if let Some(mac) = self.guest_mac.filter(MacAddr::is_multicast) {
            return Err(ConfigError::MacMulticast { id: id(), mac });
        }
        match self.mtu {
            Some(mtu) if mtu < 68 => Err(ConfigError::Mtu { id: id(), mtu }),
            _ => Ok(()),
        }
    }
}

/// The body of `PATCH /network-interfaces/{iface_id}`, for a running microVM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    pub iface_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}
