//! Snapshots (`/snapshot/create`, `/snapshot/load`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// What a snapshot holds of guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What was written since the last snapshot.
    Diff,
}

/// The body of `PUT /snapshot/create`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateConfig {
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// File for the state of vCPUs and devices.
    pub snapshot_path: PathBuf,
    /// File for guest memory.
    pub mem_file_path: PathBuf,
}

/// Who provides guest memory after a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemBackendType {
    /// A memory file, mapped privately.
    File,
    /// A process that serves page faults, reached over a Unix socket.
    Uffd,
}

/// Where guest memory comes from after a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemBackend {
    pub backend_path: PathBuf,
    pub backend_type: MemBackendType,
}

/// Another tap device for an interface of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    pub iface_id: String,
    pub host_dev_name: String,
}

/// Another socket for the vsock device of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    pub uds_path: PathBuf,
}

/// How guest memory is backed after a restore.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotHugePages {
    /// As it was in the microVM the snapshot was made of.
    #[default]
    Snapshot,
    None,
    Transparent,
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// The body of `PUT /snapshot/load`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoadConfig {
    pub snapshot_path: PathBuf,
    /// Deprecated: a [`MemBackend`] of type [`MemBackendType::File`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemBackend>,
    /// Deprecated: `track_dirty_pages`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub enable_diff_snapshots: bool,
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Whether the guest runs at once.
    #[serde(default)]
    pub resume_vm: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock is moved by the time since the snapshot.
    #[serde(default, skip_serializing_if = "is_false")]
    pub clock_realtime: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    pub huge_pages: SnapshotHugePages,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_default(value: &SnapshotHugePages) -> bool {
    *value == SnapshotHugePages::default()
}

impl SnapshotLoadConfig {
    /// Where guest memory comes from, whichever of the two fields says so.
    pub fn backend(&self) -> Result<MemBackend, ConfigError> {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(backend), None) => Ok(backend.clone()),
            (None, Some(path)) => {
                Ok(MemBackend { backend_path: path.clone(), backend_type: MemBackendType::File })
            }
            _ => Err(ConfigError::SnapshotBackend),
        }
    }
}
