//! An image from an instance.
//!
//! An instance is its image and one disk it writes to, so a copy of that disk is all a new image needs. For a root
//! of EROFS that is the layer: the new image has the same EROFS blob, and its instances' layers begin as clones of
//! the frozen one, each with a UUID of its own. The guest boots as before; nothing is merged or rewritten.
//!
//! What is in the disk stays in it: keys, histories and identities that are to be made anew belong to whoever
//! prepares the instance, or to what runs in its image at first boot (cloud-init takes the new instance id for one).

use std::path::Path;

use crate::files::Task;

use super::images::now;
use super::{ImageError, Images, Manifest, Root};

pub(super) fn freeze(
    images: &Images,
    from: Manifest,
    disk: &Path,
    task: &Task,
) -> Result<Manifest, ImageError> {
    let frozen = images.blobs.add_file(disk, task)?;
    let root = match from.root {
        Root::Erofs { blob, .. } => Root::Erofs { blob, layer: Some(frozen) },
        Root::Disk { device, .. } => Root::Disk { blob: frozen, device },
    };
    Ok(Manifest { root, created: now(), ..from })
}
