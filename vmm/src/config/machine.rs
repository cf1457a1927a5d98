//! vCPUs and memory (`/machine-config`).

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// How guest memory is backed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// The host's ordinary pages.
    #[default]
    None,
    /// Ordinary memory the host is advised to back with transparent huge pages.
    Transparent,
    /// 2 MiB pages from the host's reserved pool (hugetlbfs).
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// Firecracker's deprecated static CPU templates. Only `None` is supported here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    #[default]
    None,
}

impl CpuTemplate {
    fn name(self) -> &'static str {
        match self {
            CpuTemplate::C3 => "C3",
            CpuTemplate::T2 => "T2",
            CpuTemplate::T2S => "T2S",
            CpuTemplate::T2CL => "T2CL",
            CpuTemplate::T2A => "T2A",
            CpuTemplate::V1N1 => "V1N1",
            CpuTemplate::None => "None",
        }
    }
}

/// vCPUs and memory of a microVM: the body of `PUT` and `GET /machine-config`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 32.
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_size_mib: u64,
    /// Whether pairs of vCPUs are shown to the guest as two threads of one core.
    #[serde(default)]
    pub smt: bool,
    /// Deprecated; `None` is the only value accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Whether writes to guest memory are tracked, as differential snapshots need it.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// How guest memory is backed.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

impl MachineConfig {
    /// The most vCPUs a microVM has.
    pub const MAX_VCPUS: u8 = 32;
    /// The most memory a microVM has, in MiB (1 TiB).
    pub const MAX_MEM_SIZE_MIB: u64 = 1 << 20;

    /// Guest memory in bytes. Cannot overflow for a configuration that passed [`Self::check`].
    pub fn mem_size_bytes(&self) -> u64 {
        self.mem_size_mib.saturating_mul(1 << 20)
    }

    /// This configuration with the fields set that `update` gives.
    pub fn updated(&self, update: &MachineConfigUpdate) -> Self {
        Self {
            vcpu_count: update.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: update.smt.unwrap_or(self.smt),
            cpu_template: update.cpu_template.or(self.cpu_template),
            track_dirty_pages: update.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(self.huge_pages),
        }
    }

    /// Checks everything that can be checked without looking at the host.
    pub fn check(&self) -> Result<(), ConfigError> {
        let count = self.vcpu_count;
        if !(1..=Self::MAX_VCPUS).contains(&count) {
            return Err(ConfigError::VcpuCount { count });
        }
        if self.smt && count > 1 && count % 2 == 1 {
            return Err(ConfigError::VcpuCountOdd { count });
        }
        let mib = self.mem_size_mib;
        if !(1..=Self::MAX_MEM_SIZE_MIB).contains(&mib) {
            return Err(ConfigError::MemSize { mib });
        }
        if self.huge_pages != HugePages::None && mib % 2 == 1 {
            return Err(ConfigError::MemSizeOdd { mib });
        }
        match self.cpu_template {
            None | Some(CpuTemplate::None) => Ok(()),
            Some(other) => Err(ConfigError::CpuTemplate { template: other.name() }),
        }
    }
}

/// The body of `PATCH /machine-config`: only what is given changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigUpdate {
    /// Whether nothing is given.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
