//! Devices other than drives, network and vsock: entropy, balloon, console.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use pulau_tests::vmm::Vmm;
use pulau_tests::{PATIENCE, wait_for};
use serde_json::json;

#[test]
fn the_entropy_device_gives_the_guest_random_bytes() {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/entropy", json!({})).ok();
    vmm.boot();
    assert_eq!(vmm.sh("cat /sys/class/misc/hw_random/rng_current").trim(), "virtio_rng.0");
    let read = || vmm.sh("dd if=/dev/hwrng bs=4096 count=4 2>/dev/null | sha256sum");
    let (first, second) = (read(), read());
    assert_ne!(first, second);
}

#[test]
fn the_balloon_takes_memory_and_gives_it_back() {
    let vmm = Vmm::start();
    vmm.configure(1, 256, "");
    vmm.put("/balloon", json!({"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1}))
        .ok();
    vmm.boot();
    let free =
        || vmm.sh("awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo").trim().parse::<u32>().unwrap();
    let before = free();
    vmm.patch("/balloon", json!({"amount_mib": 100})).ok();
    wait_for("the balloon to inflate", PATIENCE, || (free() + 80 < before).then_some(()));
    wait_for("statistics from after that", PATIENCE, || {
        let body = vmm.get("/balloon/statistics").ok();
        let free = body["free_memory"].as_u64().filter(|_| body["total_memory"].is_u64());
        (body["actual_mib"] == 100 && free? < 150 << 20).then_some(())
    });
    vmm.patch("/balloon", json!({"amount_mib": 0})).ok();
    wait_for("the balloon to deflate", PATIENCE, || (free() + 20 > before).then_some(()));
    vmm.patch("/balloon", json!({"amount_mib": 1000})).refused(400, "amount_mib");
}

#[test]
fn a_client_attaches_to_the_console_socket() {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "pulau.console=shell");
    let socket = vmm.path("console.sock");
    vmm.put("/serial", json!({"socket_path": socket})).ok();
    vmm.boot();
    let mut client = wait_for("the console socket", PATIENCE, || UnixStream::connect(&socket).ok());
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    vmm.sh("true");
    client.write_all(b"echo $((6 * 7))-is-it\n").unwrap();
    let mut seen = String::new();
    wait_for("the shell's answer", PATIENCE, || {
        let mut chunk = [0; 1024];
        if let Ok(count) = client.read(&mut chunk) {
            seen.push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
        seen.contains("42-is-it").then_some(())
    });
}
