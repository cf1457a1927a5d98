//! How a guest's network interface is to be set up: one type for the kernel command line (`pulau.ip=`)
//! and for the protocol (JSON). Pure data; applying it is the agent's work.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The interface that is meant where none is named.
pub const DEFAULT_DEVICE: &str = "eth0";

/// One interface's configuration. As text (`pulau.ip=`) it is a comma-separated list: each item without
/// `=` is an address with its prefix length; the others are `gw=`, `dns=`, `search=` (each may repeat),
/// `dev=`, `mtu=` and `mac=`:
///
/// ```text
/// 172.16.0.2/30,fd00::2/64,gw=172.16.0.1,gw=fd00::1,dns=1.1.1.1,dev=eth0,mtu=1500
/// ```
///
/// Applying it makes these the interface's only global addresses and brings it up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// Interface name in the guest, at most 15 bytes; `eth0` if left out.
    #[serde(default = "default_device")]
    pub device: String,
    /// Addresses with prefix length, IPv4 and IPv6.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Cidr>,
    /// Default gateways, at most one of each family. They need not lie inside a prefix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<IpAddr>,
    /// Name servers, written to `/etc/resolv.conf`; that file is left alone if there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
    /// DNS search domains.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Link MTU in bytes; unchanged if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Hardware address; unchanged if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

fn default_device() -> String {
    DEFAULT_DEVICE.to_owned()
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            device: default_device(),
            addresses: Vec::new(),
            gateways: Vec::new(),
            dns: Vec::new(),
            search: Vec::new(),
            mtu: None,
            mac: None,
        }
    }
}

/// Why a piece of network configuration could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("{0:?} is not an address with a prefix length, such as 172.16.0.2/30")]
    Cidr(String),
    #[error("{0:?} is not a hardware address, such as 06:00:ac:10:00:02")]
    Mac(String),
    #[error("{value:?} is not a value for {key}=")]
    Value { key: &'static str, value: String },
    #[error("unknown key in {0:?}; known are gw, dns, search, dev, mtu and mac")]
    Key(String),
    #[error("{0:?} is not an interface name: 1 to 15 bytes, no '/', no white space")]
    Device(String),
    #[error("two default gateways of one address family")]
    Gateways,
}

impl NetworkConfig {
    /// Checks what the types cannot: the interface name and the gateways.
    ///
    /// # Errors
    /// [`ParseError::Device`], [`ParseError::Gateways`].
    pub fn validate(&self) -> Result<(), ParseError> {
        let name = &self.device;
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0';
        if name.is_empty() || name.len() > 15 || name == "." || name == ".." || name.contains(bad) {
            return Err(ParseError::Device(name.clone()));
        }
        for family in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
            if self.gateways.iter().filter(|g| family(g)).count() > 1 {
                return Err(ParseError::Gateways);
            }
        }
        Ok(())
    }
}

impl FromStr for NetworkConfig {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        fn value<T: FromStr>(key: &'static str, value: &str) -> Result<T, ParseError> {
            value.parse().map_err(|_| ParseError::Value { key, value: value.to_owned() })
        }
        let mut config = Self::default();
        for item in text.split(',').filter(|item| !item.is_empty()) {
            match item.split_once('=') {
                None => config.addresses.push(item.parse()?),
                Some(("gw", v)) => config.gateways.push(value("gw", v)?),
                Some(("dns", v)) => config.dns.push(value("dns", v)?),
                Some(("search", v)) => config.search.push(v.to_owned()),
                Some(("dev", v)) => config.device = v.to_owned(),
                Some(("mtu", v)) => config.mtu = Some(value("mtu", v)?),
                Some(("mac", v)) => config.mac = Some(v.parse()?),
                Some(_) => return Err(ParseError::Key(item.to_owned())),
            }
        }
        config.validate()?;
        Ok(config)
    }
}

impl fmt::Display for NetworkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dev={}", self.device)?;
        self.addresses.iter().try_for_each(|a| write!(f, ",{a}"))?;
        self.gateways.iter().try_for_each(|g| write!(f, ",gw={g}"))?;
        self.dns.iter().try_for_each(|d| write!(f, ",dns={d}"))?;
        self.search.iter().try_for_each(|s| write!(f, ",search={s}"))?;
        self.mtu.iter().try_for_each(|m| write!(f, ",mtu={m}"))?;
        self.mac.iter().try_for_each(|m| write!(f, ",mac={m}"))
    }
}

/// An address and its prefix length, `172.16.0.2/30`. In JSON a string of that form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    pub address: IpAddr,
    /// Bits: at most 32 for IPv4, 128 for IPv6.
    pub prefix: u8,
}

impl FromStr for Cidr {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError::Cidr(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        if prefix > if address.is_ipv4() { 32 } else { 128 } {
            return Err(bad());
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// An Ethernet address, `06:00:ac:10:00:02`. In JSON a string of that form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let bad = || ParseError::Mac(text.to_owned());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+')).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

macro_rules! string_conversions {
    ($($t:ty),*) => {$(
        impl TryFrom<String> for $t {
            type Error = ParseError;
            fn try_from(text: String) -> Result<Self, ParseError> {
                text.parse()
            }
        }
        impl From<$t> for String {
            fn from(value: $t) -> String {
                value.to_string()
            }
        }
    )*};
}
string_conversions!(Cidr, Mac);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let text = "dev=eth1,172.16.0.2/30,fd00::2/64,gw=172.16.0.1,gw=fd00::1,dns=1.1.1.1,search=a.example,mtu=1450,mac=06:00:ac:10:00:02";
        let config: NetworkConfig = text.parse().unwrap();
        assert_eq!(config.addresses.len(), 2);
        assert_eq!(config.gateways, ["172.16.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(config.mac, Some(Mac([6, 0, 0xac, 0x10, 0, 2])));
        assert_eq!(config.to_string(), text);
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<NetworkConfig>(&json).unwrap(), config);
    }

    #[test]
    fn shortest_form_names_eth0() {
        let config: NetworkConfig = "10.0.0.2/24".parse().unwrap();
        assert_eq!(config.device, "eth0");
        assert_eq!(
            serde_json::to_string(&config).unwrap(),
            r#"{"device":"eth0","addresses":["10.0.0.2/24"]}"#
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let parse = |text: &str| text.parse::<NetworkConfig>().unwrap_err();
        assert_eq!(parse("10.0.0.2"), ParseError::Cidr("10.0.0.2".into()));
        assert_eq!(parse("10.0.0.2/33"), ParseError::Cidr("10.0.0.2/33".into()));
        assert_eq!(parse("fd00::1/129"), ParseError::Cidr("fd00::1/129".into()));
        assert_eq!(parse("gw=x"), ParseError::Value { key: "gw", value: "x".into() });
        assert_eq!(parse("mtu=-1"), ParseError::Value { key: "mtu", value: "-1".into() });
        assert_eq!(parse("route=1"), ParseError::Key("route=1".into()));
        assert_eq!(parse("mac=06:00:ac:10:00"), ParseError::Mac("06:00:ac:10:00".into()));
        assert_eq!(parse("mac=06:00:ac:10:00:+2"), ParseError::Mac("06:00:ac:10:00:+2".into()));
        assert_eq!(parse("dev=a/b"), ParseError::Device("a/b".into()));
        assert_eq!(parse("dev=sixteen-bytes-xx"), ParseError::Device("sixteen-bytes-xx".into()));
        assert_eq!(parse("gw=10.0.0.1,gw=10.0.0.2"), ParseError::Gateways);
    }
}
