//! Disks of instances as files: volumes, and snapshots of them.
//!
//! ```text
//! volumes/<id>.raw              a disk, sparse
//! volumes/templates/ext4-<size> an empty ext4 file system of that many bytes, cloned for new disks
//! volumes/tmp/                  files on their way; emptied at start
//! snapshots/<id>.raw            a disk as it was, read-only
//! ```
//!
//! This module works on files and keeps no records: who owns a volume, and whether it is attached, its caller
//! knows. Nothing is preallocated, so the sum of all sizes may exceed the disk; what is written is not allowed to
//! eat into the reserve. Everything blocks (use `spawn_blocking`), and every operation either happens or leaves
//! nothing, also when the process is killed. Each can be repeated: one that was done already is done.
//!
//! A disk that a running microVM writes to can be copied, but is consistent only if the microVM is paused
//! meanwhile, and up to date only if its guest has flushed.

mod error;
mod layout;
mod snapshots;
mod volumes;

pub use error::VolumeError;
pub use volumes::{Content, Usage, Volumes};
