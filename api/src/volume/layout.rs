//! Where things are, and what may be a name and a size.

use std::path::PathBuf;

use super::{VolumeError, Volumes};

/// Disks are in units of this.
const UNIT: u64 = 4096;
const SMALLEST: u64 = 1 << 20;
/// The largest file of ext4 with blocks of 4 KiB.
const LARGEST: u64 = (16 << 40) - UNIT;

/// Refuses what is no size of a disk.
pub(super) fn check_size(size: u64) -> Result<(), VolumeError> {
    match size.is_multiple_of(UNIT) && (SMALLEST..=LARGEST).contains(&size) {
        true => Ok(()),
        false => Err(VolumeError::Size { size }),
    }
}

fn file_name(id: &str) -> Result<String, VolumeError> {
    let fine = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    match (1..=64).contains(&id.len()) && id.bytes().all(fine) {
        true => Ok(format!("{id}.raw")),
        false => Err(VolumeError::Name { id: id.to_owned() }),
    }
}

impl Volumes {
    /// Where a volume is, or would be.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Name`].
    pub fn path(&self, id: &str) -> Result<PathBuf, VolumeError> {
        Ok(self.dir.join(file_name(id)?))
    }

    /// Where a snapshot is, or would be.
    ///
    /// # Errors
    ///
    /// [`VolumeError::Name`].
    pub fn snapshot_path(&self, id: &str) -> Result<PathBuf, VolumeError> {
        Ok(self.snapshots.join(file_name(id)?))
    }

    pub(super) fn template_path(&self, size: u64) -> PathBuf {
        // The number is the version of the options it is made with.
        self.dir.join(format!("templates/ext4-1-{size}"))
    }
}
