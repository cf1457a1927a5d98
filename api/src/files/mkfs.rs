//! New and larger ext4 file systems, by the programs of e2fsprogs.

use std::ffi::OsStr;
use std::path::Path;

use super::{FileError, Task, Tool};

/// Makes a sparse file into an empty ext4 file system that fills it. Some 200 KiB are written: what a new
/// sparse file reads as is zeros, so neither inode tables nor journal are, and the guest's kernel has nothing to
/// initialise later either. Without a resize inode, which alone takes 4 MiB: the kernel and resize2fs grow it all
/// the same.
///
/// # Errors
///
/// `mke2fs` is missing or fails; the task is cancelled.
pub fn make_ext4(file: &Path, task: &Task) -> Result<(), FileError> {
    let options = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-i",
        "16384",
        "-m",
        "0", //
        "-O",
        "metadata_csum,metadata_csum_seed,64bit,^resize_inode", //
        "-E",
        "nodiscard,assume_storage_prezeroed=1,root_owner=0:0",
    ];
    Tool::new("mke2fs", "e2fsprogs").args(options).args([file]).run(task, |_| {}).map(drop)
}

/// Makes the ext4 file system in a file fill it, after the file was made larger. It is checked first.
///
/// # Errors
///
/// The file system is damaged, or `e2fsck` or `resize2fs` (1.47 or newer) is missing; the task is cancelled.
pub fn grow_ext4(file: &Path, task: &Task) -> Result<(), FileError> {
    // resize2fs insists on a check, unless the file system was just made and never mounted.
    // Status 1: something was put in order, such as a journal that had to be replayed.
    let check = Tool::new("e2fsck", "e2fsprogs").args([OsStr::new("-fp"), file.as_os_str()]).also_good(1);
    check.run(task, |_| {})?;
    Tool::new("resize2fs", "e2fsprogs").args([file]).run(task, |_| {}).map(drop)
}
