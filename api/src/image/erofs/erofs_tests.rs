//! File systems made from layers, checked by `fsck.erofs` and seen through the kernel. Needs root and loop devices.

use std::collections::HashSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, FileTypeExt, MetadataExt};
use std::path::Path;

use tar::EntryType;

use crate::files::{Staged, Task};
use crate::image::rootfs::RootFs;
use crate::image::testing::{Archive, mounted};
use crate::image::{Blobs, ImageError};

/// Version 2, as `setcap cap_dac_override,cap_fowner=p` writes it; with a newline in it.
const CAPABILITY: &[u8] = b"\x00\x00\x00\x02\n\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

struct Built {
    image: Staged,
    _dir: tempfile::TempDir,
}

fn build(layers: &[Archive]) -> Result<Built, ImageError> {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), 0).unwrap();
    let image = blobs.staging().file().unwrap();
    let task = Task::quiet();
    let mut root = RootFs::new(&blobs, &image, 64 << 20, &task)?;
    for layer in layers {
        root.apply(&layer.clone().finish()[..], "layer")?;
    }
    root.finish(*b"sixteen bytes...")?;
    Ok(Built { image, _dir: dir })
}

fn see(layers: &[Archive], check: impl FnOnce(&Path) + Send) {
    let built = build(layers).unwrap();
    mounted(built.image.path(), check);
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let name = std::ffi::CString::new(name).unwrap();
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut value = vec![0; 4096];
    // SAFETY: both strings end with NUL, and the buffer is as long as is said.
    let size =
        unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    usize::try_from(size).ok().map(|size| value[..size].to_vec())
}

/// Bytes that differ from place to place.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 7 + at % 251) as u8).collect()
}

#[test]
fn contents_of_every_size_come_back() {
    let sizes = [0, 1, 511, 2047, 2048, 2049, 4095, 4096, 4097, 8192, 100_000, 5 << 20];
    let layer = sizes
        .iter()
        .fold(Archive::default(), |layer, size| layer.file(&format!("file-{size}"), &pattern(*size)));
    see(&[layer], |dir| {
        for size in sizes {
            assert_eq!(fs::read(dir.join(format!("file-{size}"))).unwrap(), pattern(size), "{size}");
        }
    });
}

#[test]
fn metadata_is_kept() {
    // A link longer than what is put after an inode.
    let long = "x/".repeat(1500);
    let mode = |mode: u32| move |header: &mut tar::Header| header.set_mode(mode);
    let layer = Archive::default()
        .with(EntryType::Directory, "tmp", "", b"", mode(0o1777))
        .pax(&[
            ("uid", b"4000000000"),
            ("SCHILY.xattr.security.capability", CAPABILITY),
            ("SCHILY.xattr.user.name", b"value"),
            ("SCHILY.xattr.user.empty", b""),
        ])
        .with(EntryType::Regular, "suid", "", b"program", mode(0o4755))
        .hard_link("again", "suid")
        .symlink("short", "suid")
        .pax(&[("linkpath", long.as_bytes())])
        .symlink("long", "")
        .device(EntryType::Char, "char", 1234, 0xf_1234)
        .device(EntryType::Block, "block", 8, 1)
        .entry(EntryType::Fifo, "fifo", "", b"");
    see(&[layer], |dir| {
        let meta = |name: &str| fs::symlink_metadata(dir.join(name)).unwrap();
        assert_eq!(meta("tmp").mode(), libc::S_IFDIR | 0o1777);
        let suid = meta("suid");
        assert_eq!((suid.mode(), suid.nlink()), (libc::S_IFREG | 0o4755, 2));
        assert_eq!((suid.uid(), suid.gid(), suid.mtime()), (4_000_000_000, 100, 1_700_000_000));
        assert_eq!(meta("again").ino(), suid.ino());
        let value = xattr(&dir.join("suid"), "security.capability").unwrap();
        assert_eq!(value, CAPABILITY);
        assert_eq!(xattr(&dir.join("again"), "user.name").unwrap(), b"value");
        assert_eq!(xattr(&dir.join("again"), "user.empty").unwrap(), b"");
        assert_eq!(xattr(&dir.join("short"), "user.name"), None);
        assert_eq!(fs::read(dir.join("suid")).unwrap(), b"program");
        assert_eq!(fs::read_link(dir.join("short")).unwrap(), Path::new("suid"));
        assert_eq!(fs::read_link(dir.join("long")).unwrap().as_os_str(), long.as_str());
        assert!(meta("char").file_type().is_char_device() && meta("block").file_type().is_block_device());
        assert_eq!(meta("char").rdev(), libc::makedev(1234, 0xf_1234));
        assert_eq!(meta("block").rdev(), libc::makedev(8, 1));
        assert!(meta("fifo").file_type().is_fifo());
        assert_eq!(meta("").nlink(), 3);
    });
}

#[test]
fn directories_of_every_size_can_be_searched() {
    // So many that each has several blocks, and names of all lengths.
    let name = |n: usize| format!("{:0width$}", n, width = 1 + n % 90);
    let counts = [0, 1, 50, 100, 200, 1000];
    let mut layer = Archive::default();
    for count in counts {
        layer = layer.directory(&format!("dir-{count}"));
        let names: HashSet<String> = (0..count).map(name).collect();
        for name in names {
            layer = layer.file(&format!("dir-{count}/{name}"), name.as_bytes());
        }
    }
    // Names that sort before `.`, and one of the longest kind.
    let longest = "n".repeat(255);
    layer = layer
        .file("dir-50/!", b"!")
        .file("dir-50/-", b"-")
        .pax(&[("path", longest.as_bytes())])
        .file("x", b"");
    see(&[layer], |dir| {
        for count in counts {
            let dir = dir.join(format!("dir-{count}"));
            let expected: HashSet<String> = (0..count).map(name).collect();
            for name in &expected {
                assert_eq!(fs::read(dir.join(name)).unwrap(), name.as_bytes());
            }
            assert!(!dir.join("no such name").exists());
            let listed = fs::read_dir(&dir).unwrap().count();
            assert_eq!(listed, expected.len() + if count == 50 { 2 } else { 0 });
        }
        assert!(dir.join(&longest).exists() && dir.join("dir-50/!").exists());
        let inodes: HashSet<u64> =
            fs::read_dir(dir.join("dir-1000")).unwrap().map(|entry| entry.unwrap().ino()).collect();
        assert!(inodes.len() > 900 && !inodes.contains(&0));
    });
}

#[test]
fn what_a_later_layer_replaces_takes_no_space_and_the_same_layers_give_the_same_bytes() {
    let big = pattern(20 << 20);
    let layers = [
        Archive::default().file("gone", &big).file("replaced", &big).file("kept", b"kept").directory("d"),
        Archive::default().file(".wh.gone", b"").file("replaced", b"small"),
    ];
    let (a, b) = (build(&layers).unwrap(), build(&layers).unwrap());
    assert_eq!(fs::read(a.image.path()).unwrap(), fs::read(b.image.path()).unwrap());
    let meta = a.image.file().metadata().unwrap();
    assert!(meta.blocks() * 512 < 1 << 20, "{} bytes", meta.blocks() * 512);
    assert_eq!(meta.len() % (2 << 20), 0);
    mounted(a.image.path(), |dir| {
        assert!(!dir.join("gone").exists());
        assert_eq!(fs::read(dir.join("replaced")).unwrap(), b"small");
        assert_eq!(fs::read(dir.join("kept")).unwrap(), b"kept");
    });
}

#[test]
fn limits_hold() {
    let error = |layer: Archive| build(&[layer]).err().unwrap();
    let half = pattern(40 << 20);
    let large = Archive::default().file("a", &half).file("b", &half);
    assert!(matches!(error(large), ImageError::TooLarge { .. }));
    let attributes = Archive::default().pax(&[("SCHILY.xattr.user.x", &[1; 2000])]).file("x", b"");
    assert!(error(attributes).to_string().contains("extended attributes are too long"));
    let through = Archive::default().file("file", b"").file("file/below", b"");
    assert!(error(through).to_string().contains("in the way"));
    let missing = Archive::default().hard_link("x", "etc/shadow");
    assert!(error(missing).to_string().contains("not there"));
}
