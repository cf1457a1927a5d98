//! Layers of container images: archives of changes to a file system.
//!
//! A layer is read once, from front to back, and each change in it is told to a [`LayerSink`]; nothing is
//! unpacked. Formats: OCI image specification 1.1, `layer.md`; POSIX.1-2017 `pax`. Layers come from strangers: paths
//! are checked ([`LayerPath`]), and sizes, counts and names are bounded.

mod archive;
mod decompress;
mod path;

use std::io::Read;

pub use archive::{read, unreadable};
pub use decompress::{Bounded, decompress};
pub use path::LayerPath;

use super::ImageError;
use super::tree::Meta;

/// What a layer adds at a path.
pub enum Content<'a> {
    Directory,
    /// Exactly `size` bytes come from the reader, or an error.
    File {
        size: u64,
        data: &'a mut dyn Read,
    },
    /// Where it leads: any bytes but NUL.
    Symlink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// Takes the changes of layers, in their order. An error ends the reading.
pub trait LayerSink {
    /// Adds what is at `path`, in place of what is there. A directory over a directory changes its metadata alone.
    ///
    /// # Errors
    ///
    /// It cannot be.
    fn put(&mut self, path: &LayerPath, meta: Meta, content: Content<'_>) -> Result<(), ImageError>;

    /// Makes `path` another name for the file at `target`.
    ///
    /// # Errors
    ///
    /// It cannot be.
    fn link(&mut self, path: &LayerPath, target: &LayerPath) -> Result<(), ImageError>;

    /// Removes what earlier layers have at `path`.
    ///
    /// # Errors
    ///
    /// It cannot be.
    fn whiteout(&mut self, path: &LayerPath) -> Result<(), ImageError>;

    /// Removes what earlier layers have in the directory `path`.
    ///
    /// # Errors
    ///
    /// It cannot be.
    fn opaque(&mut self, path: &LayerPath) -> Result<(), ImageError>;
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
