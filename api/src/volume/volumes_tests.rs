//! Volumes and snapshots over the real tools of e2fsprogs.

use std::collections::HashSet;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::files::Phase;

use super::super::VolumeError;
use super::*;

const MIB: u64 = 1 << 20;

struct Host {
    volumes: Volumes,
    dir: tempfile::TempDir,
}

fn host() -> Host {
    let dir = tempfile::tempdir().unwrap();
    Host { volumes: Volumes::open(dir.path(), 0).unwrap(), dir }
}

impl Host {
    fn create(&self, id: &str, content: Content<'_>, mib: u64) -> Result<(), VolumeError> {
        self.volumes.create(id, content, mib * MIB, &Task::quiet())
    }

    fn path(&self, id: &str) -> PathBuf {
        self.volumes.path(id).unwrap()
    }

    /// Nothing is on its way.
    fn is_tidy(&self) -> bool {
        ["volumes/tmp", "snapshots/tmp"]
            .iter()
            .all(|tmp| fs::read_dir(self.dir.path().join(tmp)).unwrap().next().is_none())
    }
}

/// `e2fsck` finds nothing to object to, without changing anything.
fn check_ext4(path: &Path) {
    let out = Command::new("e2fsck").arg("-fn").arg(path).output().expect("e2fsck (package e2fsprogs)");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

fn debugfs(path: &Path, request: &str) -> String {
    let out = Command::new("debugfs").args(["-w", "-R", request]).arg(path).output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap()
}

fn uuid(path: &Path) -> String {
    let out = Command::new("dumpe2fs").arg("-h").arg(path).output().unwrap();
    let out = String::from_utf8(out.stdout).unwrap();
    out.lines().find_map(|line| line.strip_prefix("Filesystem UUID:")).unwrap().trim().to_owned()
}

#[test]
fn ext4_volumes_are_sound_small_and_each_its_own() {
    let host = host();
    let mut uuids = HashSet::new();
    for id in ["vol-1", "vol-2", "vol-3"] {
        host.create(id, Content::Ext4, 8192).unwrap();
        check_ext4(&host.path(id));
        assert!(uuids.insert(uuid(&host.path(id))), "a UUID twice");
        let usage = host.volumes.usage(id).unwrap();
        assert_eq!(usage.size, 8192 * MIB);
        assert!(usage.allocated < MIB, "{usage:?}");
    }
    assert!(host.is_tidy());
    assert_eq!(host.volumes.list().unwrap(), ["vol-1", "vol-2", "vol-3"]);
    // Nothing is left for the guest's kernel to initialise in the background.
    let out = Command::new("dumpe2fs").arg(host.path("vol-1")).output().unwrap();
    let out = String::from_utf8(out.stdout).unwrap();
    let groups = out.matches("ITABLE_ZEROED").count();
    assert_eq!(groups, 64, "of 64 groups");
}

#[test]
fn grows_but_never_shrinks() {
    let host = host();
    host.create("v", Content::Ext4, 64).unwrap();
    host.volumes.grow("v", 256 * MIB).unwrap();
    host.volumes.grow("v", 256 * MIB).unwrap();
    host.volumes.grow_file_system("v", &Task::quiet()).unwrap();
    check_ext4(&host.path("v"));
    let blocks = debugfs(&host.path("v"), "stats");
    assert!(blocks.contains(&format!("Block count:              {}", 256 * MIB / 4096)), "{blocks}");
    assert!(matches!(host.volumes.grow("v", 64 * MIB), Err(VolumeError::Shrink { .. })));
    assert!(matches!(host.volumes.grow("w", 64 * MIB), Err(VolumeError::NotFound { .. })));
}

#[test]
fn snapshots_stay_as_they_were() {
    let host = host();
    let task = Task::quiet();
    host.create("v", Content::Blank, 64).unwrap();
    let write = |bytes: &[u8]| {
        File::options().write(true).open(host.path("v")).unwrap().write_all_at(bytes, 40 * MIB).unwrap();
    };
    let read = |path: &Path| {
        let mut bytes = [0; 6];
        File::open(path).unwrap().read_exact_at(&mut bytes, 40 * MIB).unwrap();
        bytes
    };
    write(b"before");
    let usage = host.volumes.snapshot("v", "snap-1", &task).unwrap();
    assert_eq!(usage.size, 64 * MIB);
    assert!(usage.allocated < MIB, "the holes were copied: {usage:?}");
    write(b"after!");
    // Taking it again leaves it.
    host.volumes.snapshot("v", "snap-1", &task).unwrap();
    host.volumes.restore("snap-1", "w", 128 * MIB, &task).unwrap();
    assert_eq!(&read(&host.path("w")), b"before");
    assert_eq!(host.volumes.usage("w").unwrap().size, 128 * MIB);

    host.volumes.delete("v").unwrap();
    host.volumes.delete("v").unwrap();
    host.volumes.delete_snapshot("snap-1").unwrap();
    assert!(matches!(
        host.volumes.restore("snap-1", "x", 64 * MIB, &task),
        Err(VolumeError::NotFound { .. })
    ));
    assert!(matches!(host.volumes.snapshot("v", "snap-2", &task), Err(VolumeError::NotFound { .. })));
    assert_eq!(host.volumes.list().unwrap(), ["w"]);
    assert!(host.volumes.list_snapshots().unwrap().is_empty());
    assert!(host.is_tidy());
}

#[test]
fn a_layer_is_cloned_with_its_files_and_grown() {
    let host = host();
    host.create("v", Content::Ext4, 64).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"kept").unwrap();
    debugfs(&host.path("v"), &format!("write {} kept", file.path().display()));
    for (id, mib) in [("w", 64), ("x", 512)] {
        host.create(id, Content::Layer(&host.path("v")), mib).unwrap();
        check_ext4(&host.path(id));
        assert_ne!(uuid(&host.path(id)), uuid(&host.path("v")));
        assert_eq!(debugfs(&host.path(id), "cat kept"), "kept");
    }
    assert!(matches!(
        host.create("y", Content::Layer(&host.path("v")), 32),
        Err(VolumeError::TooSmall { .. })
    ));
    // What is no file system of ours is refused rather than damaged.
    host.create("blank", Content::Blank, 64).unwrap();
    assert!(host.create("z", Content::Layer(&host.path("blank")), 64).is_err());
    assert!(matches!(host.volumes.usage("z"), Err(VolumeError::NotFound { .. })));
    assert!(host.is_tidy());
}

#[test]
fn repeats_are_harmless_and_bad_input_is_refused() {
    let host = host();
    host.create("v", Content::Blank, 64).unwrap();
    host.create("v", Content::Blank, 64).unwrap();
    assert!(
        matches!(host.create("v", Content::Blank, 65), Err(VolumeError::Exists { size, .. }) if size == 64 * MIB)
    );
    for id in ["", "..", "../v", "a/b", "A", "v.raw", "v\0", &"v".repeat(65)] {
        assert!(matches!(host.create(id, Content::Blank, 64), Err(VolumeError::Name { .. })), "{id:?}");
        assert!(matches!(host.volumes.delete(id), Err(VolumeError::Name { .. })), "{id:?}");
    }
    for size in [0, 1, 4096, MIB + 1, 17 << 40, u64::MAX] {
        let refused = host.volumes.create("w", Content::Blank, size, &Task::quiet());
        assert!(matches!(refused, Err(VolumeError::Size { .. })), "{size}");
    }
}

#[test]
fn cancelled_or_out_of_space_leaves_nothing() {
    let host = host();
    let big = host.dir.path().join("big");
    fs::write(&big, vec![1; 40 << 20]).unwrap();
    let (sender, progress) = std::sync::mpsc::channel();
    let task = Task::new(move |at| {
        let _ = sender.send(at);
    });
    task.cancel();
    let refused = host.volumes.create("v", Content::Disk(&big), 64 * MIB, &task);
    assert!(matches!(refused, Err(VolumeError::File(FileError::Cancelled))));
    assert_eq!(progress.try_recv().map(|at| (at.phase, at.done)), Ok((Phase::Copy, 0)));

    let greedy = Volumes::open(host.dir.path(), u64::MAX).unwrap();
    let refused = greedy.create("v", Content::Disk(&big), 64 * MIB, &Task::quiet()).unwrap_err();
    assert!(matches!(refused, VolumeError::File(FileError::NoSpace { .. })), "{refused}");
    assert!(matches!(host.volumes.usage("v"), Err(VolumeError::NotFound { .. })));
    assert!(host.is_tidy());

    fs::write(host.dir.path().join("volumes/tmp/new-left"), "").unwrap();
    assert_eq!(host.volumes.sweep().unwrap(), 1);
}
