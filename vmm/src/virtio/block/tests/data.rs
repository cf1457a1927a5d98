//! Data comes and goes as it should.

use super::*;

#[test]
fn random_reads_and_writes_match_a_model() {
    for engine in engines() {
        for features in [F_RING_INDIRECT_DESC, F_RING_INDIRECT_DESC | F_RING_EVENT_IDX] {
            let (file, model) = noise_file(4096);
            exercise(Rig::new(&config(&file, engine), features), &file, model);
        }
    }
}

/// Batches of scattered requests in flight together, no two of a batch on the same sectors.
fn exercise(mut rig: Rig, file: &NamedTempFile, mut model: Vec<u8>) {
    const SLOT: u64 = 0x4_0000;
    let mut random = Random(7);
    for _ in 0..60 {
        let mut expected = Vec::new();
        let count = 1 + random.below(16);
        for slot in 0..count {
            // A stripe of the disk for each request of the batch.
            let sector = slot * 256 + random.below(100);
            let write = random.below(2) == 0;
            let (header, data) = (HEADER + slot * 32, DATA + slot * SLOT);
            rig.header(header, if write { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN }, sector);
            rig.driver.write(header + 16, &[NO_STATUS]);
            let mut chain = vec![(header, 16, false)];
            let mut ranges = Vec::new();
            // Pieces of odd lengths, not in the order of their addresses, that make whole sectors.
            let mut left = 512 * (1 + random.below(100)) as u32;
            let mut place = data + SLOT;
            while left > 0 {
                let len = if chain.len() > 6 { left } else { left.min(1 + random.below(20_000) as u32) };
                place -= u64::from(len);
                chain.push((place, len, !write));
                ranges.push((place, len as usize));
                left -= len;
            }
            chain.push((header + 16, 1, true));
            let mut at = sector as usize * 512;
            for (address, len) in &ranges {
                if write {
                    let bytes: Vec<u8> = (0..*len).map(|_| random.next() as u8).collect();
                    rig.driver.write(*address, &bytes);
                    model[at..at + len].copy_from_slice(&bytes);
                }
                at += len;
            }
            // One indirect table fits the test's scratch space.
            let queue = &mut rig.driver.queues[0];
            let head = if slot == 0 { queue.offer_indirect(&chain) } else { queue.offer(&chain) };
            expected.push((head, write, sector as usize * 512, ranges, header + 16));
        }
        rig.kick();
        for _ in 0..count {
            let (head, len) = rig.answer();
            let i = expected.iter().position(|e| e.0 == head).unwrap();
            let (_, write, mut at, ranges, status) = expected.swap_remove(i);
            assert_eq!(rig.driver.read(status, 1), [OK]);
            let total: usize = ranges.iter().map(|r| r.1).sum();
            assert_eq!(len as usize, if write { 1 } else { total + 1 });
            for (address, len) in ranges {
                assert!(rig.driver.read(address, len) == model[at..at + len], "wrong data at byte {at}");
                at += len;
            }
        }
        assert!(rig.driver.interrupted());
    }
    assert!(contents(file) == model);
    let metrics = lock(&rig.block).metrics().clone();
    assert!(metrics.read_count.total() > 100 && metrics.write_count.total() > 100);
    assert_eq!((metrics.execute_fails.total(), metrics.invalid_reqs_count.total()), (0, 0));
}

#[test]
fn the_driver_may_spread_a_request_over_descriptors_as_it_likes() {
    for engine in engines() {
        let (file, bytes) = noise_file(8);
        let mut rig = Rig::with_engine(&file, engine);
        // A read: header in three pieces; data and status in one descriptor.
        rig.header(HEADER, VIRTIO_BLK_T_IN, 2);
        let queue = &mut rig.driver.queues[0];
        queue.offer(&[
            (HEADER, 3, false),
            (HEADER + 3, 9, false),
            (HEADER + 12, 4, false),
            (DATA, 1025, true),
        ]);
        rig.kick();
        assert_eq!(rig.answer().1, 1025);
        assert_eq!(rig.driver.read(DATA, 1025), [&bytes[1024..2048], &[OK]].concat());

        // A write: header and data in one descriptor, an empty one, and the rest.
        rig.header(HEADER, VIRTIO_BLK_T_OUT, 7);
        rig.driver.write(HEADER + 16, &[1; 512]);
        let queue = &mut rig.driver.queues[0];
        queue.offer(&[(HEADER, 516, false), (0, 0, false), (HEADER + 516, 12, false), (STATUS, 1, true)]);
        rig.kick();
        rig.answer();
        assert_eq!(rig.driver.read(STATUS, 1), [OK]);
        assert_eq!(contents(&file)[3584..], [1; 512]);
    }
}

#[test]
fn flush_is_offered_with_writeback_only() {
    for engine in engines() {
        let (file, _) = noise_file(8);
        let mut rig = Rig::with_engine(&file, engine);
        assert_eq!(rig.write(0, &[9; 512]), OK);
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(lock(&rig.block).metrics().flush_count.total(), 1);
        drop(rig);

        let unsafe_config = DriveConfig { cache_type: CacheType::Unsafe, ..config(&file, engine) };
        let mut rig = Rig::new(&unsafe_config, u64::MAX);
        assert_eq!(lock(&rig.block).features() & 1 << VIRTIO_BLK_F_FLUSH, 0);
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, UNSUPP);
    }
}

#[test]
fn the_serial_number_is_the_drive_id() {
    for engine in engines() {
        let (file, _) = noise_file(1);
        let long = "a_name_of_more_than_twenty_bytes";
        for (id, serial) in [("disk0", "disk0"), (long, &long[..20])] {
            let config = DriveConfig { drive_id: id.into(), ..config(&file, engine) };
            let mut rig = Rig::new(&config, u64::MAX);
            rig.driver.write(DATA, &[0xff; 20]);
            let pieces = [(DATA, 7, true), (DATA + 7, 13, true)];
            assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &pieces), (OK, 20));
            let mut expected = serial.as_bytes().to_vec();
            expected.resize(20, 0);
            assert_eq!(rig.driver.read(DATA, 20), expected);
            assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, true)]).0, IOERR);
        }
    }
}

fn clear_range(rig: &mut Rig, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
    let range = [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat();
    rig.driver.write(DATA, &range);
    rig.request(kind, 0, &[(DATA, range.len() as u32, false)]).0
}

#[test]
fn discard_and_zeroes_free_space_and_read_as_zero() {
    use std::os::unix::fs::MetadataExt;
    for engine in engines() {
        let (file, mut model) = noise_file(2048);
        let mut rig = Rig::with_engine(&file, engine);
        file.as_file().sync_all().unwrap();
        let blocks = || file.as_file().metadata().unwrap().blocks();
        let before = blocks();

        assert_eq!(clear_range(&mut rig, VIRTIO_BLK_T_DISCARD, 8, 512, 0), OK);
        model[8 * 512..520 * 512].fill(0);
        assert_eq!(clear_range(&mut rig, VIRTIO_BLK_T_WRITE_ZEROES, 1024, 512, 1), OK);
        model[1024 * 512..1536 * 512].fill(0);
        assert!(blocks() <= before - 1000, "{} of {before} blocks left", blocks());
        let status = clear_range(&mut rig, VIRTIO_BLK_T_WRITE_ZEROES, 2040, 8, 0);
        // Some file systems cannot zero without punching a hole; the guest then writes zeroes itself.
        assert!(status == OK || status == UNSUPP);
        if status == OK {
            model[2040 * 512..].fill(0);
        }
        assert!(contents(&file) == model);
        assert_eq!(rig.read(1024, 4096), (OK, vec![0; 4096]));

        // Outside the disk, too much, nothing, unknown flags.
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(clear_range(&mut rig, kind, 2048, 1, 0), IOERR);
            assert_eq!(clear_range(&mut rig, kind, 0, u32::MAX, 0), IOERR);
            assert_eq!(clear_range(&mut rig, kind, u64::MAX, 8, 0), IOERR);
            assert_eq!(clear_range(&mut rig, kind, 0, 0, 0), IOERR);
            assert_eq!(clear_range(&mut rig, kind, 0, 8, 2), UNSUPP);
            assert_eq!(rig.request(kind, 0, &[(DATA, 32, false)]).0, IOERR);
            assert_eq!(rig.request(kind, 0, &[(DATA, 16, true)]).0, IOERR);
        }
        assert_eq!(clear_range(&mut rig, VIRTIO_BLK_T_DISCARD, 0, 8, 1), UNSUPP);
        assert!(contents(&file) == model);
    }
}

#[test]
fn configuration_space_says_what_the_device_does() {
    let (file, _) = noise_file(123);
    let block = Block::new(&config(&file, IoEngine::Sync)).unwrap();
    let field = |at, len| {
        let mut bytes = [0; 8];
        block.read_config(at, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(field(0, 8), 123);
    assert_eq!(field(12, 4), 254);
    assert_eq!((field(36, 4), field(40, 4)), (1 << 21, 1));
    assert_eq!((field(48, 4), field(52, 4), field(56, 1)), (1 << 21, 1, 1));
    assert_eq!((field(60, 4), field(u64::MAX, 8)), (0, 0));
    assert_eq!(block.device_type(), 2);
}
