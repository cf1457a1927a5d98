//! A network interface over a socket that stands in for the tap, with the metadata service on it: frames both
//! ways, limits that change, and a tap that goes away.

#![no_main]

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use pulau_vmm::config::{
    NetworkInterfaceConfig, NetworkInterfaceUpdate, RateLimiterConfig, TokenBucketConfig,
};
use pulau_vmm::mmds::{Mmds, MmdsNetwork};
use pulau_vmm::virtio::VirtioDevice;
use pulau_vmm::virtio::net::Net;
use pulau_vmm::virtio::net::tap::Tap;
use pulau_vmm_fuzz::{Guest, Host, Input, devices};
use std::os::fd::AsRawFd;

fuzz_target!(|data: &[u8]| {
    let input = &mut Input(data);
    let flags = input.u8();
    let bucket = TokenBucketConfig { size: 4, one_time_burst: Some(6), refill_time: 1_000_000 };
    let limits = RateLimiterConfig { ops: Some(bucket), bandwidth: None };
    let config = NetworkInterfaceConfig {
        iface_id: "fuzz".into(),
        host_dev_name: "fuzz".into(),
        guest_mac: None,
        mtu: (flags & 1 != 0).then_some(1500),
        rx_rate_limiter: (flags & 2 != 0).then_some(limits),
        tx_rate_limiter: (flags & 4 != 0).then_some(limits),
    };
    let service = (flags & 8 != 0).then(|| {
        let mut mmds = Mmds::new(1000);
        mmds.put(serde_json::json!({"a": {"b": "c"}})).expect("a small document");
        MmdsNetwork::new(Ipv4Addr::new(169, 254, 169, 254), Arc::new(Mutex::new(mmds)), 1)
    });
    let kind = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (ours, tap) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, kind).expect("sockets");
    let mut net = Net::with_tap(&config, Tap::from_socket(tap), service).expect("descriptors");
    let mut host = Host::new(&mut net);
    let mut wire: Option<OwnedFd> = Some(ours);
    let mut guest = Guest::new(input, &mut net);
    let other = |_: &mut Guest, net: &mut Net, input: &mut Input| match (input.u8() % 8, &wire) {
        (0..=2, Some(wire)) => {
            let (count, repeat) = (input.u8(), input.u8());
            let frame = input.bytes(count.into()).repeat(1 + usize::from(repeat));
            let _ = send(wire.as_raw_fd(), &frame, MsgFlags::empty());
            host.turn(net);
        }
        (3, Some(wire)) => _ = recv(wire.as_raw_fd(), &mut [0; 2048], MsgFlags::empty()),
        (4, _) => {
            let limit = (input.u8() & 1 != 0).then_some(limits);
            let iface_id = "fuzz".into();
            net.update(&NetworkInterfaceUpdate { iface_id, rx_rate_limiter: limit, tx_rate_limiter: limit });
        }
        (5, _) if input.u8() == 0 => wire = None,
        _ => host.turn(net),
    };
    guest.run(input, &mut net, other, |guest, net| {
        let off = Some(TokenBucketConfig { size: 0, ..bucket });
        let off = Some(RateLimiterConfig { ops: off, bandwidth: off });
        net.update(&NetworkInterfaceUpdate {
            iface_id: "fuzz".into(),
            rx_rate_limiter: off,
            tx_rate_limiter: off,
        });
        devices::net_works(guest, net, b"the last frame");
    });
    // What is shorter than a header ends the tap.
    let mut link = [0];
    net.read_config(6, &mut link);
    let Some(wire) = wire.filter(|_| link == [1]) else { return };
    // Behind others, if there is room for it.
    let mut last = Vec::new();
    let mut frame = [0; 2048];
    let mut frames = 0;
    while let Ok(len) = recv(wire.as_raw_fd(), &mut frame, MsgFlags::empty()) {
        last = frame[..len].to_vec();
        frames += 1;
    }
    assert!(frames > 8 || last == [&[0; 12][..], b"the last frame"].concat(), "{last:?}");
});
