//! The machine's virtio devices: made from the configuration, in the order in which the guest finds them.

use super::{BuildError, Placer};
use crate::config::VmConfig;

/// Why a device could not be made. The message names the device and the field.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {}

/// Handles by which running devices are adjusted.
#[derive(Default)]
pub struct Devices {}

/// Makes and places every device of `config`.
pub(super) fn create(_config: &VmConfig, _placer: &mut Placer) -> Result<Devices, BuildError> {
    Ok(Devices::default())
}
