//! Disks that instances write to.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A volume. An instance's root disk is one, too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// `vol-` and 17 hexadecimal digits.
    pub id: String,
    /// Bytes, as the guest sees it.
    pub size: u64,
    pub state: VolumeState,
    /// The instance it belongs to, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<VolumeAttachment>,
    pub created: DateTime<Utc>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// Where a volume is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Its file is being made.
    Creating,
    /// It can be attached or deleted.
    Available,
    /// It is attached.
    InUse,
    /// Its file is being removed.
    Deleting,
}

/// Its place in an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeAttachment {
    pub instance_id: String,
    /// Position among the instance's disks, from 0; the root disk's is 0.
    pub index: u8,
    /// Whether it goes when the instance is terminated.
    pub delete_on_termination: bool,
}
