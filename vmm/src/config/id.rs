//! The rules for names of devices and of microVMs.

use super::ConfigError;

/// The longest id of a device or of a microVM, in characters.
pub(super) const MAX_ID_LEN: usize = 64;

/// Checks the id of a device: 1 to 64 ASCII letters, digits and underscores.
///
/// `section` and `field` are only named in the error.
pub fn check_device_id(section: &'static str, field: &'static str, id: &str) -> Result<(), ConfigError> {
    if id.is_empty() {
        return Err(ConfigError::EmptyId { section, field });
    }
    if !id.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric()) {
        let id = id.to_owned();
        return Err(ConfigError::IdCharacter { section, field, id });
    }
    if id.len() > MAX_ID_LEN {
        let len = id.len();
        return Err(ConfigError::IdTooLong { section, field, len });
    }
    Ok(())
}

/// Checks the id of a microVM (`--id`): 1 to 64 ASCII letters, digits and hyphens.
pub fn check_instance_id(id: &str) -> Result<(), ConfigError> {
    let good = |b: u8| b == b'-' || b.is_ascii_alphanumeric();
    if (1..=MAX_ID_LEN).contains(&id.len()) && id.bytes().all(good) {
        return Ok(());
    }
    Err(ConfigError::InstanceId { id: id.to_owned() })
}
