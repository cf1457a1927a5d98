//! An image from an instance.
//!
//! An instance is its image and one disk it writes to, so a copy of that disk is all a new image needs. For a root
//! of EROFS that is the layer: the new image has the same EROFS blob, and its instances' layers begin as clones of
//! the frozen one, each with a UUID of its own. The guest boots as before; nothing is merged or rewritten.
//!
//! What is in the disk stays in it: keys, histories and identities that are to be made anew belong to whoever
//! prepares the instance, or to what runs in its image at first boot (cloud-init takes the new instance id for one).

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::files::{self, IoContext, Staged, Task};

use super::images::now;
use super::{ImageError, Images, Manifest, Root};

/// A disk as it was, on its way to become part of an image. Gone when dropped.
#[derive(Debug)]
pub struct DiskCopy(Staged);

pub(super) fn copy(images: &Images, disk: &Path, task: &Task) -> Result<DiskCopy, ImageError> {
    let source = files::open_regular(disk)?;
    let meta = source.metadata().context("look at", disk)?;
    let staged = images.blobs.staging().file()?;
    // What is shared needs no room, but whether it can be is only known by trying.
    if !files::share(&source, staged.file()).context("clone into", staged.path())? {
        images.blobs.require(meta.blocks().saturating_mul(512).min(meta.len()))?;
        files::clone(&source, staged.file(), staged.path(), task)?;
    }
    Ok(DiskCopy(staged))
}

pub(super) fn freeze(
    images: &Images,
    from: Manifest,
    disk: DiskCopy,
    task: &Task,
) -> Result<Manifest, ImageError> {
    let frozen = images.blobs.add_staged(disk.0, task)?;
    let root = match from.root {
        Root::Erofs { blob, .. } => Root::Erofs { blob, layer: Some(frozen) },
        Root::Disk { device, .. } => Root::Disk { blob: frozen, device },
    };
    Ok(Manifest { root, created: now(), ..from })
}
