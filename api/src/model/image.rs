//! What an instance is made from.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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
    /// Why the import failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
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

/// Where an image is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// Being imported.
    Pending,
    Available,
    /// The import failed; `state_reason` says why.
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
