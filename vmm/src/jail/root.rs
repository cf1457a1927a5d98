//! Makes a directory the root of the process's own mount namespace and forgets everything else.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{chdir, fchdir, pivot_root};

use super::{JailError, c_path, os_error};

/// A copy of the jail's directory, with the mounts below it, that is attached nowhere yet. Its path is
/// looked up once, here: what happens to the path later does not matter.
pub(super) struct Root {
    tree: OwnedFd,
}

impl Root {
    /// Looks the directory up; a symbolic link to one is refused.
    pub(super) fn open(path: &Path) -> Result<Self, JailError> {
        let error = |source| JailError::Root { path: path.to_owned(), source };
        let flags = (libc::AT_RECURSIVE | libc::AT_SYMLINK_NOFOLLOW | libc::O_CLOEXEC) as libc::c_uint;
        let tree = open_tree(&c_path(path).map_err(error)?, libc::OPEN_TREE_CLONE | flags).map_err(error)?;
        let kind = fstat(&tree).map_err(|errno| error(errno.into()))?.st_mode & SFlag::S_IFMT.bits();
        if kind != SFlag::S_IFDIR.bits() {
            return Err(error(io::ErrorKind::NotADirectory.into()));
        }
        Ok(Self { tree })
    }

    /// Makes the directory the root. The process must have a mount namespace for itself already.
    pub(super) fn enter(self) -> Result<(), JailError> {
        let failed = |step| move |source| JailError::ChangeRoot { step, source };
        // Else what follows would happen in the host's namespace as well.
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(|errno| failed("make mounts private")(errno.into()))?;
        harden(&self.tree).map_err(failed("set mount attributes"))?;
        // Over "/", which every process has: nothing in the host's tree is needed to mount on.
        attach(&self.tree, c"/").map_err(failed("attach the tree"))?;
        // With both paths the same directory the old root lands on top of the new one, so that no place
        // for it is needed in the tree, and the same path takes it away again.
        fchdir(&self.tree).map_err(|errno| failed("enter the tree")(errno.into()))?;
        pivot_root(".", ".").map_err(|errno| failed("pivot_root")(errno.into()))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(|errno| failed("unmount the old root")(errno.into()))?;
        chdir("/").map_err(|errno| failed("enter the root")(errno.into()))
    }
}

/// `open_tree(2)`.
fn open_tree(path: &CStr, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: the path is a valid C string; the kernel reads nothing else.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = libc::c_int::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    if fd < 0 {
        return Err(os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Nothing in the tree may be executed or lend privileges, and no mount made outside appears in it later.
/// Device nodes do work: a drive may be a block device, and nobody in the jail can make a node.
fn harden(tree: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string, and the kernel reads no more of `attributes` than its size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(os_error()) } else { Ok(()) }
}

/// Attaches a detached tree at `target`.
fn attach(tree: &OwnedFd, target: &CStr) -> io::Result<()> {
    // SAFETY: both paths are valid C strings; the kernel reads nothing else.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result < 0 { Err(os_error()) } else { Ok(()) }
}
