//! The entropy device (`/entropy`).

use serde::{Deserialize, Serialize};

use super::RateLimiterConfig;

/// A device that gives the guest random bytes from the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    pub rate_limiter: Option<RateLimiterConfig>,
}
