//! A tap device of the host: whole Ethernet frames by `readv` and `writev`, each behind a virtio-net
//! header, so that checksums and segmentation are left to whoever can do them best.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::{c_uint, c_ulong};

use crate::jail;
use crate::virtio::buffers::GuestBuffers;

/// Bytes of the header before every frame (`virtio_net_hdr_v1`).
pub const HEADER_SIZE: usize = 12;

// From linux/if_tun.h.
const TUNSETIFF: c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: c_ulong = 0x4004_54d8;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

/// What frames read from a tap may leave to their reader (`TUN_F_*`).
pub mod offload {
    use libc::c_uint;

    /// Checksums may be missing.
    pub const CSUM: c_uint = 0x01;
    /// TCP over IPv4 may come unsegmented.
    pub const TSO4: c_uint = 0x02;
    /// TCP over IPv6 may come unsegmented.
    pub const TSO6: c_uint = 0x04;
    /// Also when it carries ECN marks.
    pub const TSO_ECN: c_uint = 0x08;
    /// UDP over IPv4 may come unsegmented (Linux 6.2).
    pub const USO4: c_uint = 0x20;
    /// UDP over IPv6 may come unsegmented (Linux 6.2).
    pub const USO6: c_uint = 0x40;
}

/// Why a tap could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface has this name. It is not created: addresses and routes would be missing.
    #[error("there is no interface {0} on this host; create it first (ip tuntap add mode tap)")]
    Missing(String),
    /// The tap driver is not there or not allowed.
    #[error("cannot open /dev/net/tun: {0}")]
    Driver(#[source] io::Error),
    /// The interface cannot be attached to.
    #[error("cannot attach to {name}{}: {source}", hint(.source))]
    Attach {
        /// The interface.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// The tap cannot do what is needed.
    #[error("{name} cannot {what}: {source}")]
    Setup {
        /// The interface.
        name: String,
        /// What it cannot do.
        what: &'static str,
        /// The host's answer.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => " (another process uses it)",
        Some(libc::EPERM) => " (it belongs to another user)",
        Some(libc::EINVAL) => " (it is no tap device, or has several queues)",
        _ => "",
    }
}

/// A tap device, attached.
pub struct Tap {
    file: File,
    /// No tap, see [`Tap::from_socket`].
    stand_in: bool,
}

#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

/// Attaches to the interface `name`, which must exist in the network namespace of this process.
pub fn attach(name: &str) -> Result<File, TapError> {
    let mut request =
        Request { name: [0; libc::IFNAMSIZ], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
    // The last byte stays NUL.
    let place = request.name.get_mut(..name.len()).filter(|p| p.len() < libc::IFNAMSIZ);
    let place = place.ok_or_else(|| TapError::Missing(name.to_owned()))?;
    place.copy_from_slice(name.as_bytes());
    // SAFETY: the name is a NUL-terminated string that lives through the call.
    if unsafe { libc::if_nametoindex(request.name.as_ptr().cast()) } == 0 {
        return Err(TapError::Missing(name.to_owned()));
    }
    let file = jail::devices::tun().map_err(TapError::Driver)?;
    // SAFETY: the request has the layout of `struct ifreq`, which TUNSETIFF reads and writes.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        let source = io::Error::last_os_error();
        return Err(TapError::Attach { name: name.to_owned(), source });
    }
    Ok(file)
}

impl Tap {
    /// Attaches to the interface `name`, which must exist, unless the jail did so already.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let file = match jail::devices::attached_tap(name) {
            Some(attached) => attached.map_err(TapError::Driver)?,
            None => attach(name)?,
        };
        let tap = Self { file, stand_in: false };
        let setup = |what| move |source| TapError::Setup { name: name.to_owned(), what, source };
        let mut size = HEADER_SIZE as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        unsafe { tap.ioctl(TUNSETVNETHDRSZ, &mut size) }.map_err(setup("prefix frames with headers"))?;
        tap.set_offload(0).map_err(setup("turn offloads off"))?;
        Ok(tap)
    }

    /// A stand-in for tests and fuzzing: a non-blocking socket of packets, each a frame with its header.
    /// There are no offloads.
    pub fn from_socket(socket: OwnedFd) -> Self {
        Self { file: File::from(socket), stand_in: true }
    }

    /// # Safety
    /// `argument` must be what `request` expects.
    unsafe fn ioctl<T>(&self, request: c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: the descriptor is open; the caller vouches for the rest.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sets what frames read from now on may leave undone, see [`offload`].
    pub fn set_offload(&self, flags: c_uint) -> io::Result<()> {
        if self.stand_in {
            return Ok(());
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(flags)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Whether the host's kernel can leave UDP unsegmented. Changes the offloads.
    pub fn can_segment_udp(&self) -> bool {
        use offload::{CSUM, USO4, USO6};
        self.set_offload(CSUM | USO4 | USO6).is_ok()
    }

    /// Reads one frame, with its header, into `to`. What does not fit is lost.
    pub fn read(&self, to: &GuestBuffers) -> io::Result<usize> {
        let pieces = to.pieces();
        // SAFETY: every piece is guest memory, writable and kept alive by `to`; their number is bounded by
        // MAX_PIECES.
        let count = unsafe { libc::readv(self.file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Writes one frame, with its header.
    pub fn write(&self, from: &GuestBuffers) -> io::Result<usize> {
        let pieces = from.pieces();
        // SAFETY: as in `read`; the pieces are only read.
        let count = unsafe { libc::writev(self.file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
