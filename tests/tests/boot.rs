//! Guests boot: each kernel, each root file system, several vCPUs, many at once.

use pulau_tests::vmm::{BOOT_ARGS, Vmm, drive};
use pulau_tests::{PATIENCE, artifact, wait_for};
use serde_json::json;

#[test]
fn our_kernel_boots_the_minimal_root_file_system() {
    let vmm = Vmm::booted();
    assert_eq!(vmm.agent().agent().version, 1);
    assert!(vmm.sh("uname -r").starts_with("6.12"));
    assert_eq!(vmm.sh("echo hello; touch /written && ls /written"), "hello\n/written\n");
}

#[test]
fn vcpus_are_all_there_and_all_run() {
    for vcpus in [1, 2, 8] {
        let vmm = Vmm::start();
        vmm.configure(vcpus, 256, "");
        vmm.boot();
        assert_eq!(vmm.sh("nproc").trim(), vcpus.to_string());
        // Every CPU has taken timer interrupts of its own.
        let ticks = vmm.sh("grep LOC: /proc/interrupts");
        let counts: Vec<u64> = ticks.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        assert_eq!(counts.len(), vcpus as usize, "{ticks}");
        assert!(counts.iter().all(|count| *count > 0), "{ticks}");
    }
}

#[test]
fn a_guest_without_acpi_finds_its_devices_on_the_command_line() {
    let vmm = Vmm::start();
    vmm.configure(2, 128, "acpi=off");
    vmm.boot();
    assert_eq!(vmm.sh("nproc").trim(), "2");
    assert!(vmm.sh("cat /proc/cmdline").contains("virtio_mmio.device=4K@0xc0001000:"));
}

#[test]
fn memory_is_what_was_asked_for() {
    for mib in [64, 512, 3500] {
        let vmm = Vmm::start();
        vmm.configure(1, mib, "");
        vmm.boot();
        let total: u32 =
            vmm.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").trim().parse().unwrap();
        assert!(total <= mib && total + 40 + mib / 16 > mib, "{total} MiB of {mib}");
    }
}

#[test]
fn several_guests_boot_side_by_side() {
    let vmms: Vec<_> = (0..4).map(|_| Vmm::booted()).collect();
    for vmm in &vmms {
        assert_eq!(vmm.sh("echo $((6 * 7))").trim(), "42");
    }
}

#[test]
fn a_debian_cloud_kernel_with_its_initrd_boots() {
    let vmm = Vmm::start();
    vmm.put("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 512})).ok();
    vmm.put(
        "/boot-source",
        json!({
            "kernel_image_path": artifact("PULAU_TEST_DEBIAN_KERNEL"),
            "initrd_path": artifact("PULAU_TEST_DEBIAN_INITRD"),
            "boot_args": format!("{BOOT_ARGS} pulau.overlay=tmpfs"),
        }),
    )
    .ok();
    vmm.put("/drives/root", drive("root", &artifact("PULAU_TEST_ROOTFS_MINIMAL"), true, true)).ok();
    vmm.put("/vsock", json!({"guest_cid": 3, "uds_path": vmm.path("vsock")})).ok();
    vmm.boot();
    assert!(vmm.sh("uname -r").contains("cloud-amd64"));
    assert!(vmm.sh("cat /proc/mounts").contains("overlay / "));
}

#[test]
fn the_debian_root_file_system_boots_and_has_apt() {
    let vmm = Vmm::start();
    vmm.configure(2, 512, "");
    vmm.put("/drives/root", drive("root", &artifact("PULAU_TEST_ROOTFS_DEBIAN"), true, true)).ok();
    vmm.boot();
    assert!(vmm.sh("cat /etc/debian_version").starts_with("12"));
    assert!(vmm.sh("apt-get --version").starts_with("apt "));
    assert!(vmm.sh("dpkg --get-selections openssh-server").contains("install"));
}

#[test]
fn the_boot_timer_tells_when_the_guest_reached_its_init() {
    let vmm = Vmm::start_with(&["--boot-timer"]);
    vmm.configure(1, 128, "pulau.boot_timer");
    vmm.boot();
    let line = wait_for("the boot timer", PATIENCE, || {
        vmm.log().lines().find(|l| l.contains("Guest-boot-time")).map(str::to_owned)
    });
    let micros: u64 = line.split('=').nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!((1_000..PATIENCE.as_micros() as u64).contains(&micros), "{line}");
}
