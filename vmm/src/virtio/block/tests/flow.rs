//! When requests are done, and when the driver hears of it.

use super::*;
use crate::config::{DriveUpdate, RateLimiterConfig, TokenBucketConfig};

fn read_chain(rig: &mut Rig, slot: u64, sector: u64) -> u16 {
    let header = HEADER + slot * 32;
    rig.header(header, VIRTIO_BLK_T_IN, sector);
    rig.driver.queues[0].offer(&[
        (header, 16, false),
        (DATA + slot * 4096, 4096, true),
        (header + 16, 1, true),
    ])
}

#[test]
fn a_batch_is_one_interrupt() {
    for event_idx in [0, F_RING_EVENT_IDX] {
        let (file, _) = noise_file(1024);
        let mut rig = Rig::new(&config(&file, IoEngine::Sync), event_idx);
        for slot in 0..32 {
            read_chain(&mut rig, slot, slot * 8);
        }
        rig.kick();
        assert_eq!(rig.driver.interrupt.irqfd().read().unwrap(), 1);
        let answered = std::iter::from_fn(|| rig.driver.queues[0].used_chain()).count();
        assert_eq!(answered, 32);
        // A notification for nothing is no interrupt.
        rig.kick();
        assert!(!rig.driver.interrupted());
    }
}

#[test]
fn a_driver_that_asks_later_is_interrupted_later() {
    let (file, _) = noise_file(1024);
    let mut rig = Rig::new(&config(&file, IoEngine::Sync), F_RING_EVENT_IDX);
    read_chain(&mut rig, 0, 0);
    rig.kick();
    assert!(rig.driver.interrupted());
    // The driver has not looked, so its used_event still asks for the first answer.
    read_chain(&mut rig, 1, 8);
    rig.kick();
    assert!(!rig.driver.interrupted());
}

#[test]
fn more_than_fits_the_ring_is_done_in_turns() {
    for engine in engines() {
        let (file, _) = noise_file(4096);
        let mut rig = Rig::with_engine(&file, engine);
        // One descriptor and one indirect table for each of 256 requests, all the same.
        rig.header(HEADER, VIRTIO_BLK_T_IN, 8);
        let chain = [(HEADER, 16, false), (DATA, 65536, true), (STATUS, 1, true)];
        for _ in 0..256 {
            rig.driver.queues[0].offer_indirect(&chain);
        }
        rig.kick();
        let mut answered = 0;
        rig.run_until(|rig| {
            answered += std::iter::from_fn(|| rig.driver.queues[0].used_chain()).count();
            answered == 256
        });
        // 16 MiB are more than one pass may do.
        assert!(lock(&rig.block).metrics().queue_event_count.total() > 1);
        assert_eq!(lock(&rig.block).metrics().read_bytes.total(), 256 * 65536);
    }
}

fn bucket(size: u64, refill_time: u64) -> Option<TokenBucketConfig> {
    Some(TokenBucketConfig { size, one_time_burst: None, refill_time })
}

#[test]
fn limits_hold_requests_back_in_order() {
    for engine in engines() {
        let (file, _) = noise_file(1024);
        // Ten operations at once, then one every 20 ms.
        let limits = RateLimiterConfig { ops: bucket(10, 200), bandwidth: None };
        let config = DriveConfig { rate_limiter: Some(limits), ..config(&file, engine) };
        let mut rig = Rig::new(&config, 0);
        let heads: Vec<_> = (0..20).map(|slot| read_chain(&mut rig, slot, slot * 8)).collect();
        let start = Instant::now();
        rig.kick();
        let mut answered = Vec::new();
        rig.run_until(|rig| {
            answered.extend(std::iter::from_fn(|| rig.driver.queues[0].used_chain().map(|c| c.0)));
            // More notifications do not help.
            rig.kick();
            answered.len() == 20
        });
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(199), "{elapsed:?}");
        answered.sort_unstable();
        let mut sorted = heads.clone();
        sorted.sort_unstable();
        assert_eq!(answered, sorted);
        // How often depends on how soon this thread is woken: several may have become due meanwhile.
        assert!(lock(&rig.block).metrics().rate_limiter_throttled_events.total() >= 1);
    }
}

#[test]
fn limits_on_bytes_and_their_change_while_throttled() {
    for engine in engines() {
        let (file, _) = noise_file(1024);
        // 8 KiB, and then none for an hour.
        let limits = RateLimiterConfig { ops: None, bandwidth: bucket(8192, 3_600_000) };
        let config = DriveConfig { rate_limiter: Some(limits), ..config(&file, engine) };
        let mut rig = Rig::new(&config, 0);
        for slot in 0..5 {
            read_chain(&mut rig, slot, slot * 8);
        }
        rig.kick();
        rig.answer();
        rig.answer();
        rig.event_loop.run_once(50).unwrap();
        assert!(rig.driver.queues[0].used_chain().is_none());
        let none = RateLimiterConfig { ops: None, bandwidth: bucket(0, 0) };
        let update = DriveUpdate { drive_id: "disk0".into(), path_on_host: None, rate_limiter: Some(none) };
        lock(&rig.block).update(&update).unwrap();
        for _ in 0..3 {
            rig.answer();
        }
    }
}

#[test]
fn paused_it_completes_what_is_in_flight_and_starts_nothing() {
    for engine in engines() {
        let (file, bytes) = noise_file(1024);
        let mut rig = Rig::with_engine(&file, engine);
        let heads: Vec<_> = (0..8).map(|slot| read_chain(&mut rig, slot, slot * 8)).collect();
        rig.kick();
        lock(&rig.block).pause();
        // No event loop has run since.
        for _ in heads {
            assert!(rig.driver.queues[0].used_chain().is_some());
        }
        read_chain(&mut rig, 9, 80);
        rig.kick();
        rig.event_loop.run_once(20).unwrap();
        assert!(rig.driver.queues[0].used_chain().is_none());
        lock(&rig.block).resume();
        rig.answer();
        assert_eq!(rig.driver.read(DATA + 9 * 4096, 4096), bytes[80 * 512..88 * 512]);
    }
}

#[test]
fn reset_waits_for_what_is_in_flight() {
    for engine in engines() {
        let (file, bytes) = noise_file(8192);
        let mut rig = Rig::with_engine(&file, engine);
        for round in 0..10 {
            // Out of the page cache, so that it takes a moment.
            file.as_file().sync_all().unwrap();
            // SAFETY: a hint on a file descriptor that is open.
            unsafe {
                let fd = std::os::fd::AsRawFd::as_raw_fd(file.as_file());
                libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED);
            }
            for slot in 0..64 {
                read_chain(&mut rig, slot, (round * 64 + slot) * 8);
            }
            rig.kick();
            lock(&rig.block).reset();
            // From now on guest memory is the guest's.
            let marks = vec![0x55; 64 * 4096];
            rig.driver.write(DATA, &marks);
            std::thread::sleep(Duration::from_millis(3));
            assert!(rig.driver.read(DATA, marks.len()) == marks);
            rig.event_loop.run_once(0).unwrap();

            rig.driver.interrupt.clear();
            rig.driver.queues[0].restart();
            let activation = rig.driver.activation(0);
            lock(&rig.block).activate(activation).unwrap();
        }
        assert_eq!(rig.read(9, 512), (OK, bytes[9 * 512..10 * 512].to_vec()));
    }
}

#[test]
fn flushes_are_done_in_turns() {
    for engine in engines() {
        let (file, _) = noise_file(64);
        let config = DriveConfig { cache_type: CacheType::Writeback, ..config(&file, engine) };
        let mut rig = Rig::new(&config, 1 << VIRTIO_BLK_F_FLUSH);
        rig.header(HEADER, VIRTIO_BLK_T_FLUSH, 0);
        for _ in 0..100 {
            rig.driver.queues[0].offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
        }
        rig.kick();
        let mut answered = 0;
        rig.run_until(|rig| {
            answered += std::iter::from_fn(|| rig.driver.queues[0].used_chain()).count();
            answered == 100
        });
        assert_eq!(lock(&rig.block).metrics().flush_count.total(), 100);
        assert!(lock(&rig.block).metrics().queue_event_count.total() > 10);
    }
}
