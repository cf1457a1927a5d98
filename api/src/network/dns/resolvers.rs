//! The host's own name servers, by `/etc/resolv.conf` (resolv.conf(5)).

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// As many as the C library asks.
const MAX_SERVERS: usize = 3;
/// How often the file is looked at.
const INTERVAL: Duration = Duration::from_secs(5);

/// The servers, read again when the file changes.
#[derive(Clone, Debug)]
pub struct Resolvers(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    path: PathBuf,
    servers: Arc<[SocketAddr]>,
    changed: Option<SystemTime>,
    looked: Option<Instant>,
}

impl Resolvers {
    /// Those that `path` names.
    pub fn new(path: PathBuf) -> Self {
        Self(Arc::new(Mutex::new(State { path, servers: Arc::new([]), changed: None, looked: None })))
    }

    /// The servers, in the order in which to ask them.
    pub fn servers(&self) -> Arc<[SocketAddr]> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.is_none_or(|looked| looked.elapsed() >= INTERVAL) {
            state.looked = Some(Instant::now());
            // If it cannot be read now, as while it is being replaced, what was read last is the best guess.
            if let Ok(changed) = fs::metadata(&state.path).and_then(|meta| meta.modified())
                && state.changed != Some(changed)
                && let Ok(text) = fs::read_to_string(&state.path)
            {
                state.servers = parse(&text).into();
                state.changed = Some(changed);
            }
        }
        state.servers.clone()
    }
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and_then(|_| words.next())?;
        // A link-local address may name its link.
        let address = match address.split_once('%') {
            None => address.parse::<IpAddr>().ok()?,
            Some(_) => return address_with_link(address),
        };
        Some(SocketAddr::new(address, 53))
    };
    text.lines().filter_map(server).take(MAX_SERVERS).collect()
}

fn address_with_link(text: &str) -> Option<SocketAddr> {
    let (address, link) = text.split_once('%')?;
    let scope = match link.parse() {
        Ok(index) => index,
        Err(_) => nix::net::if_::if_nametoindex(link).ok()?,
    };
    Some(std::net::SocketAddrV6::new(address.parse().ok()?, 53, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_found_among_other_lines() {
        let text = "# nameserver 1.1.1.1\ndomain example\nnameserver 10.0.0.2 # first\n  nameserver\t::1\n\
                    nameserver nonsense\nnameserver\nnameserver fe80::1%1\nnameserver 10.0.0.4\n";
        let servers: Vec<_> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.0.0.2:53", "[::1]:53", "[fe80::1%1]:53"]);
    }

    #[test]
    fn a_file_that_is_gone_leaves_what_was_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "nameserver 10.0.0.2").unwrap();
        let resolvers = Resolvers::new(path.clone());
        assert_eq!(resolvers.servers().len(), 1);
        fs::remove_file(&path).unwrap();
        resolvers.0.lock().unwrap().looked = None;
        assert_eq!(resolvers.servers().len(), 1);
        fs::write(&path, "nameserver 10.0.0.2\nnameserver 10.0.0.3").unwrap();
        resolvers.0.lock().unwrap().looked = None;
        assert_eq!(resolvers.servers().len(), 2);
    }
}
