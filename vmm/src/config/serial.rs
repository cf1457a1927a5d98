//! The serial console (`/serial`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::TokenBucketConfig;

/// Where the guest's serial console goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// File or named pipe the output is written to; the VMM's standard output when absent.
    pub serial_out_path: Option<PathBuf>,
    /// Limit on the output in bytes; what exceeds it is dropped and counted.
    pub rate_limiter: Option<TokenBucketConfig>,
    /// Unix socket the VMM makes, to which a client attaches to read and write, one at a time; the output is
    /// written to the file all the same. Not in Firecracker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_path: Option<PathBuf>,
}
