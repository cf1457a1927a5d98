use super::*;

fn network(id: &str, subnet: &str) -> NetworkDef {
    NetworkDef {
        id: id.into(),
        subnet: subnet.parse().unwrap(),
        nat: true,
        domain: "red.internal".into(),
        mtu: 1500,
    }
}

fn attachment(tap: &str, address: &str) -> Attachment {
    Attachment {
        tap: tap.into(),
        mac: MacAddr([6, 0, 0, 0, 0, 1]),
        address: address.parse().unwrap(),
        network: "red".into(),
        groups: vec!["web".into()],
        names: vec!["one".into()],
        owner: 0,
    }
}

fn plan() -> Plan {
    Plan {
        networks: vec![network("red", "10.0.0.0/24"), network("blue", "10.0.1.0/24")],
        groups: vec![GroupDef { id: "web".into(), ..Default::default() }],
        attachments: vec![attachment("pl-1", "10.0.0.4"), attachment("pl-2", "10.0.0.5")],
        published: vec![published(8080, "10.0.0.4")],
    }
}

fn published(host_port: u16, address: &str) -> Published {
    let address = address.parse().unwrap();
    Published { protocol: Transport::Tcp, host_address: None, host_port, address, port: 80 }
}

fn refused(change: impl FnOnce(&mut Plan)) -> String {
    let mut plan = plan();
    change(&mut plan);
    Checked::new(&plan, "pl").unwrap_err().to_string()
}

#[test]
fn a_plan_that_makes_sense_is_taken() {
    let checked = Checked::new(&plan(), "pl").unwrap();
    assert_eq!((checked.networks.len(), checked.attachments.len()), (2, 2));
    assert_eq!(checked.networks["red"].gateway(), Ipv4Addr::new(10, 0, 0, 1));
    Checked::new(&Plan::default(), "pl").unwrap();
}

#[test]
fn what_does_not_fit_together_is_named() {
    assert_eq!(
        refused(|plan| plan.networks.push(network("red", "10.0.2.0/24"))),
        "network red is there twice"
    );
    assert!(refused(|plan| plan.networks[1].subnet = "10.0.0.0/16".parse().unwrap()).contains("overlaps"));
    assert!(refused(|plan| plan.networks[1].mtu = 100).contains("576 to 65521 bytes, not 100"));
    assert_eq!(refused(|plan| plan.attachments[0].network = "green".into()), "there is no network green");
    assert_eq!(refused(|plan| plan.attachments[0].groups = vec!["db".into()]), "there is no group db");
    assert_eq!(
        refused(|plan| plan.attachments[0].groups.push("web".into())),
        "a group of pl-1 is there twice"
    );
    assert_eq!(refused(|plan| plan.attachments[1].tap = "pl-1".into()), "tap pl-1 is there twice");
    assert_eq!(
        refused(|plan| plan.attachments[1].address = "10.0.0.4".parse().unwrap()),
        "pl-2: 10.0.0.4 is in use"
    );
    assert!(refused(|plan| plan.attachments[1].mac.0[0] = 1).contains("several stations"));
    assert!(
        refused(|plan| {
            plan.groups = (0..6).map(|i| GroupDef { id: format!("g{i}"), ..Default::default() }).collect();
            plan.attachments = vec![Attachment {
                groups: plan.groups.iter().map(|group| group.id.clone()).collect(),
                ..attachment("pl-1", "10.0.0.4")
            }];
        })
        .contains("has 6 groups; at most 5")
    );
    assert!(
        refused(|plan| plan.published.push(published(8080, "10.0.0.5"))).contains("8080 of the host leads")
    );
    assert!(refused(|plan| plan.published[0].address = "10.9.0.4".parse().unwrap()).contains("10.9.0.4"));
}

#[test]
fn rules_name_groups_that_are_there_and_ports_in_order() {
    let with =
        |traffic, peer| refused(|plan| plan.groups[0].ingress = vec![Rule { traffic, peers: vec![peer] }]);
    assert_eq!(with(Traffic::All, Peer::Group("db".into())), "there is no group db");
    let ports = Ports { from: 80, to: 79 };
    let anybody = Peer::Cidr(Ipv4Net::default());
    assert_eq!(with(Traffic::Tcp(ports), anybody), "group web: ports 80 to 79 are in the wrong order");
}

/// They end up in a text that nft reads.
#[test]
fn names_have_no_characters_that_mean_something() {
    for bad in ["", "a b", "a;b", "a\"", "a.b", "{", "1a", "-a", "a\n", "ä", &"a".repeat(65)] {
        assert!(refused(|plan| plan.networks[1].id = bad.into()).starts_with("network "), "{bad:?}");
        assert!(refused(|plan| plan.groups[0].id = bad.into()).starts_with("group "), "{bad:?}");
    }
    for bad in ["", "pl-", "pl", "pl-A", "pl-a.b", "pl-a b", "pl-\"", "px-1", "plx-1", "pl-0123456789abc"] {
        assert!(refused(|plan| plan.attachments[0].tap = bad.into()).starts_with("tap "), "{bad:?}");
    }
    for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64)] {
        assert!(refused(|plan| plan.attachments[0].names = vec![bad.into()]).starts_with("host name"));
    }
    for bad in ["", ".", "a..b", "a.", "A.b", &"a.".repeat(100)] {
        assert!(refused(|plan| plan.networks[0].domain = bad.into()).starts_with("domain"), "{bad:?}");
    }
    for bad in ["", "P", "1", "p-", "abcde", "p\""] {
        assert!(check_prefix(bad).is_err(), "{bad:?}");
    }
    check_prefix("pl2").unwrap();
}

#[test]
fn what_is_in_use_stays() {
    let mut checked = Checked::new(&plan(), "pl").unwrap();
    let error = checked.remove_network("red").unwrap_err().to_string();
    assert_eq!(error, "network red is still used by pl-1");
    assert_eq!(checked.set_groups([]).unwrap_err().to_string(), "group web is still used by pl-1");
    assert_eq!(checked.groups.len(), 1);
    assert!(checked.remove_network("blue").unwrap().is_some());
    assert!(checked.remove_network("blue").unwrap().is_none());
    let moved = network("red", "10.0.7.0/24");
    let error = checked.set_network(moved).unwrap_err().to_string();
    assert_eq!(error, "network red: its subnet and name cannot change");
    let isolated = NetworkDef { nat: false, ..network("red", "10.0.0.0/24") };
    assert_eq!(checked.set_network(isolated.clone()), Ok(true));
    assert_eq!(checked.set_network(isolated), Ok(false));
    // The same tap again is a change of it.
    let old = checked.attach(attachment("pl-1", "10.0.0.9"), "pl").unwrap();
    assert_eq!(old, Some(attachment("pl-1", "10.0.0.4")));
    let ports = [published(8080, "10.0.0.4")];
    let address = ports[0].address;
    assert_eq!(checked.publish(address, &ports), Ok((vec![], vec![])));
    let others = [published(8081, "10.0.0.4"), published(8082, "10.0.0.4")];
    assert_eq!(checked.publish(address, &others), Ok((ports.to_vec(), others.to_vec())));
    let taken = checked.publish("10.0.0.5".parse().unwrap(), &[published(8081, "10.0.0.5")]);
    assert!(taken.unwrap_err().to_string().contains("8081 of the host leads"));
    assert_eq!(checked.publish(address, &[]), Ok((others.to_vec(), vec![])));
}

#[test]
fn definitions_are_written_as_json() {
    let json = serde_json::to_string(&plan()).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan());
    let rule = Rule {
        traffic: Traffic::Tcp(Ports::one(22)),
        peers: vec![Peer::Cidr("10.0.0.0/8".parse().unwrap()), Peer::Group("web".into())],
    };
    assert_eq!(
        serde_json::to_string(&rule).unwrap(),
        r#"{"traffic":{"tcp":{"from":22,"to":22}},"peers":[{"cidr":"10.0.0.0/8"},{"group":"web"}]}"#
    );
}
