//! Keys that let users in.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The public half of a key pair; the private half is never kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct KeyPair {
    /// `key-` and 17 hexadecimal digits.
    pub id: String,
    /// Unique.
    pub name: String,
    /// As in `authorized_keys`: type, base64, comment.
    pub public_key: String,
    /// `SHA256:` and base64, as `ssh-keygen -l` prints it.
    pub fingerprint: String,
    pub created: DateTime<Utc>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}
