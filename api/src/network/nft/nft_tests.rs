use super::*;
use crate::network::definition::{Attachment, NetworkDef, Published, Transport};
use crate::network::netlink::{attribute, text};

fn attachment() -> (Attachment, NetworkDef) {
    let network = NetworkDef {
        id: "red".into(),
        subnet: "10.0.0.0/24".parse().unwrap(),
        nat: true,
        domain: "red.internal".into(),
        mtu: 1500,
    };
    let attachment = Attachment {
        tap: "pl-1".into(),
        mac: "06:00:00:00:00:01".parse().unwrap(),
        address: "10.0.0.4".parse().unwrap(),
        network: "red".into(),
        groups: vec!["sg-1".into()],
        names: vec![],
        owner: 0,
    };
    (attachment, network)
}

#[test]
fn a_guest_is_these_elements() {
    let (attachment, network) = attachment();
    let elements = of_attachment(&attachment, &network);
    let texts: Vec<_> = elements.iter().map(|element| format!("{} {element}", element.set)).collect();
    assert_eq!(
        texts,
        [
            "guests \"pl-1\" . 10.0.0.4",
            "guests \"pl-1\" . 10.0.0.4",
            "gateways \"pl-1\" . 10.0.0.1",
            "egress0 10.0.0.4 : jump sg-1.out",
            "ingress0 10.0.0.4 : jump sg-1.in",
            "sg-1.members 10.0.0.4",
        ]
    );
}

/// Set, key and data of a message.
fn parts(message: Message) -> (u16, u8, String, Vec<u8>, Option<Vec<u8>>) {
    let bytes = message.finish(1);
    let attributes = &bytes[20..];
    let list = attribute(attributes, 3).unwrap();
    let element = attribute(list, 1).unwrap();
    let key = attribute(attribute(element, 1).unwrap(), 1).unwrap();
    let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
    assert_eq!(text(attribute(attributes, 1).unwrap()), "pl");
    let set = text(attribute(attributes, 2).unwrap()).to_owned();
    (kind, bytes[16], set, key.to_vec(), attribute(element, 2).map(<[u8]>::to_vec))
}

#[test]
fn elements_are_encoded_as_the_kernel_keeps_them() {
    let (attachment, network) = attachment();
    let elements: Vec<_> = of_attachment(&attachment, &network).into_iter().collect();
    let mut key = b"pl-1".to_vec();
    key.resize(16, 0);
    key.extend_from_slice(&[10, 0, 0, 4]);
    assert_eq!(parts(elements[0].adding("pl")), (0xa0c, 1, "guests".into(), key.clone(), None));
    assert_eq!(parts(elements[1].adding("pl")), (0xa0c, 3, "guests".into(), key, None), "for ARP");
    let (_, _, set, key, verdict) = parts(elements[3].adding("pl"));
    assert_eq!((set.as_str(), key), ("egress0", vec![10, 0, 0, 4]));
    let verdict = verdict.unwrap();
    let verdict = attribute(&verdict, 2).unwrap();
    assert_eq!(attribute(verdict, 1), Some(&(-3_i32).to_be_bytes()[..]));
    assert_eq!(text(attribute(verdict, 2).unwrap()), "sg-1.out");
    let (kind, _, _, key, verdict) = parts(elements[3].deleting("pl"));
    assert_eq!((kind, key, verdict), (0xa0e, vec![10, 0, 0, 4], None));
}

#[test]
fn published_ports_are_keys_of_whole_registers() {
    let published = |host_address| Published {
        protocol: Transport::Tcp,
        host_address,
        host_port: 0x1234,
        address: "10.0.0.4".parse().unwrap(),
        port: 80,
    };
    let (_, _, set, key, target) = parts(of_published(&published(Some([192, 0, 2, 1].into()))).adding("pl"));
    assert_eq!((set.as_str(), key), ("published", vec![6, 0, 0, 0, 192, 0, 2, 1, 0x12, 0x34, 0, 0]));
    let target = target.unwrap();
    assert_eq!(attribute(&target, 1), Some(&[10, 0, 0, 4, 0, 80, 0, 0][..]));
    let anywhere = of_published(&published(None));
    assert_eq!(anywhere.to_string(), "tcp . 4660 : 10.0.0.4 . 80");
    let (_, _, set, key, _) = parts(anywhere.adding("pl"));
    assert_eq!((set.as_str(), key), ("published_anywhere", vec![6, 0, 0, 0, 0x12, 0x34, 0, 0]));
}
