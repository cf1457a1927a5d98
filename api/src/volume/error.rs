//! What goes wrong with volumes.

use crate::files::FileError;

/// An operation on a volume or snapshot failed, and left everything as it was. Sizes are in bytes.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("{id:?} is no name of a volume or snapshot: 1 to 64 of a-z, 0-9 and hyphen")]
    Name { id: String },
    #[error("there is no volume or snapshot {id}")]
    NotFound { id: String },
    /// There is another one of this name.
    #[error("{id} exists already, with another size ({size} bytes)")]
    Exists { id: String, size: u64 },
    #[error("{size} bytes is no size for a disk: use a multiple of 4,096 from 1 MiB to 16 TiB")]
    Size { size: u64 },
    #[error("{id} is {has} bytes large and cannot become smaller ({wanted} bytes)")]
    Shrink { id: String, has: u64, wanted: u64 },
    /// What is to be copied does not fit the size asked for.
    #[error("{wanted} bytes are too few: what is to be on the disk has {has}")]
    TooSmall { has: u64, wanted: u64 },
    #[error(transparent)]
    File(#[from] FileError),
}
