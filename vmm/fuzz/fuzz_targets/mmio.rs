//! The MMIO transport with a device behind it, driven through registers alone: accesses of any width at any
//! offset, steps left out and repeated, resets in the middle of work. Whatever came before, a driver that
//! starts anew finds a device that works.

#![no_main]

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use pulau_vmm::config::{
    BalloonConfig, CacheType, DriveConfig, IoEngine, NetworkInterfaceConfig, PmemConfig,
};
use pulau_vmm::virtio::VirtioDevice;
use pulau_vmm::virtio::balloon::Balloon;
use pulau_vmm::virtio::block::Block;
use pulau_vmm::virtio::net::Net;
use pulau_vmm::virtio::net::tap::Tap;
use pulau_vmm::virtio::pmem::Pmem;
use pulau_vmm::virtio::rng::Rng;
use pulau_vmm::virtio::vsock::Vsock;
use pulau_vmm_fuzz::{Behind, Guest, Input, devices, new_memory};
use tempfile::TempDir;

thread_local! {
    static DIR: TempDir = {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
        std::fs::write(dir.path().join("disk"), [0x5a; 64 * 512]).expect("a file");
        std::fs::write(dir.path().join("pmem"), [0; 4096]).expect("a file");
        dir
    };
}

type Works<'a> = Box<dyn FnOnce(&mut Guest, &mut Behind) + 'a>;

fuzz_target!(|data: &[u8]| DIR.with(|dir| {
    let input = &mut Input(data);
    let choice = input.u8();
    match choice % 7 {
        kind @ 0..=1 => {
            let config = DriveConfig {
                drive_id: "fuzz".into(),
                path_on_host: Some(dir.path().join("disk")),
                is_read_only: Some(true),
                cache_type: CacheType::Writeback,
                io_engine: Some(if kind == 0 { IoEngine::Sync } else { IoEngine::Async }),
                ..DriveConfig::default()
            };
            let block = Block::new(&config).expect("the drive is fine");
            run(input, block, Box::new(|guest, device| devices::block_works(guest, device, 0x5a)));
        }
        2 => {
            let rng = Rng::new(None).expect("descriptors");
            run(input, rng, Box::new(|guest, device| devices::rng_works(guest, device)));
        }
        3 => {
            let config = BalloonConfig {
                stats_polling_interval_s: 1,
                free_page_hinting: true,
                free_page_reporting: true,
                ..BalloonConfig::default()
            };
            let balloon = Balloon::new(&config).expect("descriptors");
            run(input, balloon, Box::new(|guest, device| devices::balloon_works(guest, device)));
        }
        4 => {
            let config = PmemConfig {
                id: "fuzz".into(),
                path_on_host: dir.path().join("pmem"),
                ..PmemConfig::default()
            };
            let pmem = Pmem::new(&config).expect("the file is fine");
            run(input, pmem, Box::new(|guest, device| devices::pmem_works(guest, device)));
        }
        5 => {
            let config = NetworkInterfaceConfig {
                iface_id: "fuzz".into(),
                host_dev_name: "fuzz".into(),
                guest_mac: None,
                mtu: Some(1500),
                rx_rate_limiter: None,
                tx_rate_limiter: None,
            };
            let kind = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let (ours, tap) =
                socketpair(AddressFamily::Unix, SockType::SeqPacket, None, kind).expect("sockets");
            let net = Net::with_tap(&config, Tap::from_socket(tap), None).expect("descriptors");
            let works = |guest: &mut Guest, device: &mut Behind| {
                while recv(ours.as_raw_fd(), &mut [0; 64], MsgFlags::empty()).is_ok() {}
                devices::net_works(guest, device, b"frame");
                let mut frame = [0; 64];
                assert_eq!(recv(ours.as_raw_fd(), &mut frame, MsgFlags::empty()), Ok(12 + 5));
            };
            run(input, net, Box::new(works));
        }
        _ => {
            let vsock = Vsock::new(3, dir.path().join("vsock")).expect("the path is free");
            run(input, vsock, Box::new(|guest, device| devices::vsock_works(guest, device)));
        }
    }
}));

fn run<D: VirtioDevice + 'static>(input: &mut Input, device: D, works: Works) {
    let memory = new_memory();
    let mut behind = Behind::new(Arc::new(Mutex::new(device)), memory.clone());
    let mut guest = Guest::over(memory, input, &mut behind);
    if behind.device_type() == 5 {
        // A balloon.
        guest.watch().allow_zeroing();
    }
    // Not activated: the guest may do so, or poke at registers first.
    guest.run(
        input,
        &mut behind,
        |guest, behind, input| {
            if behind.access(input) {
                guest.watch().give_up();
            }
            behind.turn();
        },
        works,
    );
}
