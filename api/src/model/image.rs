//! What an instance is made from.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::files::Progress;
use crate::image::Manifest;

/// An image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// `img-` and 17 hexadecimal digits.
    pub id: String,
    /// Unique.
    pub name: String,
    #[serde(default)]
    pub description: String,
    pub state: ImageState,
    /// Why it could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// The same for programs, as in `state_reason.code` of other things: `Client.InvalidImage`, for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_code: Option<String>,
    /// How far it is, while it is pending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// What it was made of, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ImageSource>,
    pub created: DateTime<Utc>,
    /// Bytes its files take; 0 until it is available.
    #[serde(default)]
    pub size: u64,
    /// How to boot it: kernel, root file system and their digests. Absent until it is available.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub manifest: Option<Manifest>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// What an image was made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ImageSource {
    /// A root file system or disk image on the host.
    File { path: String },
    /// A container image on the host: an OCI layout, or an archive.
    ContainerFile { path: String },
    /// A container image in a registry.
    Registry { reference: String },
    /// An instance's root disk.
    Instance { instance_id: String },
}

/// Where an image is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// Being made.
    Pending,
    Available,
    /// It could not be made; `state_reason` says why.
    Failed,
}

impl ImageState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Available => "available",
            Self::Failed => "failed",
        }
    }
}
