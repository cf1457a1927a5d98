//! Persistent memory devices (`/pmem/{id}`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, RateLimiterConfig, check_device_id};

/// A file of the host, mapped into the guest as persistent memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    pub id: String,
    pub path_on_host: PathBuf,
    /// Whether the guest's root file system is on it.
    #[serde(default)]
    pub root_device: bool,
    /// Whether the guest may only read it; the file's pages are then shared between microVMs.
    #[serde(default)]
    pub read_only: bool,
    /// Limit on flushes.
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl PmemConfig {
    /// Checks everything that can be checked without opening the file.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_device_id("pmem", "id", &self.id)?;
        if self.path_on_host.as_os_str().is_empty() {
            let id = self.id.clone();
            return Err(ConfigError::PmemEmptyPath { id });
        }
        Ok(())
    }
}

/// The body of `PATCH /pmem/{id}`, for a running microVM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemUpdate {
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiterConfig>,
}
