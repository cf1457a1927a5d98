use std::sync::Arc;

use pulau_vmm::config::MacAddr;

use super::*;
use crate::network::definition::NetworkDef;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);

fn guest() -> Guest {
    let network = NetworkDef {
        id: "red".into(),
        subnet: "10.0.0.0/24".parse().unwrap(),
        nat: true,
        domain: "red.internal".into(),
        mtu: 1500,
    };
    let mac = MacAddr([6, 0, 0, 0, 0, 1]);
    Guest { mac, address: ADDRESS, host_name: None, network: Arc::new(network) }
}

/// A message with these options and this `ciaddr`, from the guest's hardware address.
fn message(options: &[u8], current: [u8; 4], broadcast: bool) -> Vec<u8> {
    let mut bytes = vec![0; 240];
    bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
    bytes[10] = if broadcast { 0x80 } else { 0 };
    bytes[12..16].copy_from_slice(&current);
    bytes[28..34].copy_from_slice(&[6, 0, 0, 0, 0, 1]);
    bytes[236..240].copy_from_slice(&[99, 130, 83, 99]);
    bytes.extend_from_slice(options);
    bytes
}

/// Where the answer goes, its kind and the address in it.
fn answered(message: &[u8]) -> Option<(Ipv4Addr, u8, Ipv4Addr)> {
    let (to, bytes) = respond(message, &guest())?;
    Some((to, bytes[242], Ipv4Addr::new(bytes[16], bytes[17], bytes[18], bytes[19])))
}

#[test]
fn a_guest_gets_its_address_and_no_other() {
    const NONE: [u8; 4] = [0; 4];
    let broadcast = Ipv4Addr::BROADCAST;
    let nobody = Ipv4Addr::UNSPECIFIED;
    let discover = |options: &[u8], wide| message(&[&[53, 1, 1], options].concat(), NONE, wide);
    assert_eq!(answered(&discover(&[], false)), Some((ADDRESS, 2, ADDRESS)));
    assert_eq!(answered(&discover(&[], true)), Some((broadcast, 2, ADDRESS)));
    // Whatever it would like.
    assert_eq!(answered(&discover(&[50, 4, 10, 0, 0, 9], true)), Some((broadcast, 2, ADDRESS)));
    let request = |options: &[u8], current| message(&[&[53, 1, 3], options].concat(), current, true);
    assert_eq!(
        answered(&request(&[50, 4, 10, 0, 0, 4, 54, 4, 10, 0, 0, 1], NONE)),
        Some((broadcast, 5, ADDRESS))
    );
    assert_eq!(answered(&request(&[50, 4, 10, 0, 0, 9], NONE)), Some((broadcast, 6, nobody)));
    assert_eq!(answered(&request(&[], NONE)), Some((broadcast, 6, nobody)));
    // Renewing, from an address that is its own and one that is not.
    assert_eq!(answered(&request(&[], [10, 0, 0, 4])), Some((ADDRESS, 5, ADDRESS)));
    assert_eq!(answered(&request(&[], [10, 0, 0, 9])), Some((broadcast, 6, nobody)));
    // Another server was chosen.
    assert_eq!(answered(&request(&[54, 4, 10, 0, 0, 2], NONE)), None);
    let inform = |current| message(&[53, 1, 8], current, false);
    assert_eq!(answered(&inform([10, 0, 0, 4])), Some((ADDRESS, 5, nobody)));
    assert_eq!(answered(&inform([10, 0, 0, 9])), None);
    // Released and declined addresses are its own still.
    assert_eq!(answered(&message(&[53, 1, 7], [10, 0, 0, 4], false)), None);
}

#[test]
fn another_hardware_address_is_answered_by_broadcast() {
    let mut bytes = message(&[53, 1, 1], [0; 4], false);
    bytes[33] = 9;
    assert_eq!(answered(&bytes), Some((Ipv4Addr::BROADCAST, 2, ADDRESS)));
}

#[test]
fn noise_is_not_answered_and_does_no_harm() {
    let good = message(&[53, 1, 3, 50, 4, 10, 0, 0, 4, 255], [0; 4], true);
    let mut state = 1_u32;
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..4 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let place = (state >> 8) as usize % bytes.len();
            bytes[place] = state as u8;
        }
        bytes.truncate((state >> 4) as usize % (bytes.len() + 40));
        let _ = respond(&bytes, &guest());
    }
}
