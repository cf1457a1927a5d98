//! Limits on the throughput of a device.

use serde::{Deserialize, Serialize};

/// A token bucket: at most `size` tokens at once, refilled from empty in `refill_time`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Capacity in tokens: bytes, or operations.
    pub size: u64,
    /// Tokens given once at the start, on top of `size`; they are not refilled.
    pub one_time_burst: Option<u64>,
    /// Milliseconds from empty to full.
    pub refill_time: u64,
}

impl TokenBucketConfig {
    /// Whether this bucket limits anything. One whose size or refill time is 0 does not: in an
    /// update it removes the limit there was.
    pub fn is_limiting(&self) -> bool {
        self.size != 0 && self.refill_time != 0
    }
}

/// A limit on bytes, on operations, or on both. In an update, a bucket that is absent leaves the
/// present one alone, and one that [does not limit](TokenBucketConfig::is_limiting) removes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Tokens are bytes.
    pub bandwidth: Option<TokenBucketConfig>,
    /// Tokens are operations.
    pub ops: Option<TokenBucketConfig>,
}

impl RateLimiterConfig {
    /// These limits after `update`.
    pub fn updated(&self, update: &RateLimiterConfig) -> Self {
        let bucket = |old: Option<TokenBucketConfig>, new: Option<TokenBucketConfig>| {
            new.or(old).filter(TokenBucketConfig::is_limiting)
        };
        Self { bandwidth: bucket(self.bandwidth, update.bandwidth), ops: bucket(self.ops, update.ops) }
    }

    /// `old` after `update`, either of which may be absent; `None` where nothing is limited.
    pub fn merge(old: &Option<Self>, update: &Option<Self>) -> Option<Self> {
        let merged = old.unwrap_or_default().updated(&update.unwrap_or_default());
        (merged != Self::default()).then_some(merged)
    }
}
