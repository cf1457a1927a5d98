use super::*;
use crate::network::definition::{Attachment, NetworkDef};

fn server(nat: bool) -> Server {
    let directory = Directory::default();
    for (id, subnet) in [("red", "10.0.0.0/24"), ("blue", "10.0.1.0/24")] {
        let (id, domain) = (id.to_owned(), format!("{id}.internal"));
        directory.set_network(&NetworkDef { id, subnet: subnet.parse().unwrap(), nat, domain, mtu: 1500 });
    }
    for (link, network, address, name) in [(1, "red", [10, 0, 0, 4], "web"), (2, "blue", [10, 0, 1, 4], "db")]
    {
        let attachment = Attachment {
            tap: format!("pl-{link}"),
            mac: "06:00:00:00:00:01".parse().unwrap(),
            address: address.into(),
            network: network.into(),
            groups: vec![],
            names: vec![name.into()],
            owner: 0,
        };
        directory.attach(link, &attachment);
    }
    let resolvers = Resolvers::new("/nowhere".into());
    Server { network: "red".into(), directory, resolvers, load: Load::default() }
}

/// Code and number of answers, or None if others are to be asked.
fn asked(server: &Server, name: &str, kind: u16) -> Option<(u8, u8)> {
    let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.').filter(|label| !label.is_empty()) {
        query.push(label.len() as u8);
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, kind as u8, 0, 1]);
    match server.local(&query, MAX_UDP) {
        Outcome::Answer(answer) => Some((answer[3] & 0xf, answer[7])),
        Outcome::Forward(_) => None,
        Outcome::Silent => panic!("no answer"),
    }
}

#[test]
fn a_network_knows_its_own_names() {
    let server = server(true);
    for name in ["web.red.internal", "web", "WEB.Red.Internal"] {
        assert_eq!(asked(&server, name, 1), Some((0, 1)), "{name}");
        assert_eq!(asked(&server, name, 28), Some((0, 0)), "{name}");
    }
    for name in ["db", "nobody.red.internal", "a.web.red.internal", "4.0.0.10.red.internal"] {
        assert_eq!(asked(&server, name, 1), Some((3, 0)), "{name}");
    }
    assert_eq!(asked(&server, "red.internal", 1), Some((0, 0)));
    assert_eq!(asked(&server, "4.0.0.10.in-addr.arpa", 12), Some((0, 1)));
    assert_eq!(asked(&server, "5.0.0.10.in-addr.arpa", 12), Some((3, 0)));
    // Not its own: another network's, others that only look alike, and the root's.
    for name in [
        "db.blue.internal",
        "xred.internal",
        "example.test",
        "4.1.0.10.in-addr.arpa",
        "0.10.in-addr.arpa",
        "",
    ] {
        assert_eq!(asked(&server, name, 1), None, "{name}");
    }
}

#[test]
fn an_isolated_network_asks_nobody() {
    let server = server(false);
    assert_eq!(asked(&server, "example.test", 1), Some((5, 0)));
    assert_eq!(asked(&server, "web", 1), Some((0, 1)));
}

#[test]
fn a_network_that_is_gone_answers_nothing() {
    let server = server(true);
    server.directory.remove_network("red");
    assert_eq!(asked(&server, "web", 1), Some((5, 0)));
}

#[test]
fn what_is_under_way_is_bounded() {
    let load = Load::default();
    let guest = |number: u8| IpAddr::from([10, 0, 0, number]);
    let mut slots: Vec<_> = (0..PER_GUEST).map(|_| load.take(guest(1)).unwrap()).collect();
    assert!(load.take(guest(1)).is_none());
    slots.push(load.take(guest(2)).unwrap());
    slots.remove(0);
    slots.push(load.take(guest(1)).unwrap());
    let mut number = 2;
    while slots.len() < PER_NETWORK {
        number += 1;
        slots.extend((0..PER_GUEST).map_while(|_| load.take(guest(number))));
    }
    assert!(load.take(guest(250)).is_none());
    drop(slots);
    assert!(load.0.lock().unwrap().is_empty());
}

#[test]
fn reversed_names_are_addresses() {
    assert_eq!(reverse("4.0.0.10.in-addr.arpa"), Some([10, 0, 0, 4].into()));
    for bad in [
        "0.0.10.in-addr.arpa",
        "1.4.0.0.10.in-addr.arpa",
        "256.0.0.10.in-addr.arpa",
        "a.in-addr.arpa",
        "arpa",
    ] {
        assert_eq!(reverse(bad), None, "{bad}");
    }
}
