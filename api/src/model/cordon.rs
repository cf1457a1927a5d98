//! What keeps new instances off a host.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// As long as this is there, no instance is run on the host. Those that exist stay as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Cordon {
    /// The host: [`Cordon::THIS_HOST`].
    pub id: String,
    pub since: DateTime<Utc>,
}

impl Cordon {
    /// There is one host in a store so far.
    pub const THIS_HOST: &'static str = "this";
}
