//! Which addresses of a subnet are whose.
//!
//! As in a VPC's subnet, the first four and the last are nobody's: the subnet's own, the gateway, two
//! reserved, and the broadcast address.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// Sizes of a subnet, as in a VPC.
const PREFIXES: std::ops::RangeInclusive<u8> = 16..=28;
const RESERVED_FIRST: u32 = 4;
const RESERVED_LAST: u32 = 1;

/// An address that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("{subnet} has no address left")]
    Exhausted { subnet: Ipv4Net },
    #[error("{address} is not in {subnet}")]
    Outside { address: Ipv4Addr, subnet: Ipv4Net },
    #[error("{address} is reserved: the first four and the last of {subnet} are")]
    Reserved { address: Ipv4Addr, subnet: Ipv4Net },
    #[error("{address} is in use")]
    Taken { address: Ipv4Addr },
    #[error("{subnet} is not a subnet of /{} to /{}", PREFIXES.start(), PREFIXES.end())]
    Size { subnet: Ipv4Net },
    #[error("{subnet} has bits beyond its prefix; {} was meant", subnet.trunc())]
    Bits { subnet: Ipv4Net },
    #[error(
        "{subnet} is not for guests: it must be within 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16 or 100.64.0.0/10"
    )]
    Public { subnet: Ipv4Net },
    #[error("{subnet} overlaps {other}")]
    Overlap { subnet: Ipv4Net, other: Ipv4Net },
}

/// The addresses that may be given away.
fn assignable(subnet: Ipv4Net) -> std::ops::RangeInclusive<u32> {
    let first = u32::from(subnet.network()).saturating_add(RESERVED_FIRST);
    first..=u32::from(subnet.broadcast()).saturating_sub(RESERVED_LAST)
}

/// How many addresses a subnet has to give.
pub fn capacity(subnet: Ipv4Net) -> u32 {
    let range = assignable(subnet);
    range.end().saturating_add(1).saturating_sub(*range.start())
}

/// The host's address in the subnet.
pub fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).saturating_add(1))
}

/// The addresses that are free, lowest first.
pub fn free(subnet: Ipv4Net, used: &BTreeSet<Ipv4Addr>) -> impl Iterator<Item = Ipv4Addr> {
    assignable(subnet).map(Ipv4Addr::from).filter(|address| !used.contains(address))
}

/// The lowest address that is free.
///
/// # Errors
///
/// [`AddressError::Exhausted`].
pub fn allocate(subnet: Ipv4Net, used: &BTreeSet<Ipv4Addr>) -> Result<Ipv4Addr, AddressError> {
    free(subnet, used).next().ok_or(AddressError::Exhausted { subnet })
}

/// Whether a certain address may be given away.
///
/// # Errors
///
/// [`AddressError::Outside`], [`AddressError::Reserved`].
pub fn check(subnet: Ipv4Net, address: Ipv4Addr) -> Result<(), AddressError> {
    if !subnet.contains(&address) {
        Err(AddressError::Outside { address, subnet })
    } else if !assignable(subnet).contains(&u32::from(address)) {
        Err(AddressError::Reserved { address, subnet })
    } else {
        Ok(())
    }
}

/// The same, and nobody has it.
///
/// # Errors
///
/// Those, and [`AddressError::Taken`].
pub fn claim(subnet: Ipv4Net, used: &BTreeSet<Ipv4Addr>, address: Ipv4Addr) -> Result<(), AddressError> {
    check(subnet, address)?;
    if used.contains(&address) { Err(AddressError::Taken { address }) } else { Ok(()) }
}

/// Whether a subnet can be a network's: of private addresses (RFC 1918, RFC 6598), and of a fit size.
///
/// # Errors
///
/// [`AddressError::Size`], [`AddressError::Bits`], [`AddressError::Public`].
pub fn check_subnet(subnet: Ipv4Net) -> Result<(), AddressError> {
    const PRIVATE: [(Ipv4Addr, u8); 4] = [
        (Ipv4Addr::new(10, 0, 0, 0), 8),
        (Ipv4Addr::new(172, 16, 0, 0), 12),
        (Ipv4Addr::new(192, 168, 0, 0), 16),
        (Ipv4Addr::new(100, 64, 0, 0), 10),
    ];
    if !PREFIXES.contains(&subnet.prefix_len()) {
        return Err(AddressError::Size { subnet });
    }
    if subnet.trunc() != subnet {
        return Err(AddressError::Bits { subnet });
    }
    let within = |(address, prefix)| Ipv4Net::new(address, prefix).is_ok_and(|net| net.contains(&subnet));
    if PRIVATE.into_iter().any(within) { Ok(()) } else { Err(AddressError::Public { subnet }) }
}

/// Whether a subnet shares no address with others.
///
/// # Errors
///
/// [`AddressError::Overlap`].
pub fn check_apart(subnet: Ipv4Net, others: impl IntoIterator<Item = Ipv4Net>) -> Result<(), AddressError> {
    let overlap = |other: &Ipv4Net| subnet.contains(other) || other.contains(&subnet);
    match others.into_iter().find(overlap) {
        Some(other) => Err(AddressError::Overlap { subnet, other }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn set(addresses: &[&str]) -> BTreeSet<Ipv4Addr> {
        addresses.iter().map(|a| a.parse().unwrap()).collect()
    }

    #[test]
    fn the_lowest_free_address_is_given() {
        let subnet = net("10.0.0.0/28");
        let allocate = |used: &[&str]| allocate(subnet, &set(used)).map(|a| a.octets()[3]);
        assert_eq!(allocate(&[]), Ok(4));
        assert_eq!(allocate(&["10.0.0.4", "10.0.0.5"]), Ok(6));
        assert_eq!(allocate(&["10.0.0.5", "10.0.0.14"]), Ok(4));
        assert_eq!(allocate(&["10.0.0.4", "10.0.0.6"]), Ok(5));
        // What is used elsewhere does not matter, nor what is reserved.
        assert_eq!(allocate(&["9.0.0.4", "10.0.0.1", "10.0.0.15", "10.0.1.4"]), Ok(4));
    }

    #[test]
    fn all_are_given_once_and_then_none() {
        let subnet = net("192.168.7.0/24");
        let mut used = BTreeSet::new();
        for _ in 0..capacity(subnet) {
            let address = allocate(subnet, &used).unwrap();
            claim(subnet, &used, address).unwrap();
            assert!(used.insert(address));
            assert_eq!(claim(subnet, &used, address), Err(AddressError::Taken { address }));
        }
        assert_eq!(used.len(), 251);
        assert_eq!(allocate(subnet, &used), Err(AddressError::Exhausted { subnet }));
        used.remove(&"192.168.7.100".parse().unwrap());
        assert_eq!(allocate(subnet, &used), Ok("192.168.7.100".parse().unwrap()));
    }

    #[test]
    fn reserved_addresses_and_those_of_others_are_refused() {
        let subnet = net("10.1.0.0/24");
        assert_eq!(gateway(subnet), Ipv4Addr::new(10, 1, 0, 1));
        for last in [0, 1, 2, 3, 255] {
            let address = Ipv4Addr::new(10, 1, 0, last);
            assert_eq!(check(subnet, address), Err(AddressError::Reserved { address, subnet }));
        }
        check(subnet, Ipv4Addr::new(10, 1, 0, 4)).unwrap();
        check(subnet, Ipv4Addr::new(10, 1, 0, 254)).unwrap();
        let address = Ipv4Addr::new(10, 1, 1, 4);
        assert_eq!(check(subnet, address), Err(AddressError::Outside { address, subnet }));
    }

    #[test]
    fn subnets_are_private_of_a_fit_size_and_apart() {
        for good in ["10.0.0.0/16", "172.31.255.240/28", "192.168.0.0/16", "100.64.0.0/20"] {
            check_subnet(net(good)).unwrap();
        }
        let refused = |text| check_subnet(net(text)).unwrap_err();
        assert!(matches!(refused("10.0.0.0/15"), AddressError::Size { .. }));
        assert!(matches!(refused("10.0.0.0/29"), AddressError::Size { .. }));
        assert!(refused("10.0.0.1/24").to_string().contains("10.0.0.0/24 was meant"));
        for public in ["8.8.8.0/24", "127.0.0.0/16", "169.254.0.0/16", "224.0.0.0/16", "172.32.0.0/16"] {
            assert!(matches!(refused(public), AddressError::Public { .. }));
        }
        let apart = |a, b| check_apart(net(a), [net("10.9.0.0/24"), net(b)]).is_ok();
        assert!(apart("10.0.0.0/24", "10.0.1.0/24"));
        assert!(!apart("10.0.0.0/24", "10.0.0.0/16"));
        assert!(!apart("10.0.0.0/16", "10.0.255.0/28"));
        assert!(!apart("10.0.0.0/24", "10.0.0.0/24"));
    }
}
