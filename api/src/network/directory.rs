//! Who is where: what DHCP and DNS answer from. Attaching and detaching change it; the servers only read.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pulau_vmm::config::MacAddr;

use super::definition::{Attachment, NetworkDef};

/// A guest, with all of its network that it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    pub mac: MacAddr,
    pub address: Ipv4Addr,
    pub host_name: Option<String>,
    pub network: Arc<NetworkDef>,
}

/// The names of one network.
#[derive(Clone, Debug)]
pub struct Names {
    pub network: Arc<NetworkDef>,
    /// By a single label in lower case, in the order in which they came.
    addresses: HashMap<String, Vec<Ipv4Addr>>,
    /// The first name of each address.
    names: HashMap<Ipv4Addr, String>,
}

impl Names {
    /// The addresses of a name, which is a single label in lower case.
    pub fn addresses(&self, name: &str) -> Option<&[Ipv4Addr]> {
        self.addresses.get(name).map(Vec::as_slice)
    }

    /// The first name of an address.
    pub fn name(&self, address: Ipv4Addr) -> Option<&str> {
        self.names.get(&address).map(String::as_str)
    }
}

#[derive(Debug, Default)]
struct Tables {
    /// By the index of the tap.
    guests: HashMap<u32, Guest>,
    networks: HashMap<String, Names>,
}

/// See the module's text.
#[derive(Clone, Debug, Default)]
pub struct Directory(Arc<RwLock<Tables>>);

impl Directory {
    /// The guest behind a link.
    pub fn guest(&self, link: u32) -> Option<Guest> {
        self.read().guests.get(&link).cloned()
    }

    /// Lets `look` see the names of a network.
    pub fn names<T>(&self, network: &str, look: impl FnOnce(&Names) -> T) -> Option<T> {
        self.read().networks.get(network).map(look)
    }

    pub fn set_network(&self, network: &NetworkDef) {
        let network = Arc::new(network.clone());
        let mut tables = self.write();
        for guest in tables.guests.values_mut().filter(|guest| guest.network.id == network.id) {
            guest.network = network.clone();
        }
        let names = tables.networks.entry(network.id.clone()).or_insert_with(|| Names {
            network: network.clone(),
            addresses: HashMap::new(),
            names: HashMap::new(),
        });
        names.network = network;
    }

    pub fn remove_network(&self, id: &str) {
        self.write().networks.remove(id);
    }

    /// Puts a guest in. Its network must be there.
    pub fn attach(&self, link: u32, attachment: &Attachment) {
        let mut tables = self.write();
        let Some(names) = tables.networks.get_mut(&attachment.network) else { return };
        for name in &attachment.names {
            let addresses = names.addresses.entry(name.clone()).or_default();
            if !addresses.contains(&attachment.address) {
                addresses.push(attachment.address);
            }
        }
        if let Some(first) = attachment.names.first() {
            names.names.insert(attachment.address, first.clone());
        }
        let guest = Guest {
            mac: attachment.mac,
            address: attachment.address,
            host_name: attachment.names.first().cloned(),
            network: names.network.clone(),
        };
        tables.guests.insert(link, guest);
    }

    /// Takes a guest out.
    pub fn detach(&self, attachment: &Attachment) {
        let mut tables = self.write();
        tables.guests.retain(|_, guest| guest.address != attachment.address);
        let Some(names) = tables.networks.get_mut(&attachment.network) else { return };
        names.names.remove(&attachment.address);
        for name in &attachment.names {
            if let Some(addresses) = names.addresses.get_mut(name) {
                addresses.retain(|address| *address != attachment.address);
                if addresses.is_empty() {
                    names.addresses.remove(name);
                }
            }
        }
    }

    /// Forgets everybody.
    pub fn clear(&self) {
        *self.write() = Tables::default();
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}
