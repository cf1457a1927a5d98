//! The VMM's metrics (`/metrics`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where metrics are written, as lines of JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// File or named pipe, made if missing, appended to.
    pub metrics_path: PathBuf,
    /// Whether each line carries the microVM's id.
    #[serde(default)]
    pub emit_id: bool,
    /// What else each line carries, under `properties`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}
