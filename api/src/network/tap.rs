//! Makes tap devices. What they are joined to is [`super::route`]'s and the firewall's matter.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

const TUN: &str = "/dev/net/tun";

nix::ioctl_write_int!(set_interface, b'T', 202);
nix::ioctl_write_int!(set_persistent, b'T', 203);
nix::ioctl_write_int!(set_owner, b'T', 204);

/// Makes the tap `name`, for frames with virtio-net headers, that stays until it is deleted and that only
/// `owner` (and who may administer the network) can attach to.
///
/// # Errors
///
/// `EEXIST` if something has the name, and what open(2) and the tap driver say.
pub fn create(name: &str, owner: u32) -> io::Result<()> {
    let tun = OpenOptions::new().read(true).write(true).open(TUN)?;
    // SAFETY: all bytes zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays NUL.
    let place = &mut request.ifr_name[..libc::IFNAMSIZ - 1];
    if name.len() > place.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in place.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // With IFF_TUN_EXCL an existing one is not attached to instead.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let tap = tun.as_raw_fd();
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives across the calls; the others take numbers.
    // Until it is persistent the tap vanishes with `tun`, so a failure leaves nothing.
    unsafe {
        set_interface(tap, std::ptr::from_mut(&mut request) as libc::c_ulong).map_err(
            |errno| match errno {
                // The driver's answer to a name that is taken, if it is not a tap's.
                nix::errno::Errno::EBUSY | nix::errno::Errno::EINVAL => nix::errno::Errno::EEXIST,
                other => other,
            },
        )?;
        set_owner(tap, owner.into())?;
        set_persistent(tap, 1)?;
    }
    Ok(())
}
