//! Images: what instances boot from, made from what users have, kept by content.
//!
//! An import reads files, a disk image or a container image, puts blobs into [`Blobs`] and gives back a
//! [`Manifest`], which its caller keeps. This module keeps no records, so it also cannot know which blobs are in
//! use: [`Blobs::collect`] is told. What is imported is hostile until proven otherwise: nothing in it is run or
//! mounted by the host, no path in it becomes a path of the host, and all it can make us store is bounded
//! ([`Limits`]).
//!
//! Imports can be given up by dropping their future or cancelling their [`Task`](crate::files::Task); a killed
//! process leaves nothing but files that [`Images::sweep`] removes.

mod blobs;
#[cfg(test)]
mod crash_tests;
mod digest;
mod disk;
mod erofs;
mod error;
mod frozen;
mod images;
mod kernel;
pub mod layer;
mod manifest;
mod oci;
mod partitions;
mod probe;
mod qemu_img;
mod rootfs;
#[cfg(test)]
mod testing;
mod tree;

pub use blobs::{Blob, Blobs};
pub use digest::{Digest, DigestError};
pub use disk::DiskImport;
pub use error::ImageError;
pub use frozen::DiskCopy;
pub use images::{Images, Limits};
pub use manifest::{Architecture, ContainerConfig, Manifest, Root};
pub use oci::{Credentials, OciImport, OciSource, Reference, ReferenceError};
pub use tree::Meta;
