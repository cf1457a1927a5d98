//! The vsock device (`/vsock`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The vsock device, joined to Unix sockets of the host: clients connect to `uds_path` and ask for
/// a port of the guest; a guest that connects to port N reaches a listener at `uds_path`_N.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Deprecated and ignored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// Context id of the guest, at least 3: lower ones have a fixed meaning.
    pub guest_cid: u32,
    /// Path of the Unix socket the VMM makes.
    pub uds_path: PathBuf,
}

impl VsockConfig {
    /// The longest `uds_path` in bytes: `sun_path` holds 107 and a NUL, and `_4294967295` must fit
    /// behind it.
    pub const MAX_PATH: usize = 107 - 11;

    /// Checks everything that can be checked without making the socket.
    pub fn check(&self) -> Result<(), ConfigError> {
        let cid = self.guest_cid;
        if cid < 3 || cid == u32::MAX {
            return Err(ConfigError::VsockCid { cid });
        }
        match self.uds_path.as_os_str().len() {
            0 => Err(ConfigError::VsockEmptyPath),
            len if len > Self::MAX_PATH => Err(ConfigError::VsockPathTooLong { len }),
            _ => Ok(()),
        }
    }
}
