//! Imports that end the hard way: killed at any moment, or on a disk that fills up. Needs root, for the small disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::testing::{Archive, kernel, run};
use super::*;
use crate::files::{FileError, Task};
use crate::volume::{Content, VolumeError, Volumes};

const CHILD: &str = "PULAU_TEST_IMPORT_INTO";

fn images(dir: &Path) -> Images {
    Images::open(dir, Limits::default(), 0).unwrap()
}

fn staged(dir: &Path) -> usize {
    fs::read_dir(dir.join("images/tmp")).unwrap().count()
}

/// Writes a layout with one image of some 48 MiB, and returns what imports it.
fn import(dir: &Path) -> OciImport {
    use serde_json::json;
    let data: Vec<u8> =
        (0..(48u32 << 20) / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let layer = data
        .chunks(5 << 20)
        .enumerate()
        .fold(Archive::default(), |layer, (n, chunk)| layer.file(&format!("file-{n}"), chunk))
        .finish();
    let layout = dir.join("layout");
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let add = |bytes: &[u8]| {
        fs::write(layout.join("blobs/sha256").join(Digest::of(bytes).hex()), bytes).unwrap();
        json!({ "digest": Digest::of(bytes), "size": bytes.len() })
    };
    let config = json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] },
    });
    let config = add(config.to_string().as_bytes());
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [add(&layer)] });
    let index = json!({ "schemaVersion": 2, "manifests": [add(manifest.to_string().as_bytes())] });
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("agent"), "agent").unwrap();
    described(dir)
}

fn described(dir: &Path) -> OciImport {
    OciImport {
        source: OciSource::Local { path: dir.join("layout"), tag: None },
        agent: dir.join("agent"),
        kernel: kernel(dir),
        initrd: None,
        boot_args: String::new(),
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

/// Not a test by itself: what the next one starts in a process of its own, and kills.
#[test]
fn imports_when_told_to() {
    let Some(dir) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    println!("begun");
    block_on(images(&dir).import_oci(described(&dir), &Task::quiet())).unwrap();
}

#[test]
fn killed_at_any_moment_an_import_leaves_only_what_a_sweep_removes() {
    let dir = tempfile::tempdir().unwrap();
    let import = import(dir.path());
    let mut swept = 0;
    for moment in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "image::crash_tests::imports_when_told_to", "--nocapture"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("begun") {
            assert!(std::io::BufRead::read_line(&mut out, &mut line).unwrap() > 0, "{line}");
        }
        std::thread::sleep(Duration::from_millis(moment * 40));
        child.kill().unwrap();
        child.wait().unwrap();
        let images = images(dir.path());
        let left = staged(dir.path());
        assert_eq!(images.sweep().unwrap(), left);
        assert_eq!(staged(dir.path()), 0);
        swept += left;
        // Whatever has a blob's name is whole.
        for entry in fs::read_dir(dir.path().join("images/blobs/sha256")).unwrap() {
            let entry = entry.unwrap();
            let digest = format!("sha256:{}", entry.file_name().to_str().unwrap()).parse().unwrap();
            let blob = Blob { digest, size: entry.metadata().unwrap().len() };
            images.blobs().verify(&blob, &Task::quiet()).unwrap();
        }
    }
    assert!(swept > 0, "no import was killed while it wrote");
    let images = images(dir.path());
    let manifest = block_on(images.import_oci(import, &Task::quiet())).unwrap();
    block_on(images.verify(&manifest, &Task::quiet())).unwrap();
}

/// Runs `check` on a file system of `mib` MiB, which nothing else sees.
fn on_small_disk(mib: usize, check: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("this test needs root");
            run(Command::new("mount").args(["--make-rprivate", "/"]));
            let size = format!("size={mib}m");
            run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()));
            check(dir.path());
        });
        thread.join().unwrap();
    });
}

fn is_full(error: &FileError) -> bool {
    matches!(error, FileError::NoSpace { .. })
}

#[test]
fn a_full_disk_is_said_to_be_full_and_nothing_is_left() {
    let elsewhere = tempfile::tempdir().unwrap();
    let import = import(elsewhere.path());
    let root = elsewhere.path().join("disk");
    // A file system that fills its 48 MiB.
    fs::copy(
        elsewhere.path().join("layout/blobs/sha256").read_dir().unwrap().fold(PathBuf::new(), larger),
        &root,
    )
    .unwrap();
    let disk = fs::File::options().write(true).open(&root).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, &0xe0f5_e1e2_u32.to_le_bytes(), 1024).unwrap();
    let files =
        DiskImport { root: root.clone(), kernel: Some(kernel(elsewhere.path())), ..Default::default() };
    on_small_disk(16, |dir| {
        let images = images(dir);
        for error in [
            block_on(images.import_oci(import.clone(), &Task::quiet())).unwrap_err(),
            block_on(images.import_disk(files.clone(), &Task::quiet())).unwrap_err(),
        ] {
            assert!(matches!(&error, ImageError::File(error) if is_full(error)), "{error}");
        }
        assert_eq!(staged(dir), 0);
        // The kernel came in before the disk was full; it goes with the next collection.
        assert_eq!(fs::read_dir(dir.join("images/blobs/sha256")).unwrap().count(), 1);

        let volumes = Volumes::open(dir, 0).unwrap();
        let error = volumes.create("v", Content::Disk(&root), 64 << 20, &Task::quiet()).unwrap_err();
        assert!(matches!(&error, VolumeError::File(error) if is_full(error)), "{error}");
        // Not promised before, but met while writing.
        fs::write(dir.join("filler"), vec![1; 20 << 20]).unwrap_err();
        let error = volumes.create("w", Content::Ext4, 1 << 30, &Task::quiet()).unwrap_err();
        assert!(
            matches!(&error, VolumeError::File(FileError::NoSpace { .. } | FileError::Tool { .. })),
            "{error}"
        );
        assert!(volumes.list().unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.join("volumes/tmp")).unwrap().count(), 0);
    });
}

fn larger(best: PathBuf, entry: std::io::Result<fs::DirEntry>) -> PathBuf {
    let size = |path: &Path| path.metadata().map_or(0, |meta| meta.len());
    let path = entry.unwrap().path();
    if size(&path) > size(&best) { path } else { best }
}
