//! The balloon in a real guest: memory it gives up is the host's again, and comes back when it is needed.

use pulau_agent_protocol::message::ExitStatus;
use pulau_tests::vmm::Vmm;
use pulau_tests::{PATIENCE, wait_for};
use serde_json::json;

/// MiB of the VMM's memory that are in the host's.
fn resident_mib(vmm: &Vmm) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.pid())).unwrap();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    kib.unwrap().parse::<u64>().unwrap() / 1024
}

/// Has the guest use 150 MiB of its memory, and free it again.
fn use_and_free(vmm: &Vmm) {
    vmm.sh(
        "mount -t tmpfs -o size=200m none /mnt && dd if=/dev/urandom of=/mnt/a bs=1M count=150 2>/dev/null",
    );
    assert!(resident_mib(vmm) > 150);
    vmm.sh("umount /mnt");
}

fn guest_with_balloon(config: serde_json::Value) -> Vmm {
    let vmm = Vmm::start();
    vmm.configure(1, 256, "");
    vmm.put("/balloon", config).ok();
    vmm.boot();
    vmm
}

#[test]
fn what_the_balloon_holds_is_the_hosts() {
    let vmm = guest_with_balloon(json!({"amount_mib": 0, "deflate_on_oom": false}));
    use_and_free(&vmm);
    let before = resident_mib(&vmm);
    vmm.patch("/balloon", json!({"amount_mib": 150})).ok();
    wait_for("memory to come back", PATIENCE, || (resident_mib(&vmm) + 100 < before).then_some(()));
}

#[test]
fn pages_the_guest_reports_free_are_the_hosts() {
    let config = json!({"amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true});
    let vmm = guest_with_balloon(config);
    use_and_free(&vmm);
    wait_for("free pages to be given back", PATIENCE, || (resident_mib(&vmm) < 100).then_some(()));
    // They are there again when they are needed.
    vmm.sh("mount -t tmpfs none /mnt && dd if=/dev/urandom of=/mnt/a bs=1M count=100 2>/dev/null && cp /mnt/a /dev/null");
}

#[test]
fn pages_the_guest_hints_at_are_the_hosts() {
    let config = json!({"amount_mib": 0, "deflate_on_oom": false, "free_page_hinting": true});
    let vmm = guest_with_balloon(config);
    use_and_free(&vmm);
    let before = resident_mib(&vmm);
    vmm.patch("/balloon/hinting/start", json!({})).ok();
    wait_for("the guest to say that it has hinted all", PATIENCE, || {
        let status = vmm.get("/balloon/hinting/status").ok();
        (status["host_cmd"] == 1 && status["guest_cmd"] == 0).then_some(())
    });
    assert!(resident_mib(&vmm) + 100 < before, "{} of {before} MiB", resident_mib(&vmm));
    vmm.patch("/balloon/hinting/stop", json!({})).ok();
    vmm.sh("dd if=/dev/zero of=/dev/null bs=100M count=1 2>/dev/null");
}

#[test]
fn a_guest_short_of_memory_takes_it_back_where_it_may() {
    for deflate_on_oom in [true, false] {
        let config =
            json!({"amount_mib": 0, "deflate_on_oom": deflate_on_oom, "stats_polling_interval_s": 1});
        let vmm = guest_with_balloon(config);
        vmm.sh("true");
        vmm.patch("/balloon", json!({"amount_mib": 170})).ok();
        let held = || vmm.get("/balloon/statistics").ok()["actual_mib"].as_u64().unwrap();
        wait_for("the balloon to inflate", PATIENCE, || (held() == 170).then_some(()));
        let (status, _, error) = vmm.try_sh("exec dd if=/dev/zero of=/dev/null bs=100M count=1");
        if deflate_on_oom {
            assert_eq!(status, ExitStatus::Code(0), "{error}");
            assert!(held() < 150, "{} MiB", held());
        } else {
            assert_ne!(status, ExitStatus::Code(0));
            assert_eq!(held(), 170);
        }
    }
}
