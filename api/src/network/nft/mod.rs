//! The host's packet filter. The rule set is written by nft(8) as a whole, when the daemon starts and when
//! networks or groups change; guests and published ports come and go as elements of its sets and maps, by
//! netlink messages of our own. Either way a change is one transaction: packets meet the old rules or the new.

mod element;
mod ruleset;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use nix::sys::socket::SockProtocol;

pub use element::{Element, of_attachment, of_published};
pub use ruleset::whole;

use super::netlink::{self, ACK, Message, Socket};

/// From linux/netfilter/nfnetlink.h.
const NFNL_MSG_BATCH_BEGIN: u16 = libc::NFNL_MSG_BATCH_BEGIN as u16;
const NFNL_MSG_BATCH_END: u16 = libc::NFNL_MSG_BATCH_END as u16;
/// From linux/netfilter/nf_tables.h.
const GET_TABLE: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8 | libc::NFT_MSG_GETTABLE as u16;
const NFTA_TABLE_NAME: u16 = 1;

/// The packet filter could not be changed. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("cannot run nft: {0}; install the package nftables")]
    Run(#[source] io::Error),
    #[error("nft refuses the rules: {0}")]
    Refused(String),
    #[error("nf_tables refuses a change: {0}")]
    Kernel(#[from] io::Error),
}

/// A connection to the packet filter, with the names of the tables that are ours.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
    table: String,
}

impl Nft {
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn open(table: &str) -> Result<Self, NftError> {
        Ok(Self { socket: Socket::open(SockProtocol::NetlinkNetFilter)?, table: table.to_owned() })
    }

    /// Takes elements out and puts others in, in one transaction.
    ///
    /// # Errors
    ///
    /// Something that was to be taken out was not there, or something else is in the way.
    pub fn change(&mut self, out: &BTreeSet<Element>, into: &BTreeSet<Element>) -> Result<(), NftError> {
        let table = &self.table;
        let mut messages: Vec<_> = out.difference(into).map(|element| element.deleting(table)).collect();
        messages.extend(into.difference(out).map(|element| element.adding(table)));
        let Some(last) = messages.pop() else { return Ok(()) };
        messages.push(last.with_flags(ACK));
        // struct nfgenmsg, whose resource is the subsystem that the batch is for.
        let about = [0, 0, 0, libc::NFNL_SUBSYS_NFTABLES as u8];
        messages.insert(0, Message::new(NFNL_MSG_BATCH_BEGIN, 0, &about));
        messages.push(Message::new(NFNL_MSG_BATCH_END, 0, &about));
        Ok(self.socket.transact(messages)?)
    }

    /// Has nft(8) carry out `commands` in one transaction.
    ///
    /// # Errors
    ///
    /// There is no such program, or it refuses.
    pub fn run(&self, commands: &str) -> Result<(), NftError> {
        let mut nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(NftError::Run)?;
        // It reads all before it writes anything. If it cannot, its own words say why.
        let written = nft.stdin.take().map_or(Ok(()), |mut input| input.write_all(commands.as_bytes()));
        let output = nft.wait_with_output().map_err(NftError::Run)?;
        if output.status.success() {
            return written.map_err(NftError::Run);
        }
        let words = String::from_utf8_lossy(&output.stderr);
        // Each problem is a line, followed by the place in the text.
        Err(NftError::Refused(words.lines().next().unwrap_or("it does not say why").to_owned()))
    }

    /// Whether the tables are there.
    ///
    /// # Errors
    ///
    /// Those of the kernel.
    pub fn is_there(&mut self) -> Result<bool, NftError> {
        for family in [libc::NFPROTO_INET as u8, libc::NFPROTO_ARP as u8] {
            let ask = Message::new(GET_TABLE, 0, &[family, 0, 0, 0]).text(NFTA_TABLE_NAME, &self.table);
            match self.socket.request(ask) {
                Err(e) if netlink::errno(&e) == Some(libc::ENOENT) => return Ok(false),
                other => other?,
            }
        }
        Ok(true)
    }

    /// Deletes the tables, if they are there.
    ///
    /// # Errors
    ///
    /// As [`Nft::run`].
    pub fn delete(&self) -> Result<(), NftError> {
        let table = &self.table;
        self.run(&format!(
            "table inet {table}\ndelete table inet {table}\ntable arp {table}\ndelete table arp {table}\n"
        ))
    }
}

#[cfg(test)]
#[path = "nft_tests.rs"]
mod tests;
