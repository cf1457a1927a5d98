//! The block device (virtio 1.2, section 5.2): a raw file or a block device of the host as the guest's
//! disk.
//!
//! | file | holds |
//! | --- | --- |
//! | `device` | the device: features, configuration space, queue, interrupts, changes while running |
//! | `request` | what one descriptor chain asks for, checked |
//! | `uring` | the same operations made later, by io_uring |
//!
//! The file itself, with its lock and the operations made at once, is a [`Disk`](super::disk::Disk).
//!
//! Data goes between the file and guest memory in one system call per request (`Sync`), or in one per
//! batch of requests (`Async`), without a copy of our own. Files are used through the host's page cache.
//!
//! What has been flushed is never lost: with `cache_type` `Writeback` the guest is offered
//! `VIRTIO_BLK_F_FLUSH`, and a flush is an `fdatasync`. With `Unsafe`, Firecracker's default and the
//! API's, no flush is offered: what was written survives the death of this process, not that of the host.

mod device;
mod request;
mod uring;

pub use device::{Block, BlockError, BlockMetrics};

#[cfg(test)]
mod tests;
