//! Network interfaces, metadata and vsock move real data between guest and host.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use pulau_agent_protocol::message::ExitStatus;
use pulau_tests::network::{HOST, in_own_network, ip};
use pulau_tests::vmm::{Vmm, drive};
use pulau_tests::{PATIENCE, accept, artifact, bound, wait_for};
use serde_json::json;

const MIB: usize = 1 << 20;

/// A booted guest with `eth0` on `tap0`, which has address 172.16.0.2.
fn networked(more: serde_json::Value) -> Vmm {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    let mut config = json!({
        "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:ac:10:00:02",
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    vmm.put("/network-interfaces/eth0", config).ok();
    vmm
}

fn boot(vmm: &Vmm) {
    vmm.boot();
    vmm.sh("ip link set eth0 up && ip addr add 172.16.0.2/24 dev eth0");
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + (i >> 8) * 3 + (i >> 16)) as u8).collect()
}

/// The host sends `data` to the guest, which says what it got; returns the time that took.
fn to_guest(vmm: &Vmm, data: &[u8]) -> Duration {
    let listener = TcpListener::bind((HOST, 5001)).unwrap();
    let digest = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut stream = accept(&listener);
            let start = Instant::now();
            stream.write_all(data).unwrap();
            drop(stream);
            start
        });
        let digest = vmm.sh(&format!("nc {HOST} 5001 </dev/null | sha256sum"));
        (digest, sender.join().unwrap().elapsed())
    });
    assert_eq!(digest.0.split_whitespace().next().unwrap(), sha256(data));
    digest.1
}

fn sha256(data: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), data).unwrap();
    pulau_tests::sha256(file.path())
}

#[test]
fn guest_and_host_reach_each_other() {
    in_own_network(|| {
        let vmm = networked(json!({"mtu": 1400}));
        boot(&vmm);
        assert_eq!(
            vmm.sh("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu"),
            "06:00:ac:10:00:02\n1400\n"
        );
        vmm.sh(&format!("ping -c 3 -W 10 {HOST}"));
        let ping = Command::new("ping").args(["-c", "3", "-W", "10", "172.16.0.2"]).output().unwrap();
        assert!(ping.status.success(), "{ping:?}");
        let data = pattern(32 * MIB + 12_345);
        to_guest(&vmm, &data);

        // And from the guest: a file it received by other means.
        let listener = TcpListener::bind((HOST, 5002)).unwrap();
        let received = std::thread::spawn(move || {
            let mut all = Vec::new();
            accept(&listener).read_to_end(&mut all).unwrap();
            all
        });
        let digest = vmm.sh(&format!(
            "head -c {} /dev/urandom > /tmp/data && nc {HOST} 5002 < /tmp/data && sha256sum < /tmp/data",
            32 * MIB
        ));
        let received = received.join().unwrap();
        assert_eq!(received.len(), 32 * MIB);
        assert_eq!(digest.split_whitespace().next().unwrap(), sha256(&received));

        // Many small packets both ways.
        let echo = std::thread::spawn(|| {
            let mut stream =
                wait_for("the guest's echo", PATIENCE, || TcpStream::connect("172.16.0.2:7").ok());
            stream.set_nodelay(true).unwrap();
            bound(&stream);
            for i in 0..500u32 {
                stream.write_all(&i.to_le_bytes()).unwrap();
                let mut back = [0; 4];
                stream.read_exact(&mut back).unwrap();
                assert_eq!(u32::from_le_bytes(back), i);
            }
        });
        vmm.sh("timeout 100 nc -l -p 7 -e /bin/cat");
        echo.join().unwrap();
    });
}

/// Packets the host's end of the tap has taken from the guest.
fn packets_from_guest() -> u64 {
    let stats: serde_json::Value = serde_json::from_str(&ip("-s -j link show tap0")).unwrap();
    stats[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
}

#[test]
fn checksums_and_segmentation_are_left_to_the_host() {
    in_own_network(|| {
        let vmm = networked(json!({}));
        let root = artifact("PULAU_TEST_ROOTFS_DEBIAN");
        vmm.put("/drives/root", drive("root", &root, true, true)).ok();
        boot(&vmm);
        let features = vmm.sh("ethtool -k eth0");
        let on = |name: &str| features.lines().any(|line| line.trim() == format!("{name}: on"));
        for name in
            ["tx-checksum-ip-generic", "tx-tcp-segmentation", "tx-tcp6-segmentation", "scatter-gather"]
        {
            assert!(on(name), "{name}: {features}");
        }
        assert!(features.contains("rx-checksumming: on"), "{features}");

        // Frames come out of the guest whole, not cut to the MTU.
        let listener = TcpListener::bind((HOST, 5002)).unwrap();
        let received =
            std::thread::spawn(move || std::io::copy(&mut accept(&listener), &mut std::io::sink()).unwrap());
        let before = packets_from_guest();
        vmm.sh(&format!("exec bash -c 'head -c 32M /dev/zero >/dev/tcp/{HOST}/5002'"));
        assert_eq!(received.join().unwrap(), 32 * MIB as u64);
        let packets = packets_from_guest() - before;
        assert!(packets > 0 && 32 * MIB as u64 / packets > 8_000, "{packets} packets for 32 MiB");

        // The other way they go in whole: what the guest received of each kind is in its driver's counts.
        let received = || -> (u64, u64) {
            let text = vmm
                .sh("cat /sys/class/net/eth0/statistics/rx_bytes /sys/class/net/eth0/statistics/rx_packets");
            let mut numbers = text.lines().map(|line| line.parse().unwrap());
            (numbers.next().unwrap(), numbers.next().unwrap())
        };
        let listener = TcpListener::bind((HOST, 5003)).unwrap();
        let sent = std::thread::spawn(move || {
            accept(&listener).write_all(&vec![7; 32 * MIB]).unwrap();
        });
        let (bytes, packets) = received();
        let count = vmm.sh(&format!("exec bash -c 'wc -c </dev/tcp/{HOST}/5003'"));
        assert_eq!(count.trim(), (32 * MIB).to_string());
        sent.join().unwrap();
        let (more_bytes, more_packets) = received();
        let size = (more_bytes - bytes) / (more_packets - packets);
        assert!(size > 8_000, "packets of {size} bytes");
    });
}

#[test]
fn limits_hold_and_change_while_the_guest_runs() {
    in_own_network(|| {
        let bucket = |size: usize| json!({"bandwidth": {"size": size, "refill_time": 1000}});
        let vmm = networked(json!({"rx_rate_limiter": bucket(MIB / 4)}));
        boot(&vmm);
        let data = pattern(2 * MIB);
        // Eight times what the bucket holds and gets in a second, less what it holds at first; the clock starts
        // a little late. Slow enough that a busy machine is much faster without the limit.
        let limited = to_guest(&vmm, &data);
        assert!(limited.as_secs_f64() >= 6.0, "{limited:?}");
        let update = json!({"iface_id": "eth0", "rx_rate_limiter": bucket(0)});
        vmm.patch("/network-interfaces/eth0", update).ok();
        let free = to_guest(&vmm, &data);
        assert!(free < limited / 2, "{free:?}, limited {limited:?}");
    });
}

#[test]
fn a_tap_that_is_deleted_takes_down_the_link_and_nothing_else() {
    in_own_network(|| {
        let mut vmm = networked(json!({}));
        boot(&vmm);
        assert_eq!(vmm.sh("cat /sys/class/net/eth0/carrier").trim(), "1");
        ip("link delete tap0");
        wait_for("the carrier to go", PATIENCE, || {
            (vmm.sh("cat /sys/class/net/eth0/carrier").trim() == "0").then_some(())
        });
        let (status, ..) = vmm.try_sh(&format!("ping -c 1 -W 1 {HOST}"));
        assert!(!matches!(status, ExitStatus::Code(0)));
        assert!(vmm.is_running());
        assert!(vmm.log().contains("its tap cannot be used any more"), "{}", vmm.log());
    });
}

#[test]
fn a_tap_that_is_missing_or_busy_is_named() {
    in_own_network(|| {
        let fails = |tap: &str| {
            let vmm = networked(json!({"host_dev_name": tap}));
            let answer = vmm.put("/actions", json!({"action_type": "InstanceStart"}));
            assert_eq!(answer.status, 400, "{answer:?}");
            format!("{answer:?}")
        };
        let missing = fails("tap9");
        assert!(
            missing.contains("network interface eth0") && missing.contains("no interface tap9"),
            "{missing}"
        );
        let vmm = networked(json!({}));
        boot(&vmm);
        let busy = fails("tap0");
        assert!(busy.contains("another process uses it"), "{busy}");
    });
}

#[test]
fn the_guest_reads_its_metadata() {
    in_own_network(|| {
        let vmm = networked(json!({}));
        vmm.put("/mmds/config", json!({"version": "V2", "network_interfaces": ["eth0"]})).ok();
        let long = "x".repeat(20_000);
        vmm.put("/mmds", json!({"instance": {"id": "i-1234"}, "long": long})).ok();
        boot(&vmm);
        vmm.sh("ip route add 169.254.169.254 dev eth0");
        let get = |path: &str, token: &str| {
            let request = format!("GET {path} HTTP/1.0\\r\\nX-metadata-token: {token}\\r\\n\\r\\n");
            vmm.sh(&format!("printf '{request}' | nc 169.254.169.254 80"))
        };
        assert!(get("/instance/id", "wrong").starts_with("HTTP/1.1 401"));
        let token = vmm
            .sh("printf 'PUT /latest/api/token HTTP/1.0\\r\\nX-metadata-token-ttl-seconds: 60\\r\\n\\r\\n' \
             | nc 169.254.169.254 80");
        let token = token.rsplit("\r\n\r\n").next().unwrap().to_owned();
        assert!(get("/instance/id", &token).ends_with("\r\n\r\ni-1234"));
        assert!(get("/long", &token).ends_with(&format!("\r\n\r\n{long}")));
        vmm.patch("/mmds", json!({"instance": {"id": "i-5678"}})).ok();
        assert!(get("/instance/id", &token).ends_with("\r\n\r\ni-5678"));
        // Nothing of it reached the host.
        assert!(!std::fs::read_to_string("/proc/thread-self/net/arp").unwrap().contains("169.254"));
    });
}

#[test]
fn vsock_carries_many_connections_and_much_data() {
    let vmm = Vmm::booted();
    vmm.sh("true");
    std::thread::scope(|scope| {
        for i in 0..8 {
            let vmm = &vmm;
            scope.spawn(move || {
                for round in 0..10 {
                    assert_eq!(vmm.sh(&format!("echo {i} {round}")), format!("{i} {round}\n"));
                }
            });
        }
        let data = pattern(16 * MIB);
        let file = vmm.path("data");
        std::fs::write(&file, &data).unwrap();
        let digest = sha256(&data);
        let vmm = &vmm;
        scope.spawn(move || {
            let request = pulau_agent_protocol::message::ExecRequest {
                argv: vec!["/bin/sha256sum".into()],
                ..Default::default()
            };
            let output = vmm.agent().output(&request, &data).unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout).split_whitespace().next().unwrap(), digest);
        });
        scope.spawn(move || {
            let text = vmm.sh(&format!("yes | head -c {}", 8 * MIB));
            assert_eq!(text.len(), 8 * MIB);
            assert!(text.as_bytes().chunks(2).all(|c| c == b"y\n"));
        });
    });
    // Ports nobody listens on refuse at once, and all that is over leaves nothing behind.
    for port in 2000..2050 {
        let mut stream = std::os::unix::net::UnixStream::connect(vmm.path("vsock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    let sockets = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", vmm.pid())).unwrap().flatten();
        fds.filter(|f| std::fs::read_link(f.path()).is_ok_and(|l| l.to_string_lossy().starts_with("socket:")))
            .count()
    };
    // The API's listening socket and the device's.
    wait_for("connections to end", PATIENCE, || (sockets() <= 2).then_some(()));
}

#[test]
fn random_numbers_come_from_the_host() {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/entropy", json!({"rate_limiter": {"bandwidth": {"size": 4096, "refill_time": 1000}}})).ok();
    vmm.boot();
    assert_eq!(vmm.sh("cat /sys/class/misc/hw_random/rng_current").trim(), "virtio_rng.0");
    let start = Instant::now();
    let count = vmm.sh("head -c 12288 /dev/hwrng | wc -c");
    assert_eq!(count.trim(), "12288");
    assert!(start.elapsed() > Duration::from_millis(1500), "{:?}", start.elapsed());
    assert_ne!(vmm.sh("head -c 64 /dev/hwrng | sha256sum"), vmm.sh("head -c 64 /dev/hwrng | sha256sum"));
}
