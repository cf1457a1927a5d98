use std::io::{Read, Write};

use tempfile::NamedTempFile;

use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::virtio::testing::{Buffer, Driver};

const REQUEST: u64 = 0x1000;
const ANSWER: u64 = 0x2000;

fn file(len: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&vec![0xab; len]).unwrap();
    file
}

fn config(file: &NamedTempFile, read_only: bool) -> PmemConfig {
    PmemConfig { id: "pmem0".into(), path_on_host: file.path().into(), read_only, ..PmemConfig::default() }
}

fn active(config: &PmemConfig) -> (Pmem, Driver) {
    let mut pmem = Pmem::new(config).unwrap();
    let driver = Driver::new(&[64]);
    pmem.activate(driver.activation(0)).unwrap();
    (pmem, driver)
}

fn ask(driver: &mut Driver, kind: u32) -> u16 {
    driver.write(REQUEST, &kind.to_le_bytes());
    driver.write(ANSWER, &[0xee; 4]);
    driver.queues[0].offer(&[(REQUEST, 4, false), (ANSWER, 4, true)])
}

fn answer(driver: &mut Driver, head: u16) -> u32 {
    assert_eq!(driver.queues[0].used_chain(), Some((head, 4)));
    u32::from_le_bytes(driver.read(ANSWER, 4).try_into().unwrap())
}

/// The mapped bytes, as a guest would see them.
fn mapped(mapping: &Mapping, at: usize) -> *mut u8 {
    assert!(at < mapping.len() as usize);
    (mapping.address() as *mut u8).wrapping_add(at)
}

#[test]
fn the_mapping_is_the_file_in_units_of_2_mib() {
    let file = file(512 * 5);
    let mut pmem = Pmem::new(&config(&file, false)).unwrap();
    let mapping = pmem.mapping();
    assert_eq!((mapping.len(), mapping.address() % ALIGNMENT), (ALIGNMENT, 0));
    // SAFETY: within the mapping, which `pmem` keeps; nobody else writes to the file.
    unsafe {
        assert_eq!(mapped(mapping, 2559).read_volatile(), 0xab);
        for beyond in [2560, 4095, 4096, ALIGNMENT as usize - 1] {
            assert_eq!(mapped(mapping, beyond).read_volatile(), 0);
        }
        mapped(mapping, 100).write_volatile(1);
        mapped(mapping, ALIGNMENT as usize - 1).write_volatile(1);
    }
    let mut bytes = Vec::new();
    file.reopen().unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!((bytes.len(), bytes[99], bytes[100]), (2560, 0xab, 1));

    pmem.place(0x1_4000_0000);
    let mut space = [0; 24];
    pmem.read_config(0, &mut space);
    assert_eq!(space[..8], 0x1_4000_0000u64.to_le_bytes());
    assert_eq!(space[8..16], ALIGNMENT.to_le_bytes());
    assert_eq!(space[16..], [0; 8]);
    assert_eq!(pmem.device_type(), 27);
}

#[test]
fn exact_units_are_mapped_whole() {
    let file = file(ALIGNMENT as usize * 2);
    let pmem = Pmem::new(&config(&file, true)).unwrap();
    assert!(pmem.mapping().read_only());
    assert_eq!(pmem.mapping().len(), 2 * ALIGNMENT);
    // SAFETY: within the mapping, which `pmem` keeps; nobody writes to the file.
    assert_eq!(unsafe { mapped(pmem.mapping(), 2 * ALIGNMENT as usize - 1).read_volatile() }, 0xab);
}

#[test]
fn files_that_cannot_be_mapped_are_refused_by_name() {
    let odd = file(513);
    let error = |c: &PmemConfig| Pmem::new(c).err().unwrap().to_string();
    assert!(error(&config(&odd, true)).starts_with("pmem: device pmem0: path_on_host: "));
    let missing = PmemConfig { path_on_host: "/nowhere".into(), ..config(&odd, true) };
    assert!(error(&missing).contains("/nowhere"));
    let shared = file(4096);
    let readers = [Pmem::new(&config(&shared, true)).unwrap(), Pmem::new(&config(&shared, true)).unwrap()];
    assert!(error(&config(&shared, false)).contains("is in use"));
    drop(readers);
    drop(Pmem::new(&config(&shared, false)).unwrap());
}

#[test]
fn what_may_be_written_has_its_space_on_the_disk() {
    use std::os::unix::fs::MetadataExt;
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    drop(Pmem::new(&config(&file, true)).unwrap());
    assert_eq!(file.as_file().metadata().unwrap().blocks(), 0);
    drop(Pmem::new(&config(&file, false)).unwrap());
    assert!(file.as_file().metadata().unwrap().blocks() >= 2048);
    assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
}

#[test]
fn flushes_asked_for_together_are_one() {
    for read_only in [false, true] {
        let file = file(4096);
        let (mut pmem, mut driver) = active(&config(&file, read_only));
        let heads: Vec<_> = (0..8).map(|_| ask(&mut driver, REQUEST_FLUSH)).collect();
        pmem.process(0, EventSet::IN);
        assert_eq!(driver.interrupt.irqfd().read().unwrap(), 1);
        for head in heads {
            assert_eq!(answer(&mut driver, head), RESPONSE_OK);
        }
        assert_eq!(pmem.metrics().flush_count.total(), u64::from(!read_only));
        pmem.process(0, EventSet::IN);
        assert!(!driver.interrupted());
    }
}

#[test]
fn an_answer_may_be_scattered_and_another_request_is_an_error() {
    let file = file(4096);
    let (mut pmem, mut driver) = active(&config(&file, false));
    let head = ask(&mut driver, 7);
    pmem.process(0, EventSet::IN);
    assert_eq!(answer(&mut driver, head), RESPONSE_EIO);
    ask(&mut driver, REQUEST_FLUSH);
    driver.queues[0].used_chain();
    let pieces = [(REQUEST, 1, false), (REQUEST + 1, 3, false), (ANSWER, 3, true), (ANSWER + 3, 1, true)];
    let head = driver.queues[0].offer_indirect(&pieces);
    pmem.process(0, EventSet::IN);
    driver.queues[0].used_chain();
    assert_eq!(answer(&mut driver, head), RESPONSE_OK);
}

#[test]
fn broken_chains_need_a_reset() {
    let file = file(4096);
    let outside = 1 << 40;
    let broken: &[&[Buffer]] = &[
        &[(REQUEST, 4, false)],
        &[(ANSWER, 4, true)],
        &[(REQUEST, 3, false), (ANSWER, 4, true)],
        &[(REQUEST, 4, false), (ANSWER, 3, true)],
        &[(REQUEST, 0, false), (ANSWER, 0, true)],
        &[(outside, 4, false), (ANSWER, 4, true)],
        &[(REQUEST, 4, false), (outside, 4, true)],
        &[(REQUEST, 4, false), (u64::MAX, u32::MAX, true)],
    ];
    let (mut pmem, mut driver) = active(&config(&file, false));
    for chain in broken {
        driver.queues[0].offer(chain);
        pmem.process(0, EventSet::IN);
        assert!(driver.broken(), "{chain:x?}");
        assert!(driver.queues[0].used_chain().is_none());
        ask(&mut driver, REQUEST_FLUSH);
        pmem.process(0, EventSet::IN);
        assert!(driver.queues[0].used_chain().is_none(), "nothing is done before a reset");
        pmem.reset();
        driver.interrupt.clear();
        driver.queues[0].restart();
        pmem.activate(driver.activation(0)).unwrap();
        let head = ask(&mut driver, REQUEST_FLUSH);
        pmem.process(0, EventSet::IN);
        assert_eq!(answer(&mut driver, head), RESPONSE_OK);
        pmem.reset();
        driver.queues[0].restart();
        pmem.activate(driver.activation(0)).unwrap();
    }
}

#[test]
fn limits_and_pauses_hold_flushes_back() {
    let file = file(4096);
    let bucket = |refill_time| Some(TokenBucketConfig { size: 1, one_time_burst: None, refill_time });
    let limits = RateLimiterConfig { ops: bucket(3_600_000), bandwidth: None };
    let (mut pmem, mut driver) = active(&PmemConfig { rate_limiter: Some(limits), ..config(&file, false) });
    let first = ask(&mut driver, REQUEST_FLUSH);
    pmem.process(0, EventSet::IN);
    assert_eq!(answer(&mut driver, first), RESPONSE_OK);
    let second = ask(&mut driver, REQUEST_FLUSH);
    pmem.process(0, EventSet::IN);
    pmem.process(0, EventSet::IN);
    assert!(driver.queues[0].used_chain().is_none());
    let limits = RateLimiterConfig { ops: bucket(0), bandwidth: None };
    pmem.update(&PmemUpdate { id: "pmem0".into(), rate_limiter: Some(limits) });
    pmem.pause();
    pmem.process(LIMITER, EventSet::IN);
    assert!(driver.queues[0].used_chain().is_none());
    pmem.resume();
    pmem.process(WAKE, EventSet::IN);
    assert_eq!(answer(&mut driver, second), RESPONSE_OK);
}
