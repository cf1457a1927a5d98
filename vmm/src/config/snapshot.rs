//! Snapshots (`/snapshot/create`, `/snapshot/load`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, SerialConfig, VmConfig};

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

/// Another file for a drive of the snapshot (not in Firecracker).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    pub drive_id: String,
    pub path_on_host: PathBuf,
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
    /// Not in Firecracker.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Where the serial console goes, instead of where it went (not in Firecracker).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_override: Option<SerialConfig>,
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

    /// The configuration of a snapshot with what this request puts in the place of its own.
    pub fn apply(&self, config: &mut VmConfig) -> Result<(), ConfigError> {
        let unknown = |kind, id: &str| ConfigError::SnapshotNoDevice { kind, id: id.to_owned() };
        for change in &self.drive_overrides {
            let drive = config.drives.iter_mut().find(|drive| drive.drive_id == change.drive_id);
            let drive = drive.ok_or_else(|| unknown("drive", &change.drive_id))?;
            drive.path_on_host = Some(change.path_on_host.clone());
            drive.check()?;
        }
        for change in &self.network_overrides {
            let mut interfaces = config.network_interfaces.iter_mut();
            let interface = interfaces.find(|interface| interface.iface_id == change.iface_id);
            let interface = interface.ok_or_else(|| unknown("network interface", &change.iface_id))?;
            interface.host_dev_name.clone_from(&change.host_dev_name);
        }
        if let Some(change) = &self.vsock_override {
            let vsock = config.vsock.as_mut().ok_or_else(|| unknown("vsock device", ""))?;
            vsock.uds_path.clone_from(&change.uds_path);
            vsock.check()?;
        }
        if let Some(serial) = &self.serial_override {
            config.set_serial(serial.clone());
        }
        config.machine.track_dirty_pages = self.track_dirty_pages || self.enable_diff_snapshots;
        Ok(())
    }
}
