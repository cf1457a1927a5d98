use std::sync::{Arc, Mutex};

use super::*;
use crate::config::MmdsVersion;
use crate::mmds::Mmds;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: [u8; 4] = [172, 16, 0, 2];
const GUEST_MAC: [u8; 6] = [6, 0, 0xac, 0x10, 0, 2];
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn network(document: serde_json::Value) -> MmdsNetwork {
    let mut mmds = Mmds::new(1 << 20);
    mmds.configure(MmdsVersion::V1, false);
    mmds.put(document).unwrap();
    MmdsNetwork::new(ADDRESS, Arc::new(Mutex::new(mmds)), 1)
}

fn ethernet(ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    // Whatever the destination is: a gateway's address will do.
    [&[2, 9, 9, 9, 9, 9][..], &GUEST_MAC, &ethertype, payload].concat()
}

/// One end of a TCP connection, as simple as can be.
struct Client {
    port: u16,
    sequence: u32,
    acknowledged: u32,
}

#[derive(Debug)]
struct Segment {
    flags: u8,
    sequence: u32,
    data: Vec<u8>,
    ttl: u8,
}

impl Client {
    fn frame(&self, flags: u8, data: &[u8]) -> Vec<u8> {
        let total = (40 + data.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(total.to_be_bytes());
        packet.extend([0, 0, 0x40, 0, 64, PROTOCOL_TCP, 0, 0]);
        packet.extend(GUEST);
        packet.extend(ADDRESS.octets());
        packet.extend(self.port.to_be_bytes());
        packet.extend(PORT.to_be_bytes());
        packet.extend(self.sequence.to_be_bytes());
        packet.extend(self.acknowledged.to_be_bytes());
        // The checksum is left to the device.
        packet.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        packet.extend(data);
        ethernet(TYPE_IPV4, &packet)
    }

    fn send(&mut self, network: &mut MmdsNetwork, flags: u8, data: &[u8], now: Instant) {
        let frame = self.frame(flags, data);
        assert!(network.is_for_service(&frame[..PREFIX]));
        network.take(&frame, now);
        let counted = flags & (SYN | FIN) != 0;
        self.sequence = self.sequence.wrapping_add(data.len() as u32 + u32::from(counted));
    }

    fn receive(&mut self, network: &mut MmdsNetwork, now: Instant) -> Option<Segment> {
        let frame = network.next_frame(now)?;
        assert_eq!((&frame[..6], &frame[6..12], &frame[12..14]), (&GUEST_MAC[..], &MAC[..], &TYPE_IPV4[..]));
        let packet = &frame[14..];
        assert_eq!((&packet[12..16], &packet[16..20]), (&ADDRESS.octets()[..], &GUEST[..]));
        assert!(checksum(&packet[..20]) == 0 && tcp_checksum(packet) == 0, "wrong checksum");
        let tcp = &packet[20..];
        assert_eq!(u16::from_be_bytes([tcp[2], tcp[3]]), self.port);
        let flags = tcp[13];
        let sequence = u32::from_be_bytes(tcp[4..8].try_into().unwrap());
        let data = tcp[usize::from(tcp[12] >> 4) * 4..].to_vec();
        if flags & SYN != 0 {
            self.acknowledged = sequence;
        }
        if sequence == self.acknowledged {
            let counted = flags & (SYN | FIN) != 0;
            self.acknowledged = sequence.wrapping_add(data.len() as u32 + u32::from(counted));
        }
        Some(Segment { flags, sequence, data, ttl: packet[8] })
    }

    fn connect(network: &mut MmdsNetwork, port: u16, now: Instant) -> Self {
        let mut client = Self { port, sequence: 1000, acknowledged: 0 };
        client.send(network, SYN, b"", now);
        let answer = client.receive(network, now).expect("an answer");
        assert_eq!(answer.flags, SYN | ACK);
        assert_eq!(answer.ttl, HOP_LIMIT);
        client.send(network, ACK, b"", now);
        client
    }

    /// All data there is, acknowledged piece by piece, and the flags seen.
    fn read(&mut self, network: &mut MmdsNetwork, now: Instant) -> (Vec<u8>, u8) {
        let (mut all, mut flags) = (Vec::new(), 0);
        while let Some(segment) = self.receive(network, now) {
            flags |= segment.flags;
            all.extend(&segment.data);
            if !segment.data.is_empty() || segment.flags & FIN != 0 {
                self.send(network, ACK, b"", now);
            }
        }
        (all, flags)
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    let sum = words.sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

fn tcp_checksum(packet: &[u8]) -> u16 {
    let length = (packet.len() - 20) as u16;
    checksum(&[&packet[12..20], &[0, PROTOCOL_TCP], &length.to_be_bytes(), &packet[20..]].concat())
}

fn arp(operation: u8, target: [u8; 4]) -> Vec<u8> {
    let body = [&[0, 1, 8, 0, 6, 4, 0, operation][..], &GUEST_MAC, &GUEST, &[0; 6], &target].concat();
    ethernet(TYPE_ARP, &body)
}

#[test]
fn arp_is_answered_for_the_one_address_only() {
    let mut network = network(serde_json::json!({}));
    let now = Instant::now();
    let request = arp(1, ADDRESS.octets());
    assert!(network.is_for_service(&request));
    network.take(&request, now);
    let reply = network.next_frame(now).unwrap();
    assert_eq!(reply[..12], [&GUEST_MAC[..], &MAC].concat());
    let body = [&ARP_REPLY[..], &MAC, &ADDRESS.octets(), &GUEST_MAC, &GUEST].concat();
    assert_eq!(reply[12..14], TYPE_ARP);
    assert_eq!(reply[14..], body);
    assert!(network.next_frame(now).is_none());
    for other in [arp(1, [169, 254, 169, 253]), arp(2, ADDRESS.octets()), arp(1, [0; 4])] {
        assert!(!network.is_for_service(&other));
    }
    for len in 0..PREFIX {
        assert!(!network.is_for_service(&request[..len]));
    }
}

#[test]
fn metadata_is_served() {
    let mut network = network(serde_json::json!({"greeting": "hello"}));
    let now = Instant::now();
    let mut client = Client::connect(&mut network, 40_000, now);
    // In two parts, and two requests on one connection.
    client.send(&mut network, ACK, b"GET /greeting HTTP/1.1\r\nHost:", now);
    assert_eq!(client.read(&mut network, now).0, b"");
    client.send(&mut network, ACK, b" x\r\n\r\nGET /nothing HTTP/1.1\r\n\r\n", now);
    let (text, flags) = client.read(&mut network, now);
    let text = String::from_utf8(text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("\r\n\r\nhelloHTTP/1.1 404"), "{text}");
    assert_eq!(flags & FIN, 0);
    client.send(&mut network, FIN | ACK, b"", now);
    assert_eq!(client.read(&mut network, now).1 & FIN, FIN);
    assert!(network.connections.is_empty());
    assert_eq!(network.delay(now), None);
}

#[test]
fn a_connection_ends_where_the_request_says_so() {
    let mut network = network(serde_json::json!({"a": "b"}));
    let now = Instant::now();
    let mut client = Client::connect(&mut network, 40_000, now);
    client.send(&mut network, ACK, b"GET /a HTTP/1.0\r\n\r\n", now);
    let (text, flags) = client.read(&mut network, now);
    assert!(text.ends_with(b"\r\n\r\nb"));
    assert_eq!(flags & FIN, FIN);
    client.send(&mut network, FIN | ACK, b"", now);
    client.read(&mut network, now);
    assert!(network.connections.is_empty());

    // What is no HTTP is answered and ended; so is a request that never ends.
    for request in [b"\x16\x03\x01 nonsense\r\n\r\n".to_vec(), vec![b'A'; 7000]] {
        let mut client = Client::connect(&mut network, 40_001, now);
        client.send(&mut network, ACK, &request, now);
        let (text, flags) = client.read(&mut network, now);
        assert!(text.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&text));
        assert_eq!(flags & FIN, FIN);
        client.send(&mut network, RST, b"", now);
        assert!(network.connections.is_empty());
    }
}

#[test]
fn a_long_answer_arrives_whole_and_is_sent_again_where_it_was_lost() {
    let long = "x".repeat(100_000);
    let mut network = network(serde_json::json!({"long": long}));
    let mut now = Instant::now();
    let mut client = Client::connect(&mut network, 40_000, now);
    client.send(&mut network, ACK, b"GET /long HTTP/1.0\r\n\r\n", now);
    let mut all = Vec::new();
    let (mut lost, mut ended) = (0, false);
    for _ in 0..10_000 {
        if ended {
            break;
        }
        let expected = client.acknowledged;
        match client.receive(&mut network, now) {
            Some(segment) if lost < 5 && all.len() > 20_000 && segment.sequence == expected => {
                lost += 1;
                client.acknowledged = expected;
            }
            Some(segment) => {
                if segment.sequence == expected {
                    all.extend(&segment.data);
                    ended = segment.flags & FIN != 0;
                }
                client.send(&mut network, ACK, b"", now);
            }
            None => now += network.delay(now).expect("a timer").max(Duration::from_millis(1)),
        }
    }
    assert!(ended);
    assert_eq!(lost, 5);
    let text = String::from_utf8(all).unwrap();
    assert_eq!(text.split_once("\r\n\r\n").unwrap().1, long);
}

#[test]
fn connections_and_frames_are_bounded() {
    let mut network = network(serde_json::json!({"a": "b"}));
    let mut now = Instant::now();
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS as u16)
        .map(|port| {
            now += Duration::from_millis(1);
            Client::connect(&mut network, port + 1, now)
        })
        .collect();
    assert_eq!(network.connections.len(), MAX_CONNECTIONS);
    // All but one say something; that one has to go.
    for (index, client) in clients.iter_mut().enumerate().filter(|(i, _)| *i != 7) {
        now += Duration::from_millis(1);
        client.send(&mut network, ACK, b"GET /a HTTP/1.1\r\n\r\n", now);
        assert!(client.read(&mut network, now).0.ends_with(b"b"), "{index}");
    }
    let mut late = Client::connect(&mut network, 999, now);
    assert_eq!(network.connections.len(), MAX_CONNECTIONS);
    clients[7].send(&mut network, ACK, b"GET /a HTTP/1.1\r\n\r\n", now);
    assert_eq!(clients[7].receive(&mut network, now).unwrap().flags & RST, RST);
    late.send(&mut network, ACK, b"GET /a HTTP/1.1\r\n\r\n", now);
    assert!(late.read(&mut network, now).0.ends_with(b"b"));
    // A guest that asks and asks, and takes no answer.
    for port in 2000..4000 {
        let mut flood = Client { port, sequence: 1, acknowledged: 0 };
        flood.send(&mut network, SYN, b"", now);
        network.take(&arp(1, ADDRESS.octets()), now);
    }
    assert!(network.connections.len() <= MAX_CONNECTIONS);
    assert!(network.wire.to_guest.len() <= MAX_FRAMES + 1);
    network.reset();
    assert!(network.next_frame(now).is_none());
}

#[test]
fn nothing_sent_to_it_does_harm() {
    let mut network = network(serde_json::json!({"a": "b"}));
    let now = Instant::now();
    let client = Client { port: 5, sequence: 1, acknowledged: 0 };
    let good = client.frame(SYN, b"data");
    for len in 0..good.len() {
        network.take(&good[..len], now);
    }
    // Every byte of headers with values at the edges, and a cheap random walk.
    for index in 14..good.len() {
        for value in [0, 1, 0x45, 0x4f, 0x7f, 0x80, 0xf0, 0xff] {
            let mut bad = good.clone();
            bad[index] = value;
            network.take(&bad, now);
            while network.next_frame(now).is_some() {}
        }
    }
    let mut random = 1u32;
    for _ in 0..20_000 {
        let mut bad = good.clone();
        for _ in 0..1 + random % 5 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let index = (random >> 8) as usize % (good.len() - 14) + 14;
            bad[index] = (random >> 24) as u8;
        }
        network.take(&bad, now);
        if random & 0x1000 == 0 {
            while network.next_frame(now).is_some() {}
        }
    }
    network.reset();
    Client::connect(&mut network, 40_000, now);
}

#[test]
fn resets_go_no_further_than_the_guest_either() {
    let mut network = network(serde_json::json!({}));
    let now = Instant::now();
    let mut client = Client { port: 1, sequence: 1, acknowledged: 5 };
    client.send(&mut network, ACK, b"no connection", now);
    let answer = client.receive(&mut network, now).expect("an answer");
    assert_eq!((answer.flags & RST, answer.ttl), (RST, HOP_LIMIT));
}
