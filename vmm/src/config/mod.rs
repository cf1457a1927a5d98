//! What a client says to `pulau-vmm` and what it is told: the body of every control API request
//! and response, and [`VmConfig`], the whole configuration of one microVM.
//!
//! Everything here is plain data with serde and validation: it opens no file, makes no system call
//! and knows neither KVM nor HTTP, so that a client of the API can use the same types. Names and
//! shapes are Firecracker's public API (its `firecracker.yaml`, version 1.17); unknown fields are
//! refused everywhere.
//!
//! A value of one of these types has the right shape; that it also makes sense is checked where it
//! is put into a [`VmConfig`], by the setter of its kind.

mod action;
mod balloon;
mod boot_source;
mod cpu;
mod drive;
mod entropy;
mod error;
mod full;
mod id;
mod instance;
mod logger;
mod machine;
mod metrics;
mod mmds;
mod network;
mod pmem;
mod rate_limiter;
mod serial;
mod snapshot;
mod vm;
mod vsock;

pub use action::{ActionConfig, ActionType, Fault, Version, VmStateChange, VmStateUpdate};
pub use balloon::{
    BalloonConfig, BalloonHintingStart, BalloonHintingStatus, BalloonStats, BalloonStatsUpdate, BalloonUpdate,
};
pub use boot_source::BootSourceConfig;
pub use cpu::{
    BitPattern, CpuConfig, CpuidLeafModifier, CpuidRegister, CpuidRegisterModifier, KvmCapability,
    MsrModifier,
};
pub use drive::{CacheType, DriveConfig, DriveUpdate, IoEngine};
pub use entropy::EntropyConfig;
pub use error::ConfigError;
pub use full::{CpuConfigSource, FullVmConfig, NotSupported};
pub use id::{check_device_id, check_instance_id};
pub use instance::{InstanceInfo, VmState};
pub use logger::{LogLevel, LoggerConfig};
pub use machine::{CpuTemplate, HugePages, MachineConfig, MachineConfigUpdate};
pub use metrics::MetricsConfig;
pub use mmds::{MmdsConfig, MmdsVersion};
pub use network::{MacAddr, NetworkInterfaceConfig, NetworkInterfaceUpdate};
pub use pmem::{PmemConfig, PmemUpdate};
pub use rate_limiter::{RateLimiterConfig, TokenBucketConfig};
pub use serial::SerialConfig;
pub use snapshot::{
    DriveOverride, MemBackend, MemBackendType, NetworkOverride, SnapshotCreateConfig, SnapshotHugePages,
    SnapshotLoadConfig, SnapshotType, VsockOverride,
};
pub use vm::VmConfig;
pub use vsock::VsockConfig;

/// The default id of a microVM whose starter gave none.
pub const DEFAULT_INSTANCE_ID: &str = "anonymous-instance";

#[cfg(test)]
mod tests;
