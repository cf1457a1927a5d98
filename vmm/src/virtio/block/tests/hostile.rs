//! A guest that breaks the rules hurts only itself.

use super::*;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[test]
fn bad_requests_are_answered_with_errors() {
    for engine in engines() {
        let (file, bytes) = noise_file(16);
        let mut rig = Rig::with_engine(&file, engine);
        let read = |len| [(DATA, len, true)];
        for (sector, len) in
            [(16, 512), (15, 1024), (0, 513), (0, 511), (u64::MAX / 512, 512), (u64::MAX, 512)]
        {
            assert_eq!(rig.request(VIRTIO_BLK_T_IN, sector, &read(len)), (IOERR, 0), "{sector} {len}");
            assert_eq!(rig.request(VIRTIO_BLK_T_OUT, sector, &[(DATA, len, false)]), (IOERR, 1));
        }
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[]).0, IOERR);
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[]).0, IOERR);
        let both = [(DATA, 512, false), (DATA + 512, 512, true)];
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &both).0, IOERR);
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &both).0, IOERR);
        for kind in [VIRTIO_BLK_T_SCSI_CMD, VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_ZONE_REPORT, 3, u32::MAX]
        {
            assert_eq!(rig.request(kind, 0, &read(512)).0, UNSUPP);
        }
        assert!(!rig.driver.broken());
        assert!(contents(&file) == bytes);
        assert_eq!(rig.read(3, 512), (OK, bytes[3 * 512..4 * 512].to_vec()));
    }
}

#[test]
fn giant_requests_are_refused() {
    let (file, _) = noise_file(8);
    // 64 GiB, without a byte of it.
    file.as_file().set_len(64 << 30).unwrap();
    let mut rig = Rig::with_engine(&file, IoEngine::Sync);
    // The same 8 MiB over and over: 32 MiB pass, a sector more does not.
    let mut chain = vec![(0, 8 << 20, false); 4];
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &chain).0, OK);
    chain.push((DATA, 512, false));
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &chain).0, IOERR);
    // Just below 4 GiB in all, and beyond that.
    chain = vec![(0, 16 << 20, false); 250];
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &chain).0, IOERR);
    chain = vec![(0, 1 << 31, true); 1];
    rig.header(HEADER, VIRTIO_BLK_T_IN, 0);
    rig.driver.queues[0].offer(&[&[(HEADER, 16, false)], &chain[..]].concat());
    rig.kick();
    assert!(rig.driver.broken(), "outside memory");
}

#[test]
fn a_read_only_disk_is_not_written_to() {
    for engine in engines() {
        let (file, bytes) = noise_file(16);
        let config = DriveConfig { is_read_only: Some(true), ..config(&file, engine) };
        let mut rig = Rig::new(&config, u64::MAX);
        let offered = lock(&rig.block).features();
        assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
        let writing = [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        assert!(writing.into_iter().all(|f| offered & 1 << f == 0));
        assert_eq!(rig.write(0, &[1; 512]), IOERR);
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(rig.request(kind, 0, &[(DATA, 16, false)]).0, UNSUPP);
        }
        assert_eq!(rig.read(0, 512), (OK, bytes[..512].to_vec()));
        assert!(contents(&file) == bytes);
    }
}

/// Puts something broken into the queue.
type Break = fn(&mut Driver);

fn offer(driver: &mut Driver, buffers: &[Buffer]) {
    driver.queues[0].offer(buffers);
}

const BROKEN: &[(&str, Break)] = &[
    ("no writable byte", |d| offer(d, &[(HEADER, 16, false)])),
    ("no header", |d| offer(d, &[(STATUS, 1, true)])),
    ("a short header", |d| offer(d, &[(HEADER, 15, false), (STATUS, 1, true)])),
    ("only empty buffers", |d| offer(d, &[(HEADER, 0, false), (STATUS, 0, true)])),
    ("readable after writable", |d| offer(d, &[(HEADER, 16, false), (STATUS, 1, true), (DATA, 512, false)])),
    ("a header outside memory", |d| offer(d, &[(1 << 40, 16, false), (STATUS, 1, true)])),
    ("a header at the end of addresses", |d| offer(d, &[(u64::MAX - 3, 16, false), (STATUS, 1, true)])),
    ("data outside memory", |d| offer(d, &[(HEADER, 16, false), (1 << 40, 512, true), (STATUS, 1, true)])),
    ("data across the end of memory", |d| {
        let end = crate::virtio::testing::MEMORY_SIZE;
        d.queues[0].offer(&[(HEADER, 16, false), (end - 511, 512, true), (STATUS, 1, true)]);
    }),
    ("a status outside memory", |d| offer(d, &[(HEADER, 16, false), (1 << 40, 1, true)])),
    ("a status at the end of addresses", |d| offer(d, &[(HEADER, 16, false), (u64::MAX, u32::MAX, true)])),
    ("a loop", |d| {
        d.queues[0].descriptor(0, DATA, 1, NEXT, 1);
        d.queues[0].descriptor(1, DATA, 1, NEXT, 0);
        d.queues[0].publish(0);
    }),
    ("a writable loop", |d| {
        d.queues[0].descriptor(0, HEADER, 16, NEXT, 1);
        d.queues[0].descriptor(1, STATUS, 1, NEXT | WRITE, 1);
        d.queues[0].publish(0);
    }),
    ("a next index out of bounds", |d| {
        d.queues[0].descriptor(0, HEADER, 16, NEXT, 256);
        d.queues[0].publish(0);
    }),
    ("a head out of bounds", |d| d.queues[0].publish(0xffff)),
    ("an indirect table outside memory", |d| {
        d.queues[0].descriptor(0, 1 << 40, 48, INDIRECT, 0);
        d.queues[0].publish(0);
    }),
    ("an empty indirect table", |d| {
        let scratch = d.queues[0].scratch();
        d.queues[0].descriptor(0, scratch, 0, INDIRECT, 0);
        d.queues[0].publish(0);
    }),
    ("an indirect table of odd length", |d| {
        let scratch = d.queues[0].scratch();
        d.queues[0].descriptor(0, scratch, 47, INDIRECT, 0);
        d.queues[0].publish(0);
    }),
    ("an indirect table in itself", |d| {
        let scratch = d.queues[0].scratch();
        let mut table = [0; 16];
        table[..8].copy_from_slice(&scratch.to_le_bytes());
        table[8..12].copy_from_slice(&16u32.to_le_bytes());
        table[12..14].copy_from_slice(&INDIRECT.to_le_bytes());
        d.write(scratch, &table);
        d.queues[0].descriptor(0, scratch, 16, INDIRECT, 0);
        d.queues[0].publish(0);
    }),
    ("an indirect table that loops", |d| {
        let scratch = d.queues[0].scratch();
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&HEADER.to_le_bytes());
        entry[8..12].copy_from_slice(&1u32.to_le_bytes());
        entry[12..14].copy_from_slice(&NEXT.to_le_bytes());
        d.write(scratch, &entry);
        d.queues[0].descriptor(0, scratch, 0xffff0, INDIRECT, 0);
        d.queues[0].publish(0);
    }),
    ("an indirect table longer than any request", |d| {
        let buffers: Vec<Buffer> = (0..300).map(|i| (HEADER, 16, i > 1)).collect();
        d.queues[0].offer_indirect(&buffers);
    }),
    ("an available index far ahead", |d| d.queues[0].set_avail_idx(300)),
    ("an available index behind", |d| d.queues[0].set_avail_idx(0xffff)),
];

#[test]
fn broken_chains_need_a_reset_and_end_nothing_else() {
    for engine in engines() {
        let (file, bytes) = noise_file(16);
        let mut rig = Rig::with_engine(&file, engine);
        for (what, break_it) in BROKEN {
            // A good request before the bad one is answered.
            rig.header(HEADER, VIRTIO_BLK_T_IN, 1);
            rig.driver.queues[0].offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
            rig.kick();
            rig.answer();
            assert_eq!(rig.driver.read(DATA, 512), bytes[512..1024], "before {what}");
            break_it(&mut rig.driver);
            rig.kick();
            assert!(rig.driver.broken(), "{what}");
            assert!(rig.driver.queues[0].used_chain().is_none(), "{what} was answered");
            rig.kick();
            // As the transport does when the driver asks for it.
            lock(&rig.block).reset();
            rig.driver.interrupt.clear();
            rig.driver.queues[0].restart();
            let features = lock(&rig.block).features() & !F_RING_EVENT_IDX;
            let activation = rig.driver.activation(features);
            lock(&rig.block).activate(activation).unwrap();
        }
        assert!(contents(&file) == bytes);
    }
}

#[test]
fn rings_that_are_not_in_memory_need_a_reset() {
    use virtio_queue::{Queue, QueueT};
    for engine in engines() {
        let (file, _) = noise_file(16);
        for (desc, avail, used) in
            [(0u64, 1u64 << 40, 0x3000u64), (1 << 40, 0x2000, 0x3000), (0, 0x2000, 1 << 40)]
        {
            let mut block = Block::new(&config(&file, engine)).unwrap();
            let driver = Driver::new(&[256]);
            let mut activation = driver.activation(0);
            // The transport checks this; a restored or confused one might not.
            let mut queue = Queue::new(256).unwrap();
            queue.set_desc_table_address(Some(desc as u32), Some((desc >> 32) as u32));
            queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
            queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
            queue.set_ready(true);
            activation.queues = vec![queue];
            driver.write(0x2002, &1u16.to_le_bytes());
            block.activate(activation).unwrap();
            block.process(0, EventSet::IN);
            assert!(driver.broken(), "{desc:#x} {avail:#x} {used:#x}");
            block.reset();
        }
    }
}

#[test]
fn a_ring_over_the_request_does_no_harm_to_the_host() {
    for engine in engines() {
        let (file, _) = noise_file(4096);
        let mut rig = Rig::with_engine(&file, engine);
        // Reads noise into the rings themselves, again and again, wherever that leads.
        for sector in 0..64 {
            rig.header(HEADER, VIRTIO_BLK_T_IN, sector * 64);
            let base = rig.driver.queues[0].scratch() - 0x8000;
            rig.driver.queues[0].offer(&[(HEADER, 16, false), (base, 0x8000, true), (STATUS, 1, true)]);
            for _ in 0..4 {
                rig.kick();
                rig.event_loop.run_once(0).unwrap();
            }
            lock(&rig.block).reset();
            rig.driver.interrupt.clear();
            rig.driver.queues[0].restart();
            let activation = rig.driver.activation(0);
            lock(&rig.block).activate(activation).unwrap();
        }
        let (status, _) = rig.read(0, 512);
        assert_eq!(status, OK);
    }
}
