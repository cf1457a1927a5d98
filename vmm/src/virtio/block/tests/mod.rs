//! The device driven as a guest would drive it, well and badly, over real files.

mod data;
mod disks;
mod flow;
mod hostile;

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::*;

use super::*;
use crate::config::{CacheType, DriveConfig, IoEngine};
use crate::event_loop::{EventLoop, EventSet, Subscriber, lock};
use crate::virtio::disk::Disk;
use crate::virtio::testing::{Buffer, Driver};
use crate::virtio::{F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, VirtioDevice};

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Where requests put their parts.
const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x2000;
const DATA: u64 = 0x10_0000;
/// No status is ever this.
const NO_STATUS: u8 = 0xee;

/// A file with `sectors` sectors of noise, and the same bytes.
fn noise_file(sectors: usize) -> (NamedTempFile, Vec<u8>) {
    let mut random = Random(sectors as u64 + 1);
    let bytes: Vec<u8> = (0..sectors * 512).map(|_| random.next() as u8).collect();
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();
    (file, bytes)
}

fn contents(file: &NamedTempFile) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file.reopen().unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Repeatable noise (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

fn config(file: &NamedTempFile, engine: IoEngine) -> DriveConfig {
    DriveConfig {
        drive_id: "disk0".into(),
        path_on_host: Some(file.path().to_owned()),
        cache_type: CacheType::Writeback,
        io_engine: Some(engine),
        ..DriveConfig::default()
    }
}

/// Both engines, or one where the host does not permit io_uring.
fn engines() -> Vec<IoEngine> {
    let (file, _) = noise_file(1);
    match Block::new(&config(&file, IoEngine::Async)) {
        Ok(_) => vec![IoEngine::Sync, IoEngine::Async],
        Err(e @ BlockError::Uring { .. }) => {
            eprintln!("not tested: {e}");
            vec![IoEngine::Sync]
        }
        Err(e) => panic!("{e}"),
    }
}

/// A device in an event loop, and its driver.
struct Rig {
    driver: Driver,
    block: Arc<Mutex<Block>>,
    event_loop: EventLoop,
}

impl Rig {
    fn new(config: &DriveConfig, features: u64) -> Self {
        Self::of(Block::new(config).unwrap(), features)
    }

    fn of(block: Block, features: u64) -> Self {
        let mut event_loop = EventLoop::new().unwrap();
        let block = Arc::new(Mutex::new(block));
        let events = event_loop.subscribe(block.clone());
        let driver = Driver::new(&[256]);
        {
            let mut block = lock(&block);
            block.attach(events);
            let features = features & block.features();
            block.activate(driver.activation(features)).unwrap();
        }
        Self { driver, block, event_loop }
    }

    fn with_engine(file: &NamedTempFile, engine: IoEngine) -> Self {
        Self::new(&config(file, engine), !F_RING_EVENT_IDX)
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(at, &header);
        self.driver.write(STATUS, &[NO_STATUS]);
    }

    /// The queue's notification.
    fn kick(&mut self) {
        lock(&self.block).process(0, EventSet::IN);
    }

    /// Runs the event loop until `done`, for a while.
    fn run_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < Duration::from_secs(20), "the device does not get on");
            self.event_loop.run_once(100).unwrap();
        }
    }

    /// Waits for one answer.
    fn answer(&mut self) -> (u16, u32) {
        let mut answer = None;
        self.run_until(|rig| {
            answer = rig.driver.queues[0].used_chain();
            answer.is_some()
        });
        answer.unwrap()
    }

    /// Makes one request of header, `data` and status, and returns status and bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.header(HEADER, kind, sector);
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, true));
        let head = self.driver.queues[0].offer(&chain);
        self.kick();
        let (answered, len) = self.answer();
        assert_eq!(answered, head);
        (self.driver.read(STATUS, 1)[0], len)
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, _) = self.request(VIRTIO_BLK_T_IN, sector, &[(DATA, len, true)]);
        (status, self.driver.read(DATA, len as usize))
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.driver.write(DATA, bytes);
        self.request(VIRTIO_BLK_T_OUT, sector, &[(DATA, bytes.len() as u32, false)]).0
    }
}
