//! Guests boot: each kernel by each way in, each root file system, several vCPUs, many at once.

use std::path::Path;
use std::time::Instant;

use pulau_agent_protocol::client::connect;
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

/// Boots `kernel` and returns what the guest knows of how it was booted: the boot loader's type and the version
/// of the boot protocol in the zero page (Documentation/arch/x86/boot.rst).
fn boot_protocol(kernel: &Path) -> (String, String) {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    let boot_args = format!("{BOOT_ARGS} pulau.overlay=tmpfs");
    vmm.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": boot_args})).ok();
    vmm.boot();
    let read = |path: &str| vmm.sh(&format!("cat {path}")).trim().to_owned();
    (read("/proc/sys/kernel/bootloader_type"), read("/sys/kernel/boot_params/version"))
}

/// 0xff is an unknown boot loader: ours. It gives no version where the file has no setup header.
#[test]
fn an_elf_kernel_of_linux_is_entered_by_the_64_bit_protocol() {
    assert_eq!(boot_protocol(&artifact("PULAU_TEST_KERNEL")), ("255".into(), "0x0000".into()));
}

/// The kernel's own PVH entry fills the zero page in and calls the boot loader 0xb0.
#[test]
fn an_elf_kernel_with_the_note_for_pvh_and_none_of_linux_is_entered_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("vmlinux");
    let mut bytes = std::fs::read(artifact("PULAU_TEST_KERNEL")).unwrap();
    // A note: length of its name, of its content, its type, its name.
    let is_linux =
        |at: &usize| bytes[*at..*at + 4] == 6u32.to_le_bytes() && bytes[*at + 12..*at + 18] == *b"Linux\0";
    let notes: Vec<usize> = (0..bytes.len() - 18).filter(is_linux).collect();
    assert!(!notes.is_empty());
    for at in notes {
        bytes[at + 12] = b'l';
    }
    std::fs::write(&kernel, bytes).unwrap();
    assert_eq!(boot_protocol(&kernel).0, "176");
}

#[test]
fn a_bzimage_is_entered_by_the_64_bit_protocol_with_its_setup_header() {
    let (loader, version) = boot_protocol(&artifact("PULAU_TEST_KERNEL_BZIMAGE"));
    assert_eq!(loader, "255");
    assert!(version.as_str() >= "0x020c", "{version}");
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
fn as_many_vcpus_boot_as_there_can_be() {
    let vmm = Vmm::start();
    vmm.configure(32, 256, "");
    vmm.boot();
    // Starting each is little work; 32 of them on an emulated machine of two CPUs take their time.
    connect(&vmm.path("vsock"), Instant::now() + PATIENCE * 4).unwrap();
    assert_eq!(vmm.sh("nproc").trim(), "32");
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

/// Sets the host's pool of 2 MiB pages, and puts it back when dropped.
struct HugePages(String);

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    fn reserve(pages: u32) -> Self {
        let before = std::fs::read_to_string(HUGE_PAGES).unwrap();
        std::fs::write(HUGE_PAGES, pages.to_string()).expect("these tests run as root");
        let reserved = std::fs::read_to_string(HUGE_PAGES).unwrap();
        assert_eq!(reserved.trim(), pages.to_string(), "huge pages this host could reserve");
        Self(before)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(HUGE_PAGES, self.0.trim());
    }
}

#[test]
fn memory_comes_from_the_pool_of_huge_pages() {
    let _pool = HugePages::reserve(64);
    let mut vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "2M"})).ok();
    vmm.boot();
    vmm.sh("dd if=/dev/zero of=/tmp/a bs=1M count=40 2>/dev/null && sha256sum /tmp/a");
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let value = |name: &str| {
        let line = meminfo.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u32>().unwrap()
    };
    assert_eq!((value("HugePages_Rsvd:") + 64 - value("HugePages_Free:")), 64, "{meminfo}");
    assert!(value("HugePages_Free:") < 44, "{meminfo}");

    // A second one finds none left, and says so.
    let second = Vmm::start();
    second.configure(1, 128, "");
    second.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "2M"})).ok();
    second.put("/actions", json!({"action_type": "InstanceStart"})).refused(400, "nr_hugepages");
    assert!(vmm.is_running());
}

/// Linux 6.12 has a driver for the device, and the identifier itself lies in memory that root may read.
#[test]
fn each_guest_sees_a_generation_identifier_of_its_own() {
    let ids: Vec<String> = (0..2)
        .map(|_| {
            let vmm = Vmm::booted();
            vmm.sh("test -e /sys/bus/platform/drivers/vmgenid/PULU0001:00");
            vmm.sh("dd if=/dev/mem bs=16 skip=$((0xff000 / 16)) count=1 2>/dev/null | hexdump -v -e '/1 \"%02x\"'")
        })
        .collect();
    assert_eq!(ids[0].len(), 32);
    assert!(ids[0] != ids[1] && ids.iter().all(|id| id.bytes().any(|b| b != b'0')), "{ids:?}");
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
