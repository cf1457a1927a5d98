//! The block device, with either engine, on a small file. Whatever the guest does, the file keeps its size, and
//! its contents where the drive is read-only.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use pulau_vmm::config::{
    CacheType, DriveConfig, DriveUpdate, IoEngine, RateLimiterConfig, TokenBucketConfig,
};
use pulau_vmm::virtio::block::Block;
use pulau_vmm_fuzz::{Guest, Input, devices};
use tempfile::NamedTempFile;

const SECTORS: usize = 64;
const SIZE: usize = SECTORS * 512;

thread_local! {
    /// Two for the guest, and one it never writes.
    static DISKS: RefCell<[NamedTempFile; 3]> = RefCell::new([disk(), disk(), disk()]);
}

fn disk() -> NamedTempFile {
    // In memory where that is possible.
    let shm = std::path::Path::new("/dev/shm");
    let dir = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    NamedTempFile::new_in(dir).expect("a file")
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    file.read_exact_at(&mut bytes, 0).expect("the whole file");
    bytes
}

fuzz_target!(|data: &[u8]| {
    DISKS.with_borrow(|disks| {
        for disk in disks {
            disk.as_file().write_all_at(&[0x5a; SIZE], 0).expect("the file is there");
        }
        run(&mut Input(data), disks);
        for disk in disks {
            assert_eq!(disk.as_file().metadata().expect("metadata").len(), SIZE as u64);
        }
    });
});

fn run(input: &mut Input, disks: &[NamedTempFile; 3]) {
    let flags = input.u8();
    let read_only = flags & 1 != 0;
    // A burst and next to nothing after it; the timer is a token like any other.
    let bucket = TokenBucketConfig { size: 4, one_time_burst: Some(6), refill_time: 1_000_000 };
    let limits = RateLimiterConfig { ops: Some(bucket), bandwidth: None };
    let config = DriveConfig {
        drive_id: "fuzz".into(),
        path_on_host: Some(disks[0].path().to_owned()),
        is_read_only: Some(read_only),
        cache_type: if flags & 2 != 0 { CacheType::Writeback } else { CacheType::Unsafe },
        io_engine: Some(if flags & 4 != 0 { IoEngine::Async } else { IoEngine::Sync }),
        rate_limiter: (flags & 8 != 0).then_some(limits),
        ..DriveConfig::default()
    };
    let mut block = Block::new(&config).expect("the drive is fine");
    let mut guest = Guest::new(input, &mut block);
    let other = |_: &mut Guest, block: &mut Block, input: &mut Input| {
        let disk = &disks[usize::from(input.u8() % 2)];
        let update = DriveUpdate {
            drive_id: "fuzz".into(),
            path_on_host: Some(disk.path().to_owned()),
            rate_limiter: None,
        };
        block.update(&update).expect("both files are fine");
    };
    guest.run(input, &mut block, other, |guest, block| {
        let off = Some(TokenBucketConfig { size: 0, ..bucket });
        let rate_limiter = Some(RateLimiterConfig { ops: off, bandwidth: off });
        let path_on_host = Some(disks[2].path().to_owned());
        let update = DriveUpdate { drive_id: "fuzz".into(), path_on_host, rate_limiter };
        block.update(&update).expect("the file is fine");
        devices::block_works(guest, block, 0x5a);
    });
    drop(block);
    if read_only {
        assert!(disks.iter().all(|d| contents(d.as_file()) == [0x5a; SIZE]));
    }
}
