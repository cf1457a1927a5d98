//! The metadata service as the guest reaches it: Ethernet frames of any kind, and TCP connections that behave
//! as far as it takes to get bytes to the HTTP behind.
//!
//! What comes back is bounded, fits the link, and comes from the service.

#![no_main]

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use pulau_vmm::config::MmdsVersion;
use pulau_vmm::mmds::{MAX_FRAME, Mmds, MmdsNetwork, PREFIX, Served};
use pulau_vmm_fuzz::Input;

const SERVICE: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: [u8; 4] = [169, 254, 0, 2];
const ACK: u8 = 0x10;
const PSH: u8 = 8;
const SYN: u8 = 2;

/// One end of a TCP connection, as much of it as is needed.
#[derive(Default, Clone, Copy)]
struct Peer {
    port: u16,
    sequence: u32,
    acknowledged: u32,
}

impl Peer {
    fn frame(&self, flags: u8, payload: &[u8], options: &[u8]) -> Vec<u8> {
        let options = &options[..options.len() / 4 * 4];
        let total = 20 + 20 + options.len() + payload.len();
        let mut frame = vec![0xff; 12];
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((total as u16).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        frame.extend(GUEST);
        frame.extend(SERVICE.octets());
        frame.extend(self.port.to_be_bytes());
        frame.extend(80u16.to_be_bytes());
        frame.extend(self.sequence.to_be_bytes());
        frame.extend(self.acknowledged.to_be_bytes());
        frame.extend([((5 + options.len() / 4) << 4) as u8, flags, 0x20, 0, 0, 0, 0, 0]);
        frame.extend(options);
        frame.extend(payload);
        frame
    }
}

fuzz_target!(|data: &[u8]| {
    let input = &mut Input(data);
    let flags = input.u8();
    let mut mmds = Mmds::new(1000);
    mmds.put(serde_json::json!({"a": {"b": "c", "n": 1}, "long": "x".repeat(900)})).expect("small");
    mmds.configure(if flags & 1 != 0 { MmdsVersion::V2 } else { MmdsVersion::V1 }, flags & 2 != 0);
    let mmds = Arc::new(Mutex::new(mmds));
    let mut network = MmdsNetwork::new(SERVICE, mmds.clone(), 1);
    let mut now = Instant::now();
    let mut peers = [Peer::default(); 4];

    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        let opcode = input.u8();
        let peer = &mut peers[usize::from(opcode >> 4) % 4];
        let mut send = |frame: &[u8]| {
            // As the network device does it.
            let prefix = &frame[..frame.len().min(PREFIX)];
            if network.is_for_service(prefix) && frame.len() <= MAX_FRAME {
                network.take(frame, now);
            }
        };
        match opcode % 16 {
            // Anything at all.
            0 => send(input.bytes(input.0.len().min(64))),
            1 => {
                let mut frame = vec![0xff; 12];
                frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1]);
                frame.extend(GUEST);
                frame.extend([0; 6]);
                frame.extend(SERVICE.octets());
                frame.truncate(42 - usize::from(input.u8() % 4));
                send(&frame);
            }
            2 | 3 => {
                *peer = Peer { port: 1000 + u16::from(opcode >> 4), sequence: input.u32(), acknowledged: 0 };
                let count = usize::from(input.u8() % 24);
                send(&peer.frame(SYN, &[], input.bytes(count)));
                peer.sequence = peer.sequence.wrapping_add(1);
            }
            // Bytes of a request.
            4..=8 => {
                let count = usize::from(input.u8()) * if opcode % 16 == 8 { 8 } else { 1 };
                let bytes = input.bytes(count);
                send(&peer.frame(ACK | PSH, bytes, &[]));
                peer.sequence = peer.sequence.wrapping_add(bytes.len() as u32);
            }
            9 => {
                let requests: [&[u8]; 4] = [
                    b"GET /a/b HTTP/1.1\r\n\r\n",
                    b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n",
                    b"GET / HTTP/1.1\r\nAccept: application/json\r\n\r\n",
                    b"GET /long HTTP/1.0\r\n\r\n",
                ];
                let bytes = requests[usize::from(input.u8()) % requests.len()];
                send(&peer.frame(ACK | PSH, bytes, &[]));
                peer.sequence = peer.sequence.wrapping_add(bytes.len() as u32);
            }
            // Any flags, and numbers that are a little off.
            10 => {
                let (flags, off, count) = (input.u8(), input.u16() as i16, input.u8());
                let mut other = *peer;
                other.sequence = other.sequence.wrapping_add_signed(off.into());
                send(&other.frame(flags, input.bytes(count.into()), &[]));
                if flags & 1 != 0 && off == 0 {
                    peer.sequence = peer.sequence.wrapping_add(1);
                }
            }
            // A sound frame with some bytes changed.
            11 => {
                let mut frame = peer.frame(ACK, b"GET / HTTP/1.1\r\n\r\n", &[1, 1, 1, 0]);
                for _ in 0..1 + opcode / 64 {
                    let at = usize::from(input.u8()) % frame.len();
                    frame[at] = input.u8();
                }
                send(&frame);
            }
            12 => now += Duration::from_millis(input.u16().into()),
            13 => network.reset(),
            14 => {
                let count = usize::from(input.u8()) * 4;
                let bytes = input.bytes(count);
                let served = mmds.lock().expect("one thread").serve(bytes, now);
                if let Served::Response { consumed, bytes: response, .. } = served {
                    assert!(consumed <= bytes.len() && (consumed > 0 || bytes.is_empty()));
                    assert!(response.starts_with(b"HTTP/1.1 "));
                }
            }
            // The guest takes no frames for a while.
            _ => continue,
        }
        let mut frames = 0;
        while let Some(frame) = network.next_frame(now) {
            frames += 1;
            assert!(frames <= 512, "frames without end");
            assert!(frame.len() <= 14 + 1500 && frame.len() > 14, "{} bytes", frame.len());
            assert_eq!(frame[6..12], [6, 1, 0x23, 0x45, 0x67, 1]);
            take(&frame[14..], &mut peers);
        }
        if let Some(delay) = network.delay(now) {
            assert!(delay < Duration::from_secs(100_000));
        }
    }
});

/// Notes how far the service is with a connection.
fn take(packet: &[u8], peers: &mut [Peer; 4]) {
    if packet[0] != 0x45 || packet.len() < 40 || packet[9] != 6 {
        return;
    }
    assert_eq!(packet[12..16], SERVICE.octets());
    assert_eq!(packet[8], 1, "time to live");
    let word = |at: usize| u32::from_be_bytes(packet[at..at + 4].try_into().expect("four bytes"));
    let port = u16::from_be_bytes([packet[22], packet[23]]);
    let header = 20 + usize::from(packet[32] >> 4) * 4;
    let len = packet.len().saturating_sub(header) as u32 + u32::from(packet[33] & 3 != 0);
    for peer in peers.iter_mut().filter(|p| p.port == port) {
        peer.acknowledged = word(24).wrapping_add(len);
    }
}
