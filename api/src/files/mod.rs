//! Work on files that images and volumes share: written beside their place and renamed into it, copied
//! without filling holes, never onto a disk that is too full for it, and given up when asked to.
//!
//! Everything here blocks: callers on an async runtime use `spawn_blocking` and keep a [`Task`] to cancel it.

mod copy;
mod error;
mod ext4;
mod mkfs;
mod process;
mod space;
mod staged;
mod task;

pub use copy::{How, clone, open_regular, share};
pub use error::{FileError, IoContext};
pub use ext4::new_ext4_identity;
pub use mkfs::{grow_ext4, make_ext4};
pub use process::Tool;
pub use space::{available, require};
pub use staged::{Staged, Staging, remove, sync_dir};
pub use task::{Phase, Progress, Task};
