//! A whole configuration as one JSON object: `--config-file`, and `GET /vm/config`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::{
    BalloonConfig, BootSourceConfig, ConfigError, CpuConfig, DriveConfig, EntropyConfig, LoggerConfig,
    MachineConfig, MetricsConfig, MmdsConfig, NetworkInterfaceConfig, PmemConfig, SerialConfig, VmConfig,
    VsockConfig,
};

/// A whole configuration, in the shape of Firecracker's configuration file. What is absent is not
/// configured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FullVmConfig {
    pub balloon: Option<BalloonConfig>,
    #[serde(default)]
    pub drives: Vec<DriveConfig>,
    #[serde(default)]
    pub boot_source: BootSourceConfig,
    pub cpu_config: Option<CpuConfigSource>,
    pub logger: Option<LoggerConfig>,
    pub machine_config: Option<MachineConfig>,
    pub metrics: Option<MetricsConfig>,
    pub mmds_config: Option<MmdsConfig>,
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterfaceConfig>,
    pub vsock: Option<VsockConfig>,
    pub entropy: Option<EntropyConfig>,
    #[serde(default)]
    pub pmem: Vec<PmemConfig>,
    /// Always absent, and shown as such.
    pub memory_hotplug: Option<NotSupported>,
    /// Not in Firecracker's file; left out of `GET /vm/config` where it was not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// What has no meaning. Clients of Firecracker, which ignores it, write such fields as null; anything
    /// else in them is refused.
    #[serde(flatten, skip_serializing)]
    pub unknown: BTreeMap<String, Value>,
}

/// `cpu-config` as a configuration file has it: the configuration, or the path of a file with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum CpuConfigSource {
    Inline(CpuConfig),
    File(PathBuf),
}

impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        // An untagged enum would not say what is wrong with the configuration.
        impl<'de> Visitor<'de> for Either {
            type Value = CpuConfigSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CPU configuration or the path of a file with one")
            }

            fn visit_str<E>(self, path: &str) -> Result<Self::Value, E> {
                Ok(CpuConfigSource::File(path.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                CpuConfig::deserialize(MapAccessDeserializer::new(map)).map(CpuConfigSource::Inline)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// A part of Firecracker's configuration that there is not. It cannot be made, also not by reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum NotSupported {}

impl<'de> Deserialize<'de> for NotSupported {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(D::Error::custom("memory-hotplug is not supported"))
    }
}

impl TryFrom<FullVmConfig> for VmConfig {
    type Error = ConfigError;

    /// Everything but `logger` and `metrics`, which are of the process and not of the microVM. A
    /// `cpu-config` that is a path must have been read before.
    fn try_from(full: FullVmConfig) -> Result<Self, ConfigError> {
        if let Some((name, _)) = full.unknown.iter().find(|(_, value)| !value.is_null()) {
            return Err(ConfigError::UnknownField { name: name.clone() });
        }
        let mut config = VmConfig::default();
        if let Some(machine) = full.machine_config {
            config.set_machine(machine)?;
        }
        match full.cpu_config {
            Some(CpuConfigSource::Inline(cpu)) => config.set_cpu(cpu)?,
            Some(CpuConfigSource::File(path)) => {
                return Err(ConfigError::Cpu { problem: format!("{} was not read", path.display()) });
            }
            None => {}
        }
        config.set_boot_source(full.boot_source)?;
        for drive in full.drives {
            config.set_drive(drive)?;
        }
        for pmem in full.pmem {
            config.set_pmem(pmem)?;
        }
        for interface in full.network_interfaces {
            config.set_network_interface(interface)?;
        }
        if let Some(vsock) = full.vsock {
            config.set_vsock(vsock)?;
        }
        if let Some(balloon) = full.balloon {
            config.set_balloon(balloon)?;
        }
        if let Some(entropy) = full.entropy {
            config.set_entropy(entropy);
        }
        if let Some(mmds) = full.mmds_config {
            config.set_mmds(mmds)?;
        }
        if let Some(serial) = full.serial {
            config.set_serial(serial);
        }
        Ok(config)
    }
}

impl From<&VmConfig> for FullVmConfig {
    fn from(config: &VmConfig) -> Self {
        Self {
            balloon: config.balloon.clone(),
            drives: config.drives.clone(),
            boot_source: config.boot_source.clone().unwrap_or_default(),
            cpu_config: config.cpu.clone().map(CpuConfigSource::Inline),
            logger: None,
            machine_config: Some(config.machine.clone()),
            metrics: None,
            mmds_config: config.mmds.clone(),
            network_interfaces: config.network_interfaces.clone(),
            vsock: config.vsock.clone(),
            entropy: config.entropy.clone(),
            pmem: config.pmem.clone(),
            memory_hotplug: None,
            serial: config.serial.clone(),
            unknown: BTreeMap::new(),
        }
    }
}
