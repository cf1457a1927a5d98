//! Writes EROFS file systems: read-only, uncompressed, so that guests can map them.
//!
//! `mkfs.erofs` of Debian 12 (1.5) reads directories only, which would mean to unpack a stranger's archive as root on
//! the host, with its owners and devices. Written here, file contents go from the layers straight to their
//! blocks, and all else is a tree in memory until the end.
//!
//! Layout of what is written, in blocks of 4 KiB (Linux `fs/erofs/erofs_fs.h`):
//!
//! ```text
//! 0                superblock at byte 1024
//! 1 …              contents of files larger than 2 KiB, each from a block's start
//! …                directories larger than 2 KiB
//! meta_blkaddr …   inodes, each with its extended attributes, and small contents right after them
//! ```

mod data;
mod directory;
mod format;
mod meta;

pub use data::{DataArea, Extent};
pub use format::xattrs_size;
pub use meta::{XATTRS_LIMIT, finish};

#[cfg(test)]
#[path = "erofs_tests.rs"]
mod tests;
