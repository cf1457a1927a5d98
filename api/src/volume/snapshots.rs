//! Snapshots: copies of volumes that stay as they are.

use crate::files::{self, Task};

use super::volumes::{names, usage};
use super::{Content, Usage, VolumeError, Volumes};

const MODE: u32 = 0o400;

impl Volumes {
    /// Keeps volume `id` as it is now, under the name `snapshot`. If that is there already, it stays.
    ///
    /// # Errors
    ///
    /// [`VolumeError::NotFound`], or the copy fails; there is no such snapshot then.
    pub fn snapshot(&self, id: &str, snapshot: &str, task: &Task) -> Result<Usage, VolumeError> {
        let size = self.usage(id)?.size;
        let place = self.snapshot_path(snapshot)?;
        if !self.is_there(snapshot, &place, None)? {
            let staged = self.copy(&self.path(id)?, size, &self.snapshot_staging, task)?;
            task.check()?;
            staged.persist(&place, MODE)?;
        }
        usage(snapshot, &place)
    }

    /// Makes a new volume with what a snapshot holds. It may be larger. If it is there already, with this size, it
    /// stays as it is.
    ///
    /// # Errors
    ///
    /// [`VolumeError::NotFound`], [`VolumeError::TooSmall`], or the copy fails; there is no such volume then.
    pub fn restore(&self, snapshot: &str, id: &str, size: u64, task: &Task) -> Result<(), VolumeError> {
        self.snapshot_usage(snapshot)?;
        self.create(id, Content::Disk(&self.snapshot_path(snapshot)?), size, task)
    }

    /// # Errors
    ///
    /// [`VolumeError::NotFound`].
    pub fn snapshot_usage(&self, snapshot: &str) -> Result<Usage, VolumeError> {
        usage(snapshot, &self.snapshot_path(snapshot)?)
    }

    /// Removes a snapshot. Volumes made from it stay. One that is not there is as good as removed.
    ///
    /// # Errors
    ///
    /// It is still there.
    pub fn delete_snapshot(&self, snapshot: &str) -> Result<(), VolumeError> {
        Ok(files::remove(&self.snapshot_path(snapshot)?)?)
    }

    /// The names of all snapshots.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn list_snapshots(&self) -> Result<Vec<String>, VolumeError> {
        names(&self.snapshots)
    }
}
