//! Snapshots of real guests: they go on where they were, as often as is wanted, and each is another machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pulau_agent_protocol::message::ExecRequest;
use pulau_tests::network::{HOST, in_own_network};
use pulau_tests::vmm::{Vmm, drive};
use pulau_tests::{PATIENCE, wait_for};
use pulau_vmm::exit::ExitCode;
use serde_json::{Value, json};

/// A snapshot's two files.
struct Files {
    state: PathBuf,
    memory: PathBuf,
}

/// Pauses the guest and makes a snapshot of it in `dir`.
#[track_caller]
fn save(vmm: &Vmm, dir: &Path) -> Files {
    vmm.patch("/vm", json!({"state": "Paused"})).ok();
    let files = Files { state: dir.join("state"), memory: dir.join("memory") };
    vmm.put("/snapshot/create", json!({"snapshot_path": files.state, "mem_file_path": files.memory})).ok();
    files
}

/// What loads a snapshot beside others: with a vsock socket of its own.
fn request(files: &Files, vmm: &Vmm, more: Value) -> Value {
    let mut request = json!({
        "snapshot_path": files.state,
        "mem_backend": {"backend_type": "File", "backend_path": files.memory},
        "vsock_override": {"uds_path": vmm.path("vsock")},
        "resume_vm": true,
    });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

/// A guest that goes on from a snapshot.
#[track_caller]
fn restored(files: &Files, more: Value) -> Vmm {
    let vmm = Vmm::start();
    vmm.put("/snapshot/load", request(files, &vmm, more)).ok();
    vmm
}

/// A guest with everything in it that is to go on.
fn busy_guest() -> Vmm {
    let vmm = Vmm::start();
    vmm.configure(2, 192, "");
    vmm.put("/balloon", json!({"amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1}))
        .ok();
    vmm.put("/entropy", json!({})).ok();
    vmm.boot();
    vmm.sh("echo remembered > /tmp/file; (i=0; while :; do i=$((i + 1)); echo $i > /tmp/count; done) \
        >/dev/null 2>&1 </dev/null & echo started");
    vmm
}

fn count(vmm: &Vmm) -> u64 {
    // Between its emptying and its writing there is nothing in it.
    wait_for("the count", PATIENCE, || vmm.sh("cat /tmp/count").trim().parse().ok())
}

#[test]
fn a_guest_goes_on_where_it_was_as_often_as_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let original = busy_guest();
    let before = count(&original);
    let files = save(&original, dir.path());
    assert_eq!(std::fs::metadata(&files.memory).unwrap().len(), 192 << 20);
    assert!(!dir.path().join("memory.part").exists() && !dir.path().join("state.part").exists());
    // The first is as it was.
    original.patch("/vm", json!({"state": "Resumed"})).ok();
    assert_eq!(original.sh("cat /tmp/file"), "remembered\n");

    let bytes = pulau_tests::sha256(&files.memory);
    let clones = [restored(&files, json!({})), restored(&files, json!({}))];
    for clone in &clones {
        assert_eq!(clone.sh("cat /tmp/file"), "remembered\n");
        let now = count(clone);
        assert!(now >= before, "{now} after {before}");
        wait_for("the counter to move", PATIENCE, || (count(clone) > now).then_some(()));
        assert_eq!(clone.sh("nproc"), "2\n");
        assert_eq!(clone.get("/machine-config").ok()["mem_size_mib"], 192);
        let stats = || clone.get("/balloon/statistics").ok()["total_memory"].as_u64();
        wait_for("statistics", PATIENCE, stats);
        assert_eq!(clone.get("/balloon/statistics").ok()["actual_mib"], 16);
        // A disk that is read, a random number generator that is asked, a console that is written to.
        clone.sh("echo 3 > /proc/sys/vm/drop_caches; find / -xdev -type f | xargs cat | wc -c");
        clone.sh("dd if=/dev/hwrng of=/dev/null bs=64 count=4; echo from the clone > /dev/ttyS0");
        wait_for("the console", PATIENCE, || clone.console().contains("from the clone").then_some(()));
    }
    clones[0].sh("echo changed > /tmp/file");
    assert_eq!(clones[1].sh("cat /tmp/file"), "remembered\n");

    // A snapshot of a clone, in the place of the one that the clones are running on.
    let again = save(&clones[0], dir.path());
    let third = restored(&again, json!({}));
    assert_eq!(third.sh("cat /tmp/file"), "changed\n");
    assert_eq!(clones[1].sh("cat /tmp/file"), "remembered\n");
    assert_ne!(pulau_tests::sha256(&again.memory), bytes);

    let mut third = third;
    third.sh_and_end("poweroff -f");
    third.exits_with(ExitCode::Ok as i32);
}

#[test]
fn no_two_clones_have_the_same_random_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let original = busy_guest();
    let files = save(&original, dir.path());
    let numbers: Vec<String> = (0..3)
        .map(|_| {
            let clone = restored(&files, json!({}));
            clone.sh(
                "head -c 32 /dev/urandom | hexdump -v -e '1/1 \"%02x\"'; cat /proc/sys/kernel/random/uuid",
            )
        })
        .collect();
    assert!(numbers[0].len() > 64, "{numbers:?}");
    assert!(numbers[0] != numbers[1] && numbers[1] != numbers[2] && numbers[0] != numbers[2], "{numbers:?}");
}

#[test]
fn a_young_guest_does_not_wait_and_clocks_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let original = Vmm::booted();
    original.sh("true");
    let files = save(&original, dir.path());
    std::thread::sleep(Duration::from_secs(2));
    let uptime = |vmm: &Vmm| -> f64 {
        let text = vmm.sh("cat /proc/uptime");
        text.split(' ').next().unwrap().parse().unwrap()
    };
    let still = restored(&files, json!({}));
    let first = uptime(&still);
    let begun = Instant::now();
    let text = still.sh("sleep 1; cat /proc/uptime");
    let passed = text.split(' ').next().unwrap().parse::<f64>().unwrap() - first;
    let real = begun.elapsed().as_secs_f64();
    assert!(passed >= 0.9 && passed <= real + 1.0, "{passed} s by the guest's clock, {real} s by ours");

    let advanced = restored(&files, json!({"clock_realtime": true}));
    let (late, early) = (uptime(&advanced), uptime(&restored(&files, json!({}))));
    assert!(late - early >= 1.5, "{late} with, {early} without the time that has passed since");
}

#[test]
fn drives_and_consoles_can_be_others() {
    let dir = tempfile::tempdir().unwrap();
    let data = |name: &str, text: &str| {
        let path = dir.path().join(name);
        let mut bytes = vec![0; 1 << 20];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let (first, second) = (data("first", "one"), data("second", "two"));
    let original = Vmm::start();
    original.configure(1, 128, "");
    original.put("/drives/data", drive("data", &first, false, false)).ok();
    original.boot();
    assert_eq!(original.sh("head -c 3 /dev/vdb"), "one");
    let files = save(&original, dir.path());
    drop(original);

    let console = dir.path().join("console");
    let clone = restored(
        &files,
        json!({
            "drive_overrides": [{"drive_id": "data", "path_on_host": second}],
            "serial_override": {"serial_out_path": console},
        }),
    );
    assert_eq!(clone.sh("echo 1 > /proc/sys/vm/drop_caches; head -c 3 /dev/vdb"), "two");
    clone.sh("printf 333 | dd of=/dev/vdb conv=fsync,notrunc; echo on another console > /dev/ttyS0");
    assert_eq!(&std::fs::read(&second).unwrap()[..3], b"333");
    assert_eq!(&std::fs::read(&first).unwrap()[..3], b"one");
    let text = || std::fs::read_to_string(&console).ok();
    wait_for("the console", PATIENCE, || text().filter(|text| text.contains("on another console")));
    let drives = clone.get("/vm/config").ok()["drives"].clone();
    assert!(drives.to_string().contains("second"), "{drives}");
}

#[test]
fn connections_to_a_guest_end_and_new_ones_work_also_with_traffic_under_way() {
    in_own_network(|| {
        let dir = tempfile::tempdir().unwrap();
        let mut vmm = Vmm::start();
        vmm.configure(1, 128, "");
        let mac = "06:00:00:00:00:02";
        let net = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": mac});
        vmm.put("/network-interfaces/eth0", net).ok();
        vmm.boot();
        vmm.sh(&format!(
            "ip addr add 172.16.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 -w 20 {HOST} >/dev/null && \
             (while :; do ping -c 1 -w 1 {HOST}; done) >/dev/null 2>&1 </dev/null & echo started"
        ));
        for round in 0..5 {
            // A command that is under way when the guest is taken away, and whose connection ends with it.
            let files = std::thread::scope(|scope| {
                let talk = vmm.agent();
                let argv = ["/bin/sh", "-c", "while :; do echo talk; done"].map(String::from).to_vec();
                let request = ExecRequest { argv, ..Default::default() };
                scope.spawn(move || talk.output(&request, b""));
                std::thread::sleep(Duration::from_millis(200));
                let files = save(&vmm, dir.path());
                vmm.signal(nix::sys::signal::Signal::SIGKILL);
                files
            });
            drop(vmm);
            vmm = restored(&files, json!({}));
            let answer = vmm.sh(&format!("ping -c 3 -w 20 {HOST} >/dev/null && echo there"));
            assert_eq!(answer, "there\n", "round {round}");
        }
        let error = {
            let dir = tempfile::tempdir().unwrap();
            let files = save(&vmm, dir.path());
            let other = Vmm::start();
            let more = json!({"network_overrides": [{"iface_id": "eth0", "host_dev_name": "nothere0"}]});
            let error = other.put("/snapshot/load", request(&files, &other, more)).fault().to_owned();
            // It can be tried again.
            drop(vmm);
            other.put("/snapshot/load", request(&files, &other, json!({}))).ok();
            assert_eq!(other.sh(&format!("ping -c 1 -w 20 {HOST} >/dev/null && echo there")), "there\n");
            error
        };
        assert!(error.contains("host_dev_name of network interface eth0"), "{error}");
    });
}

#[test]
fn what_is_no_snapshot_is_refused_and_can_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let original = Vmm::booted();
    original.sh("true");
    let error = original
        .put(
            "/snapshot/create",
            json!({"snapshot_path": dir.path().join("s"), "mem_file_path": dir.path().join("m")}),
        )
        .fault()
        .to_owned();
    assert!(error.contains("must be paused first"), "{error}");
    let files = save(&original, dir.path());
    let error = original
        .put(
            "/snapshot/create",
            json!({"snapshot_path": dir.path().join("s"), "mem_file_path": "/no/such/m"}),
        )
        .fault()
        .to_owned();
    assert!(error.contains("mem_file_path: cannot write /no/such/m"), "{error}");
    assert!(!dir.path().join("s").exists() && !dir.path().join("s.part").exists());

    let state = std::fs::read(&files.state).unwrap();
    let wrong = dir.path().join("wrong");
    let mut flipped = state.clone();
    flipped[state.len() / 2] ^= 1;
    let mut newer = state.clone();
    newer[8] = 200;
    let vmm = Vmm::start();
    let refused = |state: &Path, memory: &Path| {
        let files = Files { state: state.to_owned(), memory: memory.to_owned() };
        let error = vmm.put("/snapshot/load", request(&files, &vmm, json!({}))).fault().to_owned();
        assert_eq!(vmm.get("/").ok()["state"], "Not started");
        assert!(!vmm.path("vsock").exists());
        error
    };
    for (bytes, expected) in [
        (&state[..state.len() - 1], "cut short"),
        (&state[..5], "not the state of a microVM"),
        (&flipped, "checksum"),
        (&newer, "version 200"),
        (b"\x7fELF and more of it, which makes no snapshot of it", "not the state of a microVM"),
    ] {
        std::fs::write(&wrong, bytes).unwrap();
        let error = refused(&wrong, &files.memory);
        assert!(error.contains(expected), "{error}");
    }
    assert!(refused(Path::new("/no/such/file"), &files.memory).contains("No such file"));
    std::fs::write(&wrong, [0; 4096]).unwrap();
    let error = refused(&files.state, &wrong);
    assert!(error.contains("4096 bytes"), "{error}");
    vmm.put("/snapshot/load", request(&files, &vmm, json!({}))).ok();
    vmm.sh("true");
}
