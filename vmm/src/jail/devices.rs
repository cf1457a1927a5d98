//! The host's devices, for code that may run in the jail, where `/dev` does not exist.
//!
//! `/dev/kvm` is opened once and kept. A tap needs `/dev/net/tun` opened anew for each of its queues, when
//! the API's client says so, by a user that may have no permission to. So a node for it is made, in a file
//! system in memory that holds nothing else, is attached nowhere (`fsmount(2)`), has nothing above it, and
//! vanishes with the only descriptor of it. The jail's tree needs no device nodes, and nobody has to make
//! or remove them.
//!
//! Taps that are named beforehand are attached beforehand, where they are, and kept: the process may then go
//! where there are none, and gets no node to attach others with.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, mknodat, stat};
use nix::unistd::{Gid, Uid, fchownat};

use super::{JailError, os_error};
use crate::virtio::net::tap;

const KVM: &str = "/dev/kvm";
const TUN: &str = "/dev/net/tun";

/// Set once the process is in the jail.
static JAILED: OnceLock<Opened> = OnceLock::new();

/// Opens `/dev/kvm` for reading and writing.
pub fn kvm() -> io::Result<File> {
    match JAILED.get() {
        Some(opened) => Ok(opened.kvm.try_clone()?.into()),
        None => OpenOptions::new().read(true).write(true).open(KVM),
    }
}

/// Opens `/dev/net/tun` for reading and writing, without blocking.
pub fn tun() -> io::Result<File> {
    const FLAGS: libc::c_int = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let opened = match JAILED.get() {
        Some(Opened { net: Some(net), .. }) => {
            // SAFETY: the descriptor is valid and the path a constant C string.
            unsafe { libc::openat(net.as_raw_fd(), c"tun".as_ptr(), FLAGS) }
        }
        Some(Opened { net: None, .. }) => return Err(io::ErrorKind::NotFound.into()),
        // SAFETY: the path is a constant C string.
        None => unsafe { libc::open(c"/dev/net/tun".as_ptr(), FLAGS) },
    };
    if opened < 0 {
        return Err(os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { File::from_raw_fd(opened) })
}

/// A tap that was attached before the process went to jail. None if this one was not.
pub fn attached_tap(name: &str) -> Option<io::Result<File>> {
    let (_, tap) = JAILED.get()?.taps.iter().find(|(attached, _)| attached == name)?;
    Some(tap.try_clone())
}

/// Devices opened before the jail closes behind the process.
pub(super) struct Opened {
    kvm: OwnedFd,
    /// The directory with `tun` in it. None if the host has none, or it is not needed.
    net: Option<OwnedFd>,
    /// That node, by `O_PATH`.
    tun: Option<OwnedFd>,
    /// Taps attached beforehand.
    taps: Vec<(String, File)>,
}

impl Opened {
    /// Opens what there is, for the user that the process will be, and attaches `taps`.
    pub(super) fn open(uid: u32, gid: u32, taps: &[String]) -> Result<Self, JailError> {
        let kvm = OpenOptions::new()
            .read(true)
            .write(true)
            .open(KVM)
            .map_err(|source| JailError::Device { path: KVM, source })?
            .into();
        let taps = taps.iter().map(|name| Ok((name.clone(), tap::attach(name)?)));
        let taps = taps.collect::<Result<Vec<_>, JailError>>()?;
        let failed = |source| JailError::Device { path: TUN, source };
        let number = match stat(TUN) {
            Ok(stat) if taps.is_empty() => stat.st_rdev,
            Ok(_) | Err(Errno::ENOENT) => return Ok(Self { kvm, net: None, tun: None, taps }),
            Err(errno) => return Err(failed(errno.into())),
        };
        let (net, tun) = node(number, uid, gid).map_err(failed)?;
        Ok(Self { kvm, net: Some(net), tun: Some(tun), taps })
    }

    /// The node of `tun`, as something to name in a rule.
    pub(super) fn tun(&self) -> Option<BorrowedFd<'_>> {
        self.tun.as_ref().map(AsFd::as_fd)
    }

    /// From here on, [`kvm`] and [`tun`] use what was opened.
    pub(super) fn keep(mut self) {
        self.tun = None;
        // `enter` is called once; a second time could not have opened anything.
        let _ = JAILED.set(self);
    }
}

/// A directory that holds nothing but a device node `tun`, and the node.
fn node(number: libc::dev_t, uid: u32, gid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let directory = memory_file_system()?;
    mknodat(&directory, "tun", SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, number)?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    fchownat(&directory, "tun", Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let node = openat(&directory, "tun", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    Ok((directory, node))
}

/// The root of a new tmpfs, attached nowhere. Only root can change what is in it.
fn memory_file_system() -> io::Result<OwnedFd> {
    let descriptor = |result: libc::c_long| {
        let fd = libc::c_int::try_from(result).map_err(|_| io::ErrorKind::InvalidData)?;
        // SAFETY: the kernel just gave us this descriptor, if it is one.
        if fd < 0 { Err(os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
    };
    // SAFETY: the name is a constant C string.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), libc::FSOPEN_CLOEXEC) };
    let context = descriptor(context)?;
    let configure = |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: key and value are constant C strings, or null where the command takes none.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
        if result < 0 { Err(os_error()) } else { Ok(()) }
    };
    configure(libc::FSCONFIG_SET_STRING, c"mode".as_ptr(), c"0555".as_ptr())?;
    configure(libc::FSCONFIG_CMD_CREATE, std::ptr::null(), std::ptr::null())?;
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let (context, flags) = (context.as_raw_fd(), libc::FSMOUNT_CLOEXEC);
    // SAFETY: takes numbers only.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context, flags, attributes) })
}
