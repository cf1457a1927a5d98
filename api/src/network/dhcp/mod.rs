//! Tells guests their addresses by DHCP.
//!
//! There is nothing to lease: a guest has one address, the one its tap was given. So whoever asks through a tap
//! is told that tap's, for good, and asking for another is refused. One socket serves all taps; which one a
//! message came through is the kernel's word, not the guest's. Messages from elsewhere, such as the host's own
//! network, are not answered.
//!
//! How many messages a guest can send in a second the packet filter limits.

mod message;

use std::io::{self, IoSlice, IoSliceMut};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn, bind,
    recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use self::message::{Asked, Offer, Reply, Request};
use super::directory::{Directory, Guest};

const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
/// Longest message that is read; a longer one is cut, and what is cut off would be options.
const MAX_MESSAGE: usize = 1500;

/// The socket, which must be made where the taps are.
///
/// # Errors
///
/// Those of socket(2) and bind(2).
pub fn bind_socket() -> io::Result<std::net::UdpSocket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    // Next to other servers of the host, which are for other links.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::Broadcast, &true)?;
    setsockopt(&fd, sockopt::Ipv4PacketInfo, &true)?;
    bind(fd.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, SERVER_PORT))?;
    Ok(fd.into())
}

/// Answers for as long as it is run.
pub async fn serve(socket: std::net::UdpSocket, directory: Directory) -> io::Result<()> {
    let socket = UdpSocket::from_std(socket)?;
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let received = socket.async_io(Interest::READABLE, || Ok(receive(&socket, &mut buffer)?)).await;
        // An error is about an answer sent before.
        if let Ok(Some((link, length))) = received
            && let message = buffer.get(..length).unwrap_or_default()
            && let Some(guest) = directory.guest(link)
            && let Some((to, answer)) = respond(message, &guest)
        {
            // A full queue loses it, as a wire may; the guest asks again.
            let _ = send(&socket, link, guest.network.gateway(), to, &answer);
        }
    }
}

/// The answer to a guest's message, and where it goes. None if there is none to give.
fn respond(message: &[u8], guest: &Guest) -> Option<(Ipv4Addr, Vec<u8>)> {
    let request = Request::parse(message)?;
    let gateway = guest.network.gateway();
    if request.server.is_some_and(|server| server != gateway) {
        // It has chosen another, which is none of ours to deny; there is no other on its link.
        return None;
    }
    let reply = match request.asked {
        Asked::Discover => Reply::Offer,
        Asked::Inform if request.current == guest.address => Reply::Ack,
        Asked::Inform => return None,
        Asked::Request => {
            let wanted = request.requested.unwrap_or(request.current);
            if wanted == guest.address { Reply::Ack } else { Reply::Nak }
        }
    };
    let offer = Offer {
        address: guest.address,
        mask: guest.network.subnet.netmask(),
        broadcast: guest.network.subnet.broadcast(),
        gateway,
        mtu: guest.network.mtu,
        domain: &guest.network.domain,
        host_name: guest.host_name.as_deref(),
    };
    // RFC 2131, section 4.1. The host knows the hardware address of the guest's address, and asks nobody; a
    // guest that uses another one gets a broadcast.
    let direct =
        request.current == guest.address || !request.wants_broadcast() && request.hardware == guest.mac.0;
    let to = if direct && reply != Reply::Nak { guest.address } else { Ipv4Addr::BROADCAST };
    Some((to, message::answer(&request, reply, &offer)))
}

/// One message: the link it came through and its length. None if the kernel does not say.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> Result<Option<(u32, usize)>, Errno> {
    let mut control = nix::cmsg_space!(libc::in_pktinfo);
    let mut pieces = [IoSliceMut::new(buffer)];
    let received =
        recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::empty())?;
    let link = received.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => u32::try_from(info.ipi_ifindex).ok(),
        _ => None,
    });
    Ok(link.map(|link| (link, received.bytes)))
}

fn send(socket: &UdpSocket, link: u32, from: Ipv4Addr, to: Ipv4Addr, bytes: &[u8]) -> io::Result<()> {
    let info = libc::in_pktinfo {
        ipi_ifindex: i32::try_from(link).map_err(|_| io::ErrorKind::InvalidInput)?,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(from).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let to = SockaddrIn::from(std::net::SocketAddrV4::new(to, CLIENT_PORT));
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    let flags = MsgFlags::MSG_DONTWAIT;
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(bytes)], &control, flags, Some(&to))?;
    Ok(())
}

#[cfg(test)]
#[path = "dhcp_tests.rs"]
mod tests;
