//! An update of the packages in instances' guests.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One request to update instances, and what came of it so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Patch {
    /// `patch-` and 17 hexadecimal digits.
    pub id: String,
    pub state: PatchState,
    /// Whether instances that need it are booted anew.
    pub reboot: bool,
    /// For one instance, without its reboot.
    pub timeout_seconds: u64,
    pub created: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<DateTime<Utc>>,
    /// Somebody asked to leave off.
    #[serde(default)]
    pub cancel: bool,
    pub instances: Vec<InstancePatch>,
}

/// Where an update is, of one instance or of all of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PatchState {
    /// Its turn has not come yet.
    Pending,
    Running,
    /// The packages are in place; the guest boots anew.
    Rebooting,
    Succeeded,
    /// Of a request: of an instance at least.
    Failed,
    /// Left off by request.
    Cancelled,
}

impl PatchState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Rebooting => "rebooting",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more comes of it.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// What came of the update of one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstancePatch {
    pub instance_id: String,
    pub state: PatchState,
    /// Why it failed, or what it is at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Of the package manager; 124 if it took too long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// What has changed: at most 1000, by name.
    #[serde(default)]
    pub packages: Vec<PackageChange>,
    /// Whether what was updated takes full effect only after a reboot. Absent until that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reboot_required: Option<bool>,
    #[serde(default)]
    pub rebooted: bool,
    /// The end of what the package manager wrote: at most 4 KiB.
    #[serde(default)]
    pub output: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<DateTime<Utc>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<DateTime<Utc>>,
    /// The boot it was begun in.
    #[serde(default)]
    pub generation: u64,
}

impl InstancePatch {
    /// One whose turn has not come yet.
    pub fn of(instance: &str) -> Self {
        InstancePatch {
            instance_id: instance.to_owned(),
            state: PatchState::Pending,
            message: None,
            exit_code: None,
            packages: Vec::new(),
            reboot_required: None,
            rebooted: false,
            output: String::new(),
            started: None,
            finished: None,
            generation: 0,
        }
    }
}

/// A package that came, went or has another version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PackageChange {
    pub name: String,
    /// Absent if it is new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_version: Option<String>,
    /// Absent if it was removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_version: Option<String>,
}
