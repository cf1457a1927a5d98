//! Container images as root file systems of instances.
//!
//! All layers become one EROFS file system, with Pulau's agent in it as `/sbin/init`; the kernel is the user's. Where
//! the image is from makes no difference once its documents are read and its layers are files: every layer
//! is compared with the digests that lead to it while it is read.

mod challenge;
mod document;
mod import;
mod local;
mod reference;
mod registry;

use std::fs::File;
use std::path::PathBuf;

pub use reference::{Reference, ReferenceError};
pub use registry::Credentials;

use super::Digest;
use document::ImageConfig;

/// What to make an image of.
#[derive(Clone, Debug)]
pub struct OciImport {
    pub source: OciSource,
    /// The guest's side of Pulau: `pulau-agent`, statically linked.
    pub agent: PathBuf,
    /// An ELF kernel or a bzImage, with virtio, EROFS, overlayfs and ext4.
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// More words for the kernel command line.
    pub boot_args: String,
}

/// Where a container image is.
#[derive(Clone, Debug)]
pub enum OciSource {
    /// An OCI layout, an archive of one, or what `docker save` wrote.
    Local {
        path: PathBuf,
        /// Picks one of several images: its tag or name, as the layout has it.
        tag: Option<String>,
    },
    /// A registry. TLS is used except for registries on this host.
    Registry { reference: Reference, credentials: Option<Credentials> },
}

/// An image whose documents are read and whose layers are files.
struct Opened {
    /// Digest of the configuration, which includes those of all layers.
    id: Digest,
    config: ImageConfig,
    layers: Vec<Layer>,
}

/// One layer, as it is stored.
struct Layer {
    file: File,
    /// Bytes from the beginning of the file.
    offset: u64,
    /// Bytes.
    size: u64,
    /// Of the layer as it is stored, if anything says so.
    digest: Option<Digest>,
    media_type: String,
}

#[cfg(test)]
#[path = "oci_tests.rs"]
mod tests;

#[cfg(test)]
mod test_registry;
