//! Disks that instances write to.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::StateReason;
use crate::files::Progress;

/// A volume. An instance's root disk is one, too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// `vol-` and 17 hexadecimal digits.
    pub id: String,
    /// Bytes, as the guest sees it.
    pub size: u64,
    pub state: VolumeState,
    /// Why it could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<StateReason>,
    /// How far it is, while it is being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The snapshot it was made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<String>,
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
    /// It could not be made; `state_reason` says why. It can only be deleted.
    Error,
}

impl VolumeState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Available => "available",
            Self::InUse => "in-use",
            Self::Deleting => "deleting",
            Self::Error => "error",
        }
    }
}

impl Volume {
    /// The number a guest reads from the disk: the id without its hyphen, as on EC2. 20 bytes, which is what virtio
    /// has room for.
    pub fn serial(&self) -> String {
        self.id.replace('-', "")
    }

    /// Whether it belongs to this instance.
    pub fn is_attached_to(&self, instance: &str) -> bool {
        self.attachment.as_ref().is_some_and(|attachment| attachment.instance_id == instance)
    }
}

/// Its place in an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeAttachment {
    pub instance_id: String,
    /// The root disk's is 0. The guest has the others behind its root disk, in this order.
    pub index: u8,
    /// Whether it goes when the instance is terminated.
    pub delete_on_termination: bool,
}
