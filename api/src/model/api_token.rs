//! What lets a client in over TCP.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::http::Role;

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ApiToken {
    /// `tok-` and 17 hexadecimal digits.
    pub id: String,
    /// Unique.
    pub name: String,
    pub role: Role,
    /// SHA-256 of the secret, hexadecimal.
    pub hash: String,
    pub created: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<DateTime<Utc>>,
}
