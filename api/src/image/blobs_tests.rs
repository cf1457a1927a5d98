//! The blob store on its own, and on a disk that is too small.

use std::os::unix::fs::PermissionsExt;

use super::*;

fn blobs() -> (tempfile::TempDir, Blobs) {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), 0).unwrap();
    (dir, blobs)
}

fn add(blobs: &Blobs, bytes: &[u8]) -> Blob {
    blobs.add_reader(bytes, Path::new("test"), None, &Task::quiet()).unwrap()
}

fn tidy(blobs: &Blobs) -> bool {
    fs::read_dir(blobs.staging().dir()).unwrap().next().is_none()
}

#[test]
fn a_blob_is_named_by_its_content_and_read_only() {
    let (_dir, blobs) = blobs();
    let blob = add(&blobs, b"pulau");
    assert_eq!(blob, Blob { digest: Digest::of(b"pulau"), size: 5 });
    assert_eq!(add(&blobs, b"pulau"), blob, "the second time nothing changes");
    let path = blobs.path(&blob.digest);
    assert_eq!(fs::read(&path).unwrap(), b"pulau");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
    blobs.verify(&blob, &Task::quiet()).unwrap();
    assert!(tidy(&blobs));
}

#[test]
fn zeros_become_holes_wherever_they_are() {
    let (dir, blobs) = blobs();
    let mut bytes = vec![0; (3 << 20) + 17];
    for at in [0, 4095, 8192, 1 << 20, (2 << 20) - 1, (3 << 20) + 3] {
        bytes[at] = 7;
    }
    let from = dir.path().join("from");
    fs::write(&from, &bytes).unwrap();
    let blob = blobs.add_file(&from, &Task::quiet()).unwrap();
    assert_eq!(blob, Blob { digest: Digest::of(&bytes), size: bytes.len() as u64 });
    let path = blobs.path(&blob.digest);
    assert_eq!(fs::read(&path).unwrap(), bytes);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 6 * 4096);
}

#[test]
fn damage_is_found() {
    let (_dir, blobs) = blobs();
    let blob = add(&blobs, b"pulau");
    let path = blobs.path(&blob.digest);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&path, b"pulaU").unwrap();
    assert!(matches!(blobs.verify(&blob, &Task::quiet()), Err(ImageError::Digest { .. })));
    fs::remove_file(&path).unwrap();
    assert!(matches!(blobs.verify(&blob, &Task::quiet()), Err(ImageError::MissingBlob(_))));
}

#[test]
fn collection_removes_what_is_old_and_unreferenced() {
    let (_dir, blobs) = blobs();
    let (kept, lost) = (add(&blobs, b"kept"), add(&blobs, b"lost"));
    let referenced = HashSet::from([kept.digest]);
    assert_eq!(blobs.collect(&referenced).unwrap(), 0);
    assert!(blobs.read(&lost.digest).is_ok(), "it is young");
    assert_eq!(blobs.collect_older(&referenced, Duration::ZERO).unwrap(), 4096);
    assert!(blobs.read(&kept.digest).is_ok());
    assert!(matches!(blobs.read(&lost.digest), Err(ImageError::MissingBlob(_))));
}

#[test]
fn cancelled_or_out_of_space_leaves_nothing() {
    let (dir, blobs) = blobs();
    let task = Task::quiet();
    task.cancel();
    let refused = blobs.add_reader(io::repeat(1), Path::new("test"), None, &task);
    assert!(matches!(refused, Err(ImageError::File(FileError::Cancelled))));

    let greedy = Blobs::open(dir.path(), u64::MAX).unwrap();
    let refused = greedy.add_reader(io::repeat(1), Path::new("test"), None, &Task::quiet());
    assert!(matches!(refused, Err(ImageError::File(FileError::NoSpace { .. }))));
    assert!(tidy(&blobs));
}
