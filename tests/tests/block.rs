//! Drives do real I/O from the guest, and what the guest flushed is on the disk whatever happens next.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pulau_tests::power_loss::loses_nothing_flushed;
use pulau_tests::vmm::{Vmm, drive};
use pulau_tests::{PATIENCE, sha256, wait_for};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const ENGINES: [&str; 2] = ["Sync", "Async"];

/// A file system with little room, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(dir.path())
            .status();
        assert!(mount.unwrap().success(), "these tests run as root");
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

/// A disk of `mib` MiB whose bytes tell where they are.
fn patterned_disk(path: &Path, mib: usize) {
    let mut file = File::create(path).unwrap();
    for block in 0..mib * MIB / 4096 {
        let mut bytes = [0; 4096];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = (block * 31 + i * 7 + (i >> 8)) as u8;
        }
        file.write_all(&bytes).unwrap();
    }
}

fn with(mut config: Value, more: Value) -> Value {
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// A booted guest with a second drive, `/dev/vdb`.
fn guest_with_disk(path: impl FnOnce(&Vmm) -> PathBuf, more: Value) -> (Vmm, PathBuf) {
    let vmm = Vmm::start();
    vmm.configure(2, 256, "");
    let path = path(&vmm);
    vmm.put("/drives/data", with(drive("data", &path, false, false), more)).ok();
    vmm.boot();
    (vmm, path)
}

fn disk_of(mib: usize) -> impl FnOnce(&Vmm) -> PathBuf {
    move |vmm| {
        let path = vmm.path("data.img");
        patterned_disk(&path, mib);
        path
    }
}

#[test]
fn guests_read_what_is_there_with_either_engine() {
    for engine in ENGINES {
        let (vmm, path) = guest_with_disk(disk_of(16), json!({"io_engine": engine}));
        assert_eq!(
            vmm.sh("sha256sum /dev/vdb").split_whitespace().next().unwrap(),
            sha256(&path),
            "{engine}"
        );
        assert_eq!(vmm.sh("cat /sys/block/vdb/size").trim(), (16 * MIB / 512).to_string());
        assert_eq!(vmm.sh("cat /sys/block/vdb/serial"), "data");
    }
}

#[test]
fn what_the_guest_writes_and_syncs_is_in_the_file() {
    for engine in ENGINES {
        let (vmm, path) =
            guest_with_disk(disk_of(16), json!({"io_engine": engine, "cache_type": "Writeback"}));
        assert_eq!(vmm.sh("cat /sys/block/vdb/queue/write_cache").trim(), "write back");
        let inside = vmm
            .sh("dd if=/dev/urandom of=/dev/vdb bs=64k count=200 seek=3 conv=fsync 2>/dev/null; \
             echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/vdb");
        assert_eq!(inside.split_whitespace().next().unwrap(), sha256(&path), "{engine}");
    }
}

#[test]
fn a_read_only_drive_refuses_writes() {
    let (vmm, path) = guest_with_disk(disk_of(1), json!({"is_read_only": true}));
    let before = sha256(&path);
    assert_eq!(vmm.sh("cat /sys/block/vdb/ro").trim(), "1");
    vmm.sh("! dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync 2>/dev/null");
    assert_eq!(sha256(&path), before);
}

#[test]
fn discarded_blocks_are_given_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let (vmm, path) = guest_with_disk(disk_of(8), json!({}));
    let before = path.metadata().unwrap().blocks();
    vmm.sh("blkdiscard -o 1048576 -l 4194304 /dev/vdb");
    assert!(path.metadata().unwrap().blocks() <= before - 4 * 2048 + 16);
    let mut discarded = vec![1; 4 * MIB];
    File::open(&path).unwrap().read_exact_at(&mut discarded, MIB as u64).unwrap();
    assert!(discarded.iter().all(|b| *b == 0));
}

/// Kills the VMM while the guest writes numbered records and says after each which one it has flushed:
/// every record it said is on the disk.
#[test]
fn a_power_loss_loses_nothing_that_was_flushed() {
    for engine in ENGINES {
        let (mut vmm, path) =
            guest_with_disk(disk_of(8), json!({"io_engine": engine, "cache_type": "Writeback"}));
        loses_nothing_flushed(&mut vmm, "/dev/vdb", &path);
    }
}

#[test]
fn another_file_can_be_put_behind_a_drive() {
    let (vmm, _) = guest_with_disk(disk_of(4), json!({}));
    let other = vmm.path("other.img");
    patterned_disk(&other, 9);
    vmm.sh("true");
    vmm.patch("/drives/data", json!({"drive_id": "data", "path_on_host": other})).ok();
    wait_for("the new size", PATIENCE, || {
        (vmm.sh("cat /sys/block/vdb/size").trim() == (9 * MIB / 512).to_string()).then_some(())
    });
    assert_eq!(vmm.sh("sha256sum /dev/vdb").split_whitespace().next().unwrap(), sha256(&other));
    vmm.patch("/drives/data", json!({"drive_id": "data", "path_on_host": "/nowhere"}))
        .refused(400, "/nowhere");
    assert_eq!(vmm.sh("cat /sys/block/vdb/size").trim(), (9 * MIB / 512).to_string());
}

#[test]
fn a_full_disk_is_an_error_of_the_guest_and_not_of_the_vmm() {
    let small = SmallDisk::new("size=2m");
    let path = small.0.path().join("disk.img");
    File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let (mut vmm, _) = guest_with_disk(|_| path, json!({"cache_type": "Writeback"}));
    vmm.sh("! dd if=/dev/urandom of=/dev/vdb bs=64k count=100 conv=fsync 2>/dev/null");
    assert!(vmm.is_running());
    // Whoever operates the host is told which file it is, once.
    let log = vmm.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("No space left on device")).collect();
    assert!(matches!(&told[..], [line] if line.contains("drive data") && line.contains("disk.img")), "{log}");
    assert_eq!(vmm.sh("echo alive"), "alive\n");
}

#[test]
fn rate_limits_hold() {
    let limit = json!({"rate_limiter": {"bandwidth": {"size": MIB / 2, "refill_time": 1000}}});
    let (vmm, _) = guest_with_disk(disk_of(8), limit);
    vmm.sh("true");
    let start = std::time::Instant::now();
    vmm.sh("dd if=/dev/vdb of=/dev/null bs=64k count=64 2>/dev/null");
    let elapsed = start.elapsed().as_secs_f64();
    // 4 MiB at half a MiB a second, the first of which is there at once. Slow enough that a busy machine is
    // much faster without the limit.
    assert!(elapsed > 6.0, "{elapsed} s");
    let off = json!({"bandwidth": {"size": 0, "refill_time": 0}});
    vmm.patch("/drives/data", json!({"drive_id": "data", "rate_limiter": off})).ok();
    let start = std::time::Instant::now();
    vmm.sh("echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vdb of=/dev/null bs=64k count=64 2>/dev/null");
    assert!(start.elapsed().as_secs_f64() < elapsed / 2.0);
}

#[test]
fn bad_disks_are_refused_by_name() {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    let put = |path: &Path| {
        let configured = vmm.put("/drives/data", drive("data", path, false, false));
        if configured.status == 204 {
            vmm.put("/actions", json!({"action_type": "InstanceStart"}))
        } else {
            configured
        }
    };
    put(Path::new("/no/such/disk")).refused(400, "/no/such/disk");
    let odd = vmm.path("odd.img");
    File::create(&odd).unwrap().write_all(&[1; 700]).unwrap();
    put(&odd).refused(400, "odd.img");
    put(vmm.dir()).refused(400, "path_on_host");
}

#[test]
fn two_writers_of_one_disk_are_refused_and_two_readers_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data.img");
    patterned_disk(&path, 1);
    let (first, _) = guest_with_disk(|_| path.clone(), json!({}));
    first.sh("true");
    let second = Vmm::start();
    second.configure(1, 128, "");
    second.put("/drives/data", drive("data", &path, false, false)).ok();
    second.put("/actions", json!({"action_type": "InstanceStart"})).refused(400, "data.img");
    drop(first);
    second.boot();
    second.sh("cat /dev/vdb > /dev/null");

    let mut contents = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut contents).unwrap();
    let shared = second.path("shared.img");
    std::fs::write(&shared, contents).unwrap();
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let vmm = Vmm::start();
            vmm.configure(1, 128, "");
            vmm.put("/drives/data", drive("data", &shared, false, true)).ok();
            vmm.boot();
            vmm
        })
        .collect();
    for reader in &readers {
        assert_eq!(reader.sh("sha256sum /dev/vdb").split_whitespace().next().unwrap(), sha256(&shared));
    }
}
