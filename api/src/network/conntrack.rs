//! Forgets connections of addresses that are nobody's any more, so that who gets an address next does not
//! inherit what its former owner was allowed: packets of known connections pass all groups.
//!
//! The kernel looks through its whole table for them, which takes tens of milliseconds however few there are. So
//! it is done a little later for all addresses that were given back meanwhile, by whoever calls
//! [`Forgetting::catch_up`], and at once only if an address is wanted again before that.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::socket::SockProtocol;

use super::netlink::{self, Message, Socket, attribute};

/// `NFNL_SUBSYS_CTNETLINK`, and from linux/netfilter/nfnetlink_conntrack.h its messages and attributes.
const NEW: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const SUBSYSTEM: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
/// `CTA_FILTER_FLAG(CTA_IP_SRC)`: compare nothing of the tuple but the source.
const SOURCE: u32 = 1;
const IPV4: [u8; 4] = [libc::AF_INET as u8, 0, 0, 0];
const NESTED: u16 = libc::NLA_F_NESTED as u16;

/// Up to as many addresses the kernel is asked for one by one; for more, to tell of all there is.
const FEW: usize = 3;

/// Addresses whose connections are still to be forgotten.
#[derive(Debug)]
pub struct Forgetting {
    /// Whoever has it is looking through the table.
    conntrack: Mutex<Conntrack>,
    pending: Mutex<BTreeSet<Ipv4Addr>>,
}

impl Forgetting {
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn new() -> io::Result<Self> {
        let conntrack = Conntrack(Socket::open(SockProtocol::NetlinkNetFilter)?);
        Ok(Self { conntrack: Mutex::new(conntrack), pending: Mutex::default() })
    }

    /// Notes that an address was given back.
    pub fn later(&self, address: Ipv4Addr) {
        lock(&self.pending).insert(address);
    }

    /// Makes sure that nothing is known of an address that is to be given away.
    ///
    /// # Errors
    ///
    /// The kernel's; it must be Linux 5.8 or later and have `nf_conntrack_netlink`.
    pub fn now(&self, address: Ipv4Addr) -> io::Result<()> {
        if !lock(&self.pending).contains(&address) {
            return Ok(());
        }
        let mut conntrack = lock(&self.conntrack);
        // Perhaps who had it just did this one as well.
        if lock(&self.pending).contains(&address) {
            conntrack.forget(address)?;
            lock(&self.pending).remove(&address);
        }
        Ok(())
    }

    /// Forgets all that was put off.
    ///
    /// # Errors
    ///
    /// As [`Forgetting::now`]; what was not done is still put off.
    pub fn catch_up(&self) -> io::Result<()> {
        let mut conntrack = lock(&self.conntrack);
        let pending = lock(&self.pending).clone();
        if pending.len() <= FEW {
            pending.iter().try_for_each(|address| conntrack.forget(*address))?;
        } else {
            conntrack.forget_where(|address| pending.contains(&address))?;
        }
        lock(&self.pending).retain(|address| !pending.contains(address));
        Ok(())
    }

    /// Forgets all connections of which an end fits.
    ///
    /// # Errors
    ///
    /// As [`Forgetting::now`].
    pub fn all_where(&self, stale: impl Fn(Ipv4Addr) -> bool) -> io::Result<()> {
        lock(&self.conntrack).forget_where(stale)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection to the kernel's table of connections.
#[derive(Debug)]
struct Conntrack(Socket);

/// A connection: what is needed to name it.
struct Entry {
    tuple: Vec<u8>,
    zone: Option<Vec<u8>>,
    /// Who began it, and whom the answers come from.
    ends: [Option<Ipv4Addr>; 2],
}

impl Conntrack {
    /// Forgets all connections of an address.
    fn forget(&mut self, address: Ipv4Addr) -> io::Result<()> {
        let flags = [
            (CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS),
            (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS, CTA_FILTER_ORIG_FLAGS),
        ];
        for (tuple, compared, not_compared) in flags {
            let message = Message::new(GET, 0, &IPV4)
                .nested(CTA_FILTER, |filter| {
                    filter.attribute(compared, &SOURCE.to_ne_bytes());
                    filter.attribute(not_compared, &0_u32.to_ne_bytes());
                })
                .nested(tuple, |tuple| {
                    tuple.nested(CTA_TUPLE_IP, |ip| ip.attribute(CTA_IP_V4_SRC, &address.octets()));
                });
            for entry in self.0.dump(&message, parse)? {
                self.delete(entry)?;
            }
        }
        Ok(())
    }

    /// Forgets all connections of which an end fits.
    fn forget_where(&mut self, stale: impl Fn(Ipv4Addr) -> bool) -> io::Result<()> {
        for entry in self.0.dump(&Message::new(GET, 0, &IPV4), parse)? {
            if entry.ends.into_iter().flatten().any(&stale) {
                self.delete(entry)?;
            }
        }
        Ok(())
    }

    fn delete(&mut self, entry: Entry) -> io::Result<()> {
        let mut message = Message::new(DELETE, 0, &IPV4).attribute(CTA_TUPLE_ORIG | NESTED, &entry.tuple);
        if let Some(zone) = entry.zone {
            message = message.attribute(CTA_ZONE, &zone);
        }
        match self.0.request(message) {
            // It has ended by itself.
            Err(e) if netlink::errno(&e) == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }
}

fn parse(kind: u16, body: &[u8]) -> Option<Entry> {
    let attributes = body.get(4..).filter(|_| kind == NEW)?;
    let tuple = attribute(attributes, CTA_TUPLE_ORIG)?;
    let source = |tuple: &[u8]| {
        let address = attribute(attribute(tuple, CTA_TUPLE_IP)?, CTA_IP_V4_SRC)?;
        <[u8; 4]>::try_from(address).ok().map(Ipv4Addr::from)
    };
    Some(Entry {
        tuple: tuple.to_owned(),
        zone: attribute(attributes, CTA_ZONE).map(<[u8]>::to_owned),
        ends: [source(tuple), attribute(attributes, CTA_TUPLE_REPLY).and_then(source)],
    })
}
