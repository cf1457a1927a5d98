use super::*;

/// A client's message with these options.
pub fn request(options: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; FIXED];
    bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
    bytes[4..12].copy_from_slice(&[1, 2, 3, 4, 0, 9, 0x80, 0]);
    bytes[12..16].copy_from_slice(&[10, 0, 0, 9]);
    bytes[28..34].copy_from_slice(&[6, 0, 0, 0, 0, 1]);
    bytes[236..240].copy_from_slice(&MAGIC);
    bytes.extend_from_slice(options);
    bytes
}

#[test]
fn the_fields_that_matter_are_read() {
    let bytes =
        request(&[0, 0, 55, 2, 1, 3, 53, 1, 3, 50, 4, 10, 0, 0, 4, 54, 4, 10, 0, 0, 1, 255, 53, 1, 1]);
    let expected = Request {
        asked: Asked::Request,
        transaction: [1, 2, 3, 4],
        seconds: [0, 9],
        flags: 0x8000,
        current: Ipv4Addr::new(10, 0, 0, 9),
        hardware: [6, 0, 0, 0, 0, 1],
        requested: Some(Ipv4Addr::new(10, 0, 0, 4)),
        server: Some(Ipv4Addr::new(10, 0, 0, 1)),
    };
    assert!(expected.wants_broadcast());
    assert_eq!(Request::parse(&bytes), Some(expected));
}

#[test]
fn what_is_no_request_is_none() {
    let good = request(&[53, 1, 1, 255]);
    assert!(Request::parse(&good).is_some());
    for length in 0..FIXED + 3 {
        assert_eq!(Request::parse(&good[..length]), None, "{length}");
    }
    // Operation, kind and length of hardware address (longer than its place, too), magic number.
    for (place, value) in [(0, 2), (1, 6), (2, 16), (2, 17), (2, 255), (2, 0), (236, 0)] {
        let mut bad = good.clone();
        bad[place] = value;
        assert_eq!(Request::parse(&bad), None, "{place}");
    }
    // Kinds that servers send, that are declined or released, that there are none of; and options cut short.
    for options in [
        &[53, 1, 2][..],
        &[53, 1, 4],
        &[53, 1, 7],
        &[53, 1, 99],
        &[53, 0],
        &[53],
        &[53, 9, 1],
        &[255, 53, 1, 1],
    ] {
        assert_eq!(Request::parse(&request(options)), None, "{options:?}");
    }
    // An address that is none does not matter.
    assert_eq!(Request::parse(&request(&[53, 1, 3, 50, 3, 1, 2, 3])).unwrap().requested, None);
}

#[test]
fn an_answer_says_all_there_is_to_know() {
    let offer = Offer {
        address: Ipv4Addr::new(10, 0, 0, 4),
        mask: Ipv4Addr::new(255, 255, 255, 0),
        broadcast: Ipv4Addr::new(10, 0, 0, 255),
        gateway: Ipv4Addr::new(10, 0, 0, 1),
        mtu: 1400,
        domain: "red.internal",
        host_name: Some("web"),
    };
    let asked = Request::parse(&request(&[53, 1, 1])).unwrap();
    let bytes = answer(&asked, Reply::Offer, &offer);
    assert!(bytes.len() >= MIN_LENGTH);
    assert_eq!(bytes[..12], [2, 1, 6, 0, 1, 2, 3, 4, 0, 9, 0x80, 0]);
    assert_eq!(bytes[12..20], [0, 0, 0, 0, 10, 0, 0, 4]);
    assert_eq!(bytes[28..44], [6, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let options: Vec<_> = each_option(&bytes[FIXED..]).collect();
    let expected: [(u8, &[u8]); 10] = [
        (53, &[2]),
        (54, &[10, 0, 0, 1]),
        (1, &[255, 255, 255, 0]),
        (28, &[10, 0, 0, 255]),
        (3, &[10, 0, 0, 1]),
        (6, &[10, 0, 0, 1]),
        (26, &[5, 120]),
        (15, b"red.internal"),
        (12, b"web"),
        (51, &[255; 4]),
    ];
    assert_eq!(options, expected);
    // A refusal says nothing but that (RFC 2131, table 3).
    let bytes = answer(&asked, Reply::Nak, &offer);
    assert_eq!(bytes[12..20], [0; 8]);
    assert_eq!(each_option(&bytes[FIXED..]).map(|(code, _)| code).collect::<Vec<_>>(), [53, 54]);
    // Who has an address already is not given one, nor a time.
    let asked = Request::parse(&request(&[53, 1, 8])).unwrap();
    let bytes = answer(&asked, Reply::Ack, &offer);
    assert_eq!(bytes[12..20], [10, 0, 0, 9, 0, 0, 0, 0]);
    assert!(each_option(&bytes[FIXED..]).all(|(code, _)| code != 51));
}
