//! nftables: the kernel's packet filter, which keeps microVMs' networks apart and connects them outward.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::Finding;

/// Subsystem 10 (`NFNL_SUBSYS_NFTABLES`), message 16 (`NFT_MSG_GETGEN`): asks for the rule set's generation.
const GET_GENERATION: u16 = 10 << 8 | 16;
/// `NFT_MSG_NEWGEN`, the answer.
const NEW_GENERATION: u16 = 10 << 8 | 15;
const HEADER: usize = 16;

pub fn check() -> Finding {
    judge(ask(), has_program())
}

/// Whether there is an nft(8) to run.
fn has_program() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join("nft").is_file())
}

/// Asks the kernel's packet filter a harmless question. The kernel loads its module for it if need be.
fn ask() -> Result<(), Errno> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
    let mut request = Vec::with_capacity(HEADER + 4);
    request.extend_from_slice(&(HEADER as u32 + 4).to_ne_bytes());
    request.extend_from_slice(&GET_GENERATION.to_ne_bytes());
    request.extend_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence, port
    request.extend_from_slice(&[0; 4]); // nfgenmsg: any family, version 0
    sendto(fd.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut answer = [0; 256];
    let length = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    understand(&answer[..length.min(answer.len())])
}

/// Reads a netlink answer: the generation, or an error number.
fn understand(answer: &[u8]) -> Result<(), Errno> {
    let (Some(kind), Some(error)) = (answer.get(4..6), answer.get(HEADER..HEADER + 4)) else {
        return Err(Errno::EBADMSG);
    };
    match u16::from_ne_bytes([kind[0], kind[1]]) {
        NEW_GENERATION => Ok(()),
        kind if i32::from(kind) == libc::NLMSG_ERROR => {
            let error = i32::from_ne_bytes([error[0], error[1], error[2], error[3]]);
            Err(Errno::from_raw(error.saturating_neg()))
        }
        _ => Err(Errno::EBADMSG),
    }
}

fn judge(result: Result<(), Errno>, program: bool) -> Finding {
    match result {
        Ok(()) if program => Finding::ok("nf_tables answers"),
        Ok(()) => Finding::degraded(
            "nf_tables answers, but there is no nft program: guests can have no networks",
            "Install the package nftables; on Debian its directory /usr/sbin may have to be added to PATH.",
        ),
        Err(Errno::EPERM | Errno::EACCES) => {
            Finding::missing("no permission to speak with nf_tables", "Run as root or with CAP_NET_ADMIN.")
        }
        Err(Errno::EOPNOTSUPP | Errno::EINVAL | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => {
            Finding::missing(
                "the kernel has no nf_tables, or its module is not loaded",
                "`sudo modprobe nf_tables`; if there is no such module, run a kernel with CONFIG_NF_TABLES.",
            )
        }
        Err(e) => Finding::missing(format!("nf_tables does not answer: {e}"), "`sudo modprobe nf_tables`."),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn message(kind: u16, payload: i32) -> Vec<u8> {
        let mut bytes = vec![20, 0, 0, 0];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 10]);
        bytes.extend_from_slice(&payload.to_ne_bytes());
        bytes
    }

    #[test]
    fn understands_answers() {
        assert_eq!(understand(&message(NEW_GENERATION, 0)), Ok(()));
        assert_eq!(understand(&message(2, -libc::EPERM)), Err(Errno::EPERM));
        assert_eq!(understand(&message(2, i32::MIN)), Err(Errno::UnknownErrno));
        assert_eq!(understand(&message(7, 0)), Err(Errno::EBADMSG));
        assert_eq!(understand(&[0; 7]), Err(Errno::EBADMSG));
        assert_eq!(understand(&[]), Err(Errno::EBADMSG));
    }

    #[test]
    fn each_failure_has_its_remedy() {
        assert_eq!(judge(Ok(()), true).state, State::Ok);
        let without = judge(Ok(()), false);
        assert_eq!(without.state, State::Degraded);
        assert!(without.remedy.unwrap().contains("package nftables"));
        assert!(judge(Err(Errno::EPERM), true).remedy.unwrap().contains("CAP_NET_ADMIN"));
        assert!(judge(Err(Errno::EOPNOTSUPP), true).remedy.unwrap().contains("modprobe nf_tables"));
    }
}
