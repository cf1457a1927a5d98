//! The images of one data directory: every way to make one.

use std::path::{Path, PathBuf};

use crate::files::{FileError, Task};

use super::disk::{self, DiskImport};
use super::frozen::{self, DiskCopy};
use super::{Blobs, ImageError, Manifest};

/// What an import may make us store. All in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// A disk, as its guest sees it; also a file system made from layers.
    pub disk: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { disk: 1 << 40 }
    }
}

/// Makes images. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Images {
    pub(super) blobs: Blobs,
    pub(super) limits: Limits,
}

impl Images {
    /// Opens the images below `data_dir`, making directories if need be. `reserve` is how many bytes of the file
    /// system are to stay free.
    ///
    /// # Errors
    ///
    /// A directory cannot be made.
    pub fn open(data_dir: &Path, limits: Limits, reserve: u64) -> Result<Self, FileError> {
        Ok(Images { blobs: Blobs::open(&data_dir.join("images"), reserve)?, limits })
    }

    /// Where the images' content is.
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    /// Removes what a killed process left half-imported. To be called once at start, before any import.
    ///
    /// # Errors
    ///
    /// Something could not be removed.
    pub fn sweep(&self) -> Result<usize, FileError> {
        self.blobs.sweep()
    }

    /// Makes an image of a root file system or disk image, and the kernel to boot it.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; nothing is left then but whole blobs, which a collection removes.
    pub async fn import_disk(&self, import: DiskImport, task: &Task) -> Result<Manifest, ImageError> {
        self.blocking(task, move |images, task| disk::import(images, &import, task)).await
    }

    /// Copies an instance's writable disk, for [`Self::freeze`]: its layer if its image's root is EROFS, else the disk itself.
    /// Nothing may write to it meanwhile: the instance is stopped or paused. This is short, as nothing is hashed yet.
    ///
    /// # Errors
    ///
    /// As [`Self::import_disk`].
    pub async fn copy_disk(&self, disk: PathBuf, task: &Task) -> Result<DiskCopy, ImageError> {
        self.blocking(task, move |images, task| frozen::copy(images, &disk, task)).await
    }

    /// Makes an image of what an instance of the image `from` has become, from a copy of its disk.
    ///
    /// # Errors
    ///
    /// As [`Self::import_disk`].
    pub async fn freeze(&self, from: Manifest, disk: DiskCopy, task: &Task) -> Result<Manifest, ImageError> {
        self.blocking(task, move |images, task| frozen::freeze(images, from, disk, task)).await
    }

    /// Compares every blob of an image with its digest.
    ///
    /// # Errors
    ///
    /// [`ImageError::MissingBlob`] or [`ImageError::Digest`]: it has to be imported again.
    pub async fn verify(&self, manifest: &Manifest, task: &Task) -> Result<(), ImageError> {
        let blobs = manifest.blobs();
        self.blocking(task, move |images, task| {
            blobs.iter().try_for_each(|blob| images.blobs.verify(blob, task))
        })
        .await
    }

    /// Works in a thread where waiting is allowed. Dropping the future cancels the work.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        task: &Task,
        work: impl FnOnce(&Images, &Task) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let given_up = task.cancel_on_drop();
        let (images, task) = (self.clone(), task.clone());
        let done = tokio::task::spawn_blocking(move || work(&images, &task)).await;
        given_up.disarm();
        match done {
            Ok(result) => result,
            // The runtime ends, or the work panicked.
            Err(_) => Err(FileError::Cancelled.into()),
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}

#[cfg(test)]
#[path = "images_tests.rs"]
mod tests;
