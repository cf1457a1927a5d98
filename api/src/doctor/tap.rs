//! Tap devices: a microVM's network card is the other end of one.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::Finding;

const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_int!(tun_set_interface, b'T', 202);

/// Makes a tap device of a name the kernel chooses, which is gone again when the file is closed.
pub fn check() -> Finding {
    let tun = match File::options().read(true).write(true).open(DEVICE) {
        Ok(tun) => tun,
        Err(e) => return judge("open", Err(Errno::from_raw(e.raw_os_error().unwrap_or(0)))),
    };
    // SAFETY: all bytes zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"pulauchk%d") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives across the call.
    let made =
        unsafe { tun_set_interface(tun.as_raw_fd(), std::ptr::from_mut(&mut request) as libc::c_ulong) };
    judge("make a tap device", made.map(|_| ()))
}

fn judge(step: &str, result: Result<(), Errno>) -> Finding {
    match result {
        Ok(()) => Finding::ok("tap devices can be made"),
        Err(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => Finding::missing(
            format!("{DEVICE} does not exist"),
            "Load the module: `sudo modprobe tun`. In a container, pass the device in (`--device /dev/net/tun`).",
        ),
        Err(Errno::EPERM | Errno::EACCES) => Finding::missing(
            format!("no permission to {step} through {DEVICE}"),
            "Run as root or with CAP_NET_ADMIN.",
        ),
        Err(e) => Finding::missing(
            format!("cannot {step} through {DEVICE}: {e}"),
            "Run a kernel with CONFIG_TUN; every distribution's has it.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn each_failure_has_its_remedy() {
        assert_eq!(judge("open", Ok(())).state, State::Ok);
        assert!(judge("open", Err(Errno::ENOENT)).remedy.unwrap().contains("modprobe tun"));
        assert!(judge("make", Err(Errno::EPERM)).remedy.unwrap().contains("CAP_NET_ADMIN"));
        assert!(judge("make", Err(Errno::EINVAL)).remedy.unwrap().contains("CONFIG_TUN"));
    }
}
