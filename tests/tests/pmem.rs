//! Persistent memory: files of the host in the guest's address space, shared, written, flushed, and booted
//! from.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use pulau_tests::power_loss::loses_nothing_flushed;
use pulau_tests::vmm::{BOOT_ARGS, Vmm};
use pulau_tests::{artifact, sha256};
use pulau_vmm::exit::ExitCode;
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// A file of `len` bytes that tell where they are.
fn patterned_file(path: &Path, len: usize) {
    let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + (i >> 8) + (i >> 12) * 31) as u8).collect();
    File::create(path).unwrap().write_all(&bytes).unwrap();
}

/// A guest that boots from a drive and has `file` as `/dev/pmem0`.
fn guest_with(file: &Path, read_only: bool) -> Vmm {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/pmem/data", json!({"id": "data", "path_on_host": file, "read_only": read_only})).ok();
    let metrics = vmm.path("metrics");
    File::create(&metrics).unwrap();
    vmm.put("/metrics", json!({"metrics_path": metrics})).ok();
    vmm.boot();
    vmm
}

/// Boots a guest whose root file system is `file` as persistent memory; it has no drive at all.
fn guest_rooted_in(file: &Path, read_only: bool, more: &str) -> Vmm {
    let vmm = Vmm::start();
    vmm.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128})).ok();
    let boot_args = format!("{BOOT_ARGS} {more}");
    let kernel = artifact("PULAU_TEST_KERNEL");
    vmm.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": boot_args})).ok();
    vmm.put("/vsock", json!({"guest_cid": 3, "uds_path": vmm.path("vsock")})).ok();
    let root = json!({"id": "root", "path_on_host": file, "root_device": true, "read_only": read_only});
    vmm.put("/pmem/root", root).ok();
    vmm.boot();
    vmm
}

/// KiB of the memory of process `pid` that is `file`, by one line of smaps (proc(5)).
fn mapped(pid: u32, file: &Path, line: &str) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let name = file.to_string_lossy();
    let mut of_file = false;
    let mut sum = 0;
    for text in smaps.lines() {
        let mut words = text.split_whitespace();
        match words.next() {
            Some(first) if !first.ends_with(':') => of_file = text.ends_with(&*name),
            Some(first) if of_file && first == line => sum += words.next().unwrap().parse::<u64>().unwrap(),
            _ => {}
        }
    }
    sum
}

#[test]
fn guests_share_the_pages_of_a_read_only_file_and_cannot_change_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("shared.img");
    patterned_file(&file, 8 * MIB);
    let before = sha256(&file);
    let guests = [guest_with(&file, true), guest_with(&file, true)];
    for guest in &guests {
        assert_eq!(guest.sh("cat /sys/block/pmem0/size").trim(), (8 * MIB / 512).to_string());
        assert_eq!(guest.sh("sha256sum < /dev/pmem0").split_whitespace().next().unwrap(), before);
    }
    for guest in &guests {
        let of = |line| mapped(guest.pid(), &file, line);
        assert_eq!(of("Rss:"), 8 << 10, "all has been read");
        assert_eq!(of("Private_Clean:") + of("Private_Dirty:"), 0, "every page is the other's too");
    }
    // The guest's kernel does not know that it may only read. What it writes goes nowhere.
    guests[0].sh("dd if=/dev/zero of=/dev/pmem0 bs=4k count=2 conv=fsync 2>/dev/null");
    for guest in &guests {
        let read = "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /dev/pmem0";
        assert_eq!(guest.sh(read).split_whitespace().next().unwrap(), before);
    }
    assert_eq!(sha256(&file), before);
}

#[test]
fn what_the_guest_flushes_is_in_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.img");
    patterned_file(&file, 6 * MIB);
    let guest = guest_with(&file, false);
    let inside = guest.sh("dd if=/dev/urandom of=/dev/pmem0 bs=64k count=50 seek=3 conv=fsync 2>/dev/null; \
         sha256sum < /dev/pmem0");
    assert_eq!(inside.split_whitespace().next().unwrap(), sha256(&file));
    // The device was asked to make it durable, and did. Each line has the increase since the one before.
    guest.put("/actions", json!({"action_type": "FlushMetrics"})).ok();
    let metrics = std::fs::read_to_string(guest.path("metrics")).unwrap();
    let sum = |name: &str| -> u64 {
        let of =
            |line: &str| serde_json::from_str::<Value>(line).unwrap()["pmem_data"][name].as_u64().unwrap();
        metrics.lines().map(of).sum()
    };
    assert!(sum("flush_count") > 0, "{metrics}");
    assert_eq!(sum("event_fails"), 0, "{metrics}");
}

/// Kills the VMM while the guest writes numbered records and says after each which one it has flushed:
/// every record it said is in the file.
#[test]
fn a_power_loss_loses_nothing_that_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("data.img");
    patterned_file(&file, 2 * MIB);
    let mut guest = guest_with(&file, false);
    loses_nothing_flushed(&mut guest, "/dev/pmem0", &file);
}

#[test]
fn file_systems_are_used_in_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ext4.img");
    File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-b", "4096"]).arg(&file).status().unwrap();
    assert!(made.success());
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/pmem/data", json!({"id": "data", "path_on_host": file})).ok();
    let root = artifact("PULAU_TEST_ROOTFS_MINIMAL");
    vmm.put("/pmem/programs", json!({"id": "programs", "path_on_host": root, "read_only": true})).ok();
    vmm.boot();

    vmm.sh("mkdir /tmp/data && mount -t ext4 -o dax=always /dev/pmem0 /tmp/data");
    assert!(vmm.sh("grep /tmp/data /proc/mounts").contains("dax=always"));
    vmm.sh("mkdir /tmp/programs && mount -t erofs -o ro,dax=always /dev/pmem1 /tmp/programs");
    assert!(vmm.sh("grep /tmp/programs /proc/mounts").contains("dax=always"));
    vmm.sh("cmp /tmp/programs/usr/bin/busybox /usr/bin/busybox");
    assert_eq!(vmm.sh("/tmp/programs/usr/bin/busybox echo runs").trim(), "runs");

    // What is read and written in place is in no page cache of the guest.
    vmm.sh("dd if=/dev/urandom of=/tmp/data/a bs=64k count=160 conv=fsync 2>/dev/null; \
         echo 3 > /proc/sys/vm/drop_caches");
    let cached = || -> u64 { vmm.sh("awk '/^Cached/ {print $2}' /proc/meminfo").trim().parse().unwrap() };
    let before = cached();
    let inside = vmm.sh("cp /tmp/data/a /tmp/data/b; sync; sha256sum < /tmp/data/b");
    assert!(cached() < before + 2048, "{} KiB before, {} KiB after", before, cached());

    // The same data is seen by whoever has the file next.
    vmm.sh("umount /tmp/data");
    drop(vmm);
    let next = guest_with(&file, true);
    next.sh("mkdir /tmp/data && mount -t ext4 -o ro,noload /dev/pmem0 /tmp/data");
    assert_eq!(next.sh("sha256sum < /tmp/data/b"), inside);
    assert_eq!(next.sh("sha256sum < /tmp/data/a"), inside);
}

#[test]
fn the_minimal_root_file_system_boots_from_persistent_memory() {
    let root = artifact("PULAU_TEST_ROOTFS_MINIMAL");
    for flags in ["", "rootflags=dax=always"] {
        let guest = guest_rooted_in(&root, true, &format!("pulau.overlay=tmpfs {flags}"));
        assert!(guest.sh("cat /proc/cmdline").contains("root=/dev/pmem0 ro"));
        assert_eq!(guest.sh("ls /sys/block | grep -v loop").trim(), "pmem0");
        assert_eq!(guest.sh("echo hello; touch /written && ls /written"), "hello\n/written\n");
    }
}

/// A guest copies its own root onto persistent memory; the next boots from there and writes to it, and the
/// one after finds what was written.
#[test]
fn a_writable_root_keeps_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("root.img");
    File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-b", "4096"]).arg(&file).status().unwrap();
    assert!(made.success());
    let mut maker = guest_with(&file, false);
    maker.sh("mkdir /tmp/new && mount -t ext4 /dev/pmem0 /tmp/new && \
         cp -a /bin /etc /lib /root /sbin /usr /var /tmp/new && \
         mkdir /tmp/new/dev /tmp/new/proc /tmp/new/run /tmp/new/sys /tmp/new/tmp && umount /tmp/new");
    maker.sh_and_end("poweroff");
    maker.exits_with(ExitCode::Ok as i32);

    let mut first = guest_rooted_in(&file, false, "rootflags=dax=always");
    assert!(first.sh("grep ' / ' /proc/mounts").contains("ext4 rw"));
    first.sh("echo kept > /root/file");
    first.sh_and_end("poweroff");
    first.exits_with(ExitCode::Ok as i32);
    let second = guest_rooted_in(&file, false, "");
    assert_eq!(second.sh("cat /root/file"), "kept\n");
}

/// A write to memory cannot fail: space is taken from the disk before the guest runs.
#[test]
fn a_file_with_holes_on_a_full_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(&small).status().unwrap();
    assert!(mounted.success(), "these tests run as root");
    let file = small.join("holes.img");
    File::create(&file).unwrap().set_len(16 << 20).unwrap();
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/pmem/data", json!({"id": "data", "path_on_host": file})).ok();
    vmm.put("/actions", json!({"action_type": "InstanceStart"})).refused(400, "holes.img");
    drop(vmm);
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
}

#[test]
fn files_that_do_not_fit_are_refused_by_name() {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let sizes = cpuinfo.lines().find(|l| l.starts_with("address sizes")).unwrap();
    let bits: u32 = sizes.split_whitespace().nth(3).unwrap().parse().unwrap();
    // As large as all that a processor can address, and not a byte of it written.
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(1 << bits).unwrap();
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/pmem/huge", json!({"id": "huge", "path_on_host": file.path(), "read_only": true})).ok();
    vmm.put("/actions", json!({"action_type": "InstanceStart"}))
        .refused(400, "pmem: device huge: path_on_host");
}
