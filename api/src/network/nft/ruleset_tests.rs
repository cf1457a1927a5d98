use super::*;
use crate::network::definition::{Attachment, NetworkDef, Plan, Ports, Published, Transport};

fn rule(traffic: Traffic, peers: &[&str]) -> Rule {
    let peer = |text: &&str| match text.parse() {
        Ok(cidr) => Peer::Cidr(cidr),
        Err(_) => Peer::Group(text.to_string()),
    };
    Rule { traffic, peers: peers.iter().map(peer).collect() }
}

fn plan() -> Checked {
    let network = |id: &str, subnet: &str, nat| NetworkDef {
        id: id.into(),
        subnet: subnet.parse().unwrap(),
        nat,
        domain: "red.internal".into(),
        mtu: 1500,
    };
    let plan = Plan {
        networks: vec![network("red", "10.0.0.0/24", true), network("blue", "10.0.1.0/24", false)],
        groups: vec![
            GroupDef {
                id: "sg-1".into(),
                ingress: vec![
                    rule(Traffic::Tcp(Ports::one(22)), &["10.0.0.0/9", "10.128.0.0/9", "192.0.2.7/24"]),
                    rule(Traffic::Udp(Ports { from: 53, to: 99 }), &["sg-2", "192.0.2.1/32"]),
                    rule(Traffic::Icmp(Some(8)), &["0.0.0.0/0", "10.0.0.0/8"]),
                    rule(Traffic::Icmp(None), &["sg-1"]),
                    rule(Traffic::All, &[]),
                ],
                egress: vec![rule(Traffic::All, &["0.0.0.0/0"])],
            },
            GroupDef { id: "sg-2".into(), ..Default::default() },
        ],
        attachments: vec![Attachment {
            tap: "pl-1".into(),
            mac: "06:00:00:00:00:01".parse().unwrap(),
            address: "10.0.0.4".parse().unwrap(),
            network: "red".into(),
            groups: vec!["sg-2".into(), "sg-1".into()],
            names: vec![],
            owner: 0,
        }],
        published: vec![
            Published {
                protocol: Transport::Tcp,
                host_address: Some("192.0.2.1".parse().unwrap()),
                host_port: 8080,
                address: "10.0.0.4".parse().unwrap(),
                port: 80,
            },
            Published {
                protocol: Transport::Udp,
                host_address: None,
                host_port: 53,
                address: "10.0.1.4".parse().unwrap(),
                port: 5353,
            },
        ],
    };
    Checked::new(&plan, "pl").unwrap()
}

#[test]
fn the_rule_set_is_this_text() {
    let text = whole("pl", &plan());
    let golden = include_str!("ruleset_golden.nft");
    for (number, (got, expected)) in text.lines().zip(golden.lines()).enumerate() {
        assert_eq!(got, expected, "line {}", number + 1);
    }
    assert_eq!(text, golden);
}

#[test]
fn without_guests_there_are_the_same_chains() {
    let chains = |text: &str| -> Vec<String> {
        let names = text.lines().filter(|line| line.starts_with("\tchain") && !line.contains("sg-"));
        names.map(str::to_owned).collect()
    };
    let empty = whole("pl", &Checked::default());
    assert_eq!(chains(&empty), chains(&whole("pl", &plan())));
    assert!(!empty.contains("elements"));
}

/// Another daemon's rules have nothing in common with these but their order.
#[test]
fn the_prefix_is_in_every_name_of_the_hosts() {
    let text = whole("zz", &Checked::default());
    assert!(!text.contains("pl"), "{text}");
    assert_eq!(text.matches("table inet zz").count(), 3);
    assert_eq!(
        text.matches("\"zz-*\"").count(),
        whole("pl", &Checked::default()).matches("\"pl-*\"").count()
    );
}
