//! Block devices (`/drives/{drive_id}`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, RateLimiterConfig, check_device_id};

/// Whether the guest is offered a way to flush its writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// No flush is offered: what a power loss of the host keeps is up to the host.
    #[default]
    Unsafe,
    /// Flush is offered, and done by `fdatasync`.
    Writeback,
}

/// How the VMM reads and writes the drive's file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One request at a time, by `pread` and `pwrite`.
    #[default]
    Sync,
    /// Many at a time, by io_uring.
    Async,
}

/// A block device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// Name of the drive; also its serial number, cut to 20 bytes.
    pub drive_id: String,
    /// Partition holding the root file system; only meaningful for the root device.
    pub partuuid: Option<String>,
    /// Whether the guest's root file system is on it.
    pub is_root_device: bool,
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether the guest may only read it. Absent means `false`.
    pub is_read_only: Option<bool>,
    /// File or block device on the host. Required.
    pub path_on_host: Option<PathBuf>,
    pub rate_limiter: Option<RateLimiterConfig>,
    /// Absent means [`IoEngine::Sync`].
    pub io_engine: Option<IoEngine>,
    /// Socket of a vhost-user backend: not supported.
    pub socket: Option<PathBuf>,
}

impl DriveConfig {
    /// Whether the guest may only read it.
    pub fn read_only(&self) -> bool {
        self.is_read_only.unwrap_or(false)
    }

    /// Checks everything that can be checked without opening a file.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_device_id("drives", "drive_id", &self.drive_id)?;
        let id = || self.drive_id.clone();
        if self.socket.is_some() {
            return Err(ConfigError::DriveSocket { id: id() });
        }
        if self.path_on_host.as_ref().is_none_or(|p| p.as_os_str().is_empty()) {
            return Err(ConfigError::DriveWithoutPath { id: id() });
        }
        // It goes to the guest's command line.
        if let Some(partuuid) = &self.partuuid
            && (!(1..=64).contains(&partuuid.len())
                || !partuuid.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit()))
        {
            let partuuid = partuuid.clone();
            return Err(ConfigError::DrivePartuuid { id: id(), partuuid });
        }
        Ok(())
    }
}

/// The body of `PATCH /drives/{drive_id}`, for a running microVM: another file behind the same
/// device, or other limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    pub drive_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiterConfig>,
}
