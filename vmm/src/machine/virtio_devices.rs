//! The machine's virtio devices: made from the configuration, in the order in which the guest finds them.

use std::io;
use std::sync::{Arc, Mutex};

use super::{BuildError, Placer};
use crate::config::VmConfig;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};

/// Why a device could not be made. The message names the device and the field.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The host gave no descriptors for a device.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] io::Error),
    /// See [`VsockError`].
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

/// Handles by which running devices are adjusted.
#[derive(Default)]
pub struct Devices {}

/// Makes and places every device of `config`.
pub(super) fn create(config: &VmConfig, placer: &mut Placer) -> Result<Devices, BuildError> {
    if let Some(vsock) = &config.vsock {
        let device = Vsock::new(vsock.guest_cid.into(), &vsock.uds_path).map_err(DeviceError::from)?;
        placer.place(Arc::new(Mutex::new(device)))?;
    }
    if let Some(entropy) = &config.entropy {
        let device = Rng::new(entropy.rate_limiter.as_ref()).map_err(|e| DeviceError::Host("entropy", e))?;
        placer.place(Arc::new(Mutex::new(device)))?;
    }
    Ok(Devices::default())
}
