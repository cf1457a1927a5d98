//! Files that are, or are not, disks; and what becomes of one while in use.

use super::*;

fn open(path: impl Into<PathBuf>, read_only: bool) -> Result<Disk, String> {
    Disk::open(&path.into(), read_only).map_err(|e| e.to_string())
}

#[test]
fn what_is_no_disk_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let error = |name: &str| open(path(name), false).unwrap_err();

    assert!(error("missing").contains("missing") && error("missing").contains("No such file"));
    std::fs::create_dir(path("dir")).unwrap();
    assert!(error("dir").contains("dir"));
    assert!(open(path("dir"), true).unwrap_err().contains("neither a regular file nor a block device"));
    nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR)
        .unwrap();
    // Not even opening it waits.
    assert!(open(path("pipe"), true).unwrap_err().contains("neither a regular file"));
    assert!(error("pipe").contains("neither a regular file"));
    assert!(open("/dev/null", true).unwrap_err().contains("/dev/null"));
    std::fs::write(path("empty"), b"").unwrap();
    assert!(error("empty").contains("is empty"));
    std::fs::write(path("odd"), [0; 1025]).unwrap();
    assert!(error("odd").contains("1025 bytes, which is not a whole number of 512-byte sectors"));

    let config = DriveConfig { drive_id: "root".into(), ..DriveConfig::default() };
    assert_eq!(Block::new(&config).err().unwrap().to_string(), "drives: drive root: path_on_host is missing");
    let config = DriveConfig { path_on_host: Some(path("odd")), ..config };
    let message = Block::new(&config).err().unwrap().to_string();
    assert!(message.starts_with("drives: drive root: path_on_host: "), "{message}");
}

#[test]
fn one_writer_or_many_readers() {
    let (file, _) = noise_file(1);
    let link = file.path().with_extension("link");
    std::fs::hard_link(file.path(), &link).unwrap();
    let writer = open(file.path(), false).unwrap();
    assert!(open(file.path(), false).unwrap_err().contains("is in use"));
    assert!(open(&link, true).unwrap_err().contains("is in use"), "under another name too");
    drop(writer);
    let readers = [open(file.path(), true).unwrap(), open(&link, true).unwrap()];
    assert!(open(file.path(), false).unwrap_err().contains("only while nobody else uses it"));
    drop(readers);
    drop(open(file.path(), false).unwrap());
    std::fs::remove_file(link).unwrap();
}

#[test]
fn a_drive_lets_go_of_its_file_when_it_ends() {
    for engine in engines() {
        let (file, _) = noise_file(64);
        for _ in 0..20 {
            let mut rig = Rig::with_engine(&file, engine);
            rig.header(HEADER, VIRTIO_BLK_T_IN, 0);
            rig.driver.queues[0].offer(&[(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)]);
            rig.kick();
        }
    }
}

fn update(path: &std::path::Path) -> crate::config::DriveUpdate {
    crate::config::DriveUpdate {
        drive_id: "disk0".into(),
        path_on_host: Some(path.to_owned()),
        rate_limiter: None,
    }
}

#[test]
fn another_file_takes_the_place_of_the_first() {
    for engine in engines() {
        let (first, first_bytes) = noise_file(16);
        let (second, second_bytes) = noise_file(32);
        let mut rig = Rig::with_engine(&first, engine);
        assert_eq!(rig.read(2, 512), (OK, first_bytes[1024..1536].to_vec()));
        rig.driver.interrupted();

        lock(&rig.block).update(&update(second.path())).unwrap();
        assert!(rig.driver.interrupted());
        let mut capacity = [0; 8];
        lock(&rig.block).read_config(0, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 32);
        assert_eq!(rig.read(31, 512), (OK, second_bytes[31 * 512..].to_vec()));
        assert_eq!(rig.write(0, &[5; 512]), OK);
        assert!(contents(&first) == first_bytes);
        assert_eq!(contents(&second)[..512], [5; 512]);
        drop(open(first.path(), false).expect("the first file is free"));
        open(second.path(), true).expect_err("the second is in use");

        // And back, and the same file again after it has grown.
        lock(&rig.block).update(&update(first.path())).unwrap();
        assert_eq!(rig.read(16, 512).0, IOERR);
        first.as_file().set_len(20 * 512).unwrap();
        lock(&rig.block).update(&update(first.path())).unwrap();
        assert_eq!(rig.read(16, 512), (OK, vec![0; 512]));
        assert_eq!(lock(&rig.block).metrics().update_count.total(), 3);
    }
}

#[test]
fn a_failed_change_leaves_everything_as_it_was() {
    for engine in engines() {
        let (file, bytes) = noise_file(16);
        let (taken, _) = noise_file(16);
        let _writer = open(taken.path(), false).unwrap();
        let mut rig = Rig::with_engine(&file, engine);
        for path in ["/nowhere".as_ref(), taken.path(), "/tmp".as_ref()] {
            let error = lock(&rig.block).update(&update(path)).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        assert!(!rig.driver.interrupted());
        assert_eq!(rig.read(1, 512), (OK, bytes[512..1024].to_vec()));
        assert_eq!(lock(&rig.block).metrics().update_fails.total(), 3);
    }
}

#[test]
fn a_file_cut_short_under_the_device_fails_reads_only() {
    for engine in engines() {
        let (file, bytes) = noise_file(64);
        let mut rig = Rig::with_engine(&file, engine);
        file.as_file().set_len(10 * 512).unwrap();
        assert_eq!(rig.read(9, 512), (OK, bytes[9 * 512..10 * 512].to_vec()));
        assert_eq!(rig.read(9, 1024).0, IOERR);
        assert_eq!(rig.read(40, 4096).0, IOERR);
        assert_eq!(rig.write(40, &[3; 512]), OK);
        assert!(!rig.driver.broken());
        assert_eq!(lock(&rig.block).metrics().execute_fails.total(), 2);
    }
}

#[test]
fn a_host_that_refuses_writes_is_an_error_to_the_guest_only() {
    for engine in engines() {
        // As on a full disk: space for some, then no more. The seal's error is another, its path the same.
        let memfd =
            nix::sys::memfd::memfd_create(c"disk", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let memfd = std::fs::File::from(memfd);
        memfd.set_len(64 * 512).unwrap();
        memfd.write_all_at(&[7; 512], 0).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memfd));
        let config = DriveConfig {
            drive_id: "full".into(),
            path_on_host: Some(path.into()),
            io_engine: Some(engine),
            cache_type: CacheType::Writeback,
            ..DriveConfig::default()
        };
        let mut rig = Rig::new(&config, !F_RING_EVENT_IDX);
        let seal = nix::fcntl::SealFlag::F_SEAL_WRITE;
        nix::fcntl::fcntl(&memfd, nix::fcntl::FcntlArg::F_ADD_SEALS(seal)).unwrap();
        for _ in 0..3 {
            assert_eq!(rig.write(0, &[1; 4096]), IOERR);
        }
        assert_eq!(rig.read(0, 512), (OK, vec![7; 512]));
        assert_eq!(lock(&rig.block).metrics().execute_fails.total(), 3);
    }
}
