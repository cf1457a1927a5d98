use super::*;
use crate::event_loop::{EventLoop, lock};
use crate::virtio::testing::{Buffer, Driver, MEMORY_SIZE};
use std::sync::Mutex;
use std::time::Instant;

const INFLATE: usize = 0;
const STATS: usize = 2;
/// Where tests put lists and numbers.
const LIST: u64 = 0x1000;
/// Memory that tests give up.
const FREE: u64 = 0x20_0000;

fn everything() -> BalloonConfig {
    BalloonConfig {
        amount_mib: 8,
        deflate_on_oom: true,
        stats_polling_interval_s: 1,
        free_page_hinting: true,
        free_page_reporting: true,
    }
}

fn active(config: &BalloonConfig) -> (Balloon, Driver) {
    let mut balloon = Balloon::new(config).unwrap();
    let driver = Driver::new(balloon.queue_sizes());
    balloon.activate(driver.activation(balloon.features())).unwrap();
    (balloon, driver)
}

fn kick(balloon: &mut Balloon, queue: usize) {
    balloon.process(queue as u32, EventSet::IN);
}

fn inflate(balloon: &mut Balloon, driver: &mut Driver, frames: &[u32]) {
    let list: Vec<u8> = frames.iter().flat_map(|f| f.to_le_bytes()).collect();
    driver.write(LIST, &list);
    let head = driver.queues[INFLATE].offer(&[(LIST, list.len() as u32, false)]);
    kick(balloon, INFLATE);
    assert_eq!(driver.queues[INFLATE].used_chain(), Some((head, 0)));
}

/// Pages of `FREE` on that the host has set aside for the guest.
fn resident(driver: &Driver, count: u64) -> Vec<bool> {
    use vm_memory::{GuestAddress, GuestMemoryBackend};
    let start = driver.memory.get_host_address(GuestAddress(FREE)).unwrap();
    let mut pages = vec![0u8; count as usize];
    // SAFETY: the range is mapped guest memory and `pages` has a byte for each of its pages.
    let result = unsafe { libc::mincore(start.cast(), (count * pages::PAGE) as usize, pages.as_mut_ptr()) };
    assert_eq!(result, 0);
    pages.iter().map(|p| p & 1 != 0).collect()
}

fn fill(driver: &Driver, pages: u64) {
    driver.write(FREE, &vec![0xff; (pages * pages::PAGE) as usize]);
    assert!(resident(driver, pages).iter().all(|r| *r));
}

#[test]
fn frames_become_the_fewest_ranges() {
    let ranges = |frames: &[u32]| pages::ranges(&mut frames.to_vec()).collect::<Vec<_>>();
    assert_eq!(ranges(&[]), []);
    assert_eq!(ranges(&[5]), [(5, 1)]);
    assert_eq!(ranges(&[7, 5, 6, 6, 9, 1, 0]), [(0, 2), (5, 3), (9, 1)]);
    assert_eq!(ranges(&[u32::MAX, 0, u32::MAX - 1]), [(0, 1), (u32::MAX - 1, 2)]);
}

#[test]
fn inflating_gives_pages_back() {
    let (mut balloon, mut driver) = active(&everything());
    fill(&driver, 16);
    let first = (FREE / pages::PAGE) as u32;
    // In any order, twice, scattered, and some that are no memory.
    let outside = (MEMORY_SIZE / pages::PAGE) as u32;
    inflate(&mut balloon, &mut driver, &[first + 3, first + 1, first + 2, first + 9, first + 1]);
    assert!(driver.interrupted());
    inflate(&mut balloon, &mut driver, &[outside, u32::MAX, first + 5, outside - 1, u32::MAX - 1]);
    let expected: Vec<_> = (0..16).map(|p| ![1, 2, 3, 5, 9].contains(&p)).collect();
    assert_eq!(resident(&driver, 16), expected);
    assert_eq!(driver.read(FREE + 3 * pages::PAGE, 4096), [0; 4096]);
    assert_eq!(driver.read(FREE + 4 * pages::PAGE, 4096), [0xff; 4096]);
    assert_eq!(balloon.metrics().inflate_count.total(), 2);
    assert_eq!(balloon.metrics().event_fails.total(), 2, "two ranges outside");

    let head = driver.queues[1].offer(&[(LIST, 8, false)]);
    kick(&mut balloon, 1);
    assert_eq!(driver.queues[1].used_chain(), Some((head, 0)));
    assert!(!driver.broken());
}

#[test]
fn reported_ranges_are_given_back_and_no_more() {
    let (mut balloon, mut driver) = active(&everything());
    let queue = 4;
    fill(&driver, 16);
    let page = pages::PAGE;
    let head = driver.queues[queue].offer(&[
        (FREE, page as u32, true),
        // Not whole pages: only what lies between.
        (FREE + 4 * page + 1, 3 * page as u32, true),
        (FREE + 10 * page, 1, true),
        // Not the guest's, beyond all addresses, not for writing.
        (MEMORY_SIZE - page, 2 * page as u32, true),
        (u64::MAX - 5, 4096, true),
        (FREE + 12 * page, page as u32, false),
    ]);
    kick(&mut balloon, queue);
    assert_eq!(driver.queues[queue].used_chain(), Some((head, 0)));
    let expected: Vec<_> = (0..16).map(|p| ![0, 5, 6].contains(&p)).collect();
    assert_eq!(resident(&driver, 16), expected);
    let metrics = balloon.metrics();
    assert_eq!((metrics.free_page_report_count.total(), metrics.free_page_report_fails.total()), (5, 2));
    assert_eq!(metrics.free_page_report_freed.total(), 3 * page);
}

#[test]
fn hinting_takes_what_belongs_to_the_run() {
    let (mut balloon, mut driver) = active(&everything());
    let queue = 3;
    let command = |driver: &mut Driver, balloon: &mut Balloon, command: u32| {
        driver.write(LIST, &command.to_le_bytes());
        driver.queues[queue].offer(&[(LIST, 4, false)]);
        kick(balloon, queue);
        driver.queues[queue].used_chain().unwrap();
    };
    let hint = |driver: &mut Driver, balloon: &mut Balloon, page: u64| {
        driver.queues[queue].offer(&[(FREE + page * pages::PAGE, 4096, true)]);
        kick(balloon, queue);
        driver.queues[queue].used_chain().unwrap();
    };
    fill(&driver, 4);
    hint(&mut driver, &mut balloon, 0);
    driver.interrupted();
    balloon.start_hinting(true);
    assert!(driver.interrupted());
    let mut id = [0; 4];
    balloon.read_config(8, &mut id);
    let id = u32::from_le_bytes(id);
    hint(&mut driver, &mut balloon, 1);
    command(&mut driver, &mut balloon, id);
    hint(&mut driver, &mut balloon, 2);
    command(&mut driver, &mut balloon, hinting::STOP);
    hint(&mut driver, &mut balloon, 3);
    assert_eq!(resident(&driver, 4), [true, true, false, true]);
    let status = BalloonHintingStatus { host_cmd: hinting::DONE, guest_cmd: Some(hinting::STOP) };
    assert_eq!(balloon.hinting_status(), status);
    assert_eq!(balloon.metrics().free_page_hint_freed.total(), 4096);
}

fn stats_bytes(stats: &[(u16, u64)]) -> Vec<u8> {
    stats.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

#[test]
fn statistics_come_when_the_interval_is_over() {
    let mut event_loop = EventLoop::new().unwrap();
    let balloon = Arc::new(Mutex::new(Balloon::new(&everything()).unwrap()));
    let events = event_loop.subscribe(balloon.clone());
    let mut driver = Driver::new(lock(&balloon).queue_sizes());
    lock(&balloon).attach(events);
    let start = Instant::now();
    let activation = driver.activation(u64::MAX);
    lock(&balloon).activate(activation).unwrap();
    assert_eq!(lock(&balloon).stats().free_memory, None);

    let bytes = stats_bytes(&[(4, 1111), (5, 2222), (999, 1), (6, 3333), (15, 7)]);
    driver.write(LIST, &bytes);
    // And half a statistic.
    let head = driver.queues[STATS].offer(&[(LIST, bytes.len() as u32 + 5, false)]);
    kick(&mut lock(&balloon), STATS);
    let stats = lock(&balloon).stats();
    assert_eq!((stats.free_memory, stats.total_memory), (Some(1111), Some(2222)));
    assert_eq!((stats.available_memory, stats.direct_reclaim), (Some(3333), Some(7)));
    assert_eq!((stats.swap_in, stats.oom_kill), (None, None));
    assert_eq!(driver.queues[STATS].used_chain(), None, "the buffer is kept");

    for _ in 0..2 {
        while driver.queues[STATS].used_chain().is_none() {
            assert!(start.elapsed() < Duration::from_secs(20));
            event_loop.run_once(2000).unwrap();
        }
        driver.queues[STATS].publish(head);
        kick(&mut lock(&balloon), STATS);
    }
    assert!(start.elapsed() >= Duration::from_secs(2));
    // Two buffers are one too many; the first comes back at once.
    driver.queues[STATS].offer(&[(LIST, 10, false)]);
    kick(&mut lock(&balloon), STATS);
    assert_eq!(driver.queues[STATS].used_chain(), Some((head, 0)));
    assert_eq!(lock(&balloon).metrics().stats_updates_count.total(), 4);
}

#[test]
fn the_configuration_space_holds_target_and_actual() {
    let (mut balloon, driver) = active(&everything());
    let field = |balloon: &Balloon, at| {
        let mut bytes = [0; 4];
        balloon.read_config(at, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!(field(&balloon, 0), 2048);
    balloon.set_target(3);
    assert!(driver.interrupted());
    assert_eq!(field(&balloon, 0), 768);
    balloon.write_config(4, &512u32.to_le_bytes());
    assert_eq!(field(&balloon, 4), 512);
    for (offset, data) in [(0, &[9; 4][..]), (8, &[9; 4]), (4, &[9; 2]), (4, &[9; 8]), (u64::MAX, &[9; 4])] {
        balloon.write_config(offset, data);
    }
    let stats = balloon.stats();
    assert_eq!((stats.target_pages, stats.actual_pages), (768, 512));
    assert_eq!((stats.target_mib, stats.actual_mib), (3, 2));
    assert_eq!((field(&balloon, 8), field(&balloon, 12)), (0, 0));
}

#[test]
fn queues_are_those_of_the_features_the_driver_took() {
    let mut balloon = Balloon::new(&everything()).unwrap();
    assert_eq!(balloon.queue_sizes().len(), 5);
    assert_eq!(balloon.features(), F_STATS | F_DEFLATE_ON_OOM | F_HINTING | F_REPORTING);
    let mut driver = Driver::new(balloon.queue_sizes());
    balloon.activate(driver.activation(F_REPORTING)).unwrap();
    fill(&driver, 1);
    driver.queues[2].offer(&[(FREE, 4096, true)]);
    kick(&mut balloon, 2);
    assert_eq!(resident(&driver, 1), [false]);

    let plain = BalloonConfig { amount_mib: 1, ..BalloonConfig::default() };
    let balloon = Balloon::new(&plain).unwrap();
    assert_eq!((balloon.queue_sizes().len(), balloon.features()), (2, 0));
}

#[test]
fn broken_chains_need_a_reset_and_empty_ones_do_not() {
    let (mut balloon, mut driver) = active(&everything());
    let outside = 1 << 40;
    let broken: &[(usize, &[Buffer])] = &[
        (INFLATE, &[(outside, 4, false)]),
        (INFLATE, &[(0, MAX_FRAMES as u32 * 4 + 4, false)]),
        (STATS, &[(outside, 10, false)]),
        (3, &[(outside, 4, false)]),
        (3, &[(u64::MAX, 4, false)]),
    ];
    let harmless: &[(usize, &[Buffer])] = &[
        (INFLATE, &[(LIST, 3, false)]),
        (INFLATE, &[(LIST, 4, true)]),
        (INFLATE, &[(LIST, 0, false)]),
        (1, &[(outside, 4, false)]),
        (4, &[(outside, u32::MAX, true)]),
        (3, &[(outside, u32::MAX, true)]),
    ];
    for (queue, chain) in harmless {
        let head = driver.queues[*queue].offer(chain);
        kick(&mut balloon, *queue);
        assert_eq!(driver.queues[*queue].used_chain(), Some((head, 0)), "{chain:x?}");
    }
    assert!(!driver.broken());
    for (queue, chain) in broken {
        driver.queues[*queue].offer(chain);
        kick(&mut balloon, *queue);
        assert!(driver.broken(), "{chain:x?}");
        kick(&mut balloon, INFLATE);
        balloon.reset();
        driver.interrupt.clear();
        driver.queues.iter_mut().for_each(|q| q.restart());
        balloon.activate(driver.activation(u64::MAX)).unwrap();
        let first = (FREE / pages::PAGE) as u32;
        inflate(&mut balloon, &mut driver, &[first]);
    }
}

#[test]
fn more_than_one_turn_is_done_in_turns_and_not_while_paused() {
    let mut event_loop = EventLoop::new().unwrap();
    let balloon = Arc::new(Mutex::new(Balloon::new(&everything()).unwrap()));
    let events = event_loop.subscribe(balloon.clone());
    let mut driver = Driver::new(lock(&balloon).queue_sizes());
    lock(&balloon).attach(events);
    let activation = driver.activation(u64::MAX);
    lock(&balloon).activate(activation).unwrap();
    driver.write(LIST, &[0; 4]);
    for _ in 0..200 {
        driver.queues[INFLATE].offer(&[(LIST, 4, false)]);
    }
    lock(&balloon).pause();
    kick(&mut lock(&balloon), INFLATE);
    assert!(driver.queues[INFLATE].used_chain().is_none());
    lock(&balloon).resume();
    let mut answered = 0;
    for _ in 0..10 {
        event_loop.run_once(100).unwrap();
        answered += std::iter::from_fn(|| driver.queues[INFLATE].used_chain()).count();
    }
    assert_eq!(answered, 200);
}

#[test]
fn much_is_done_in_turns() {
    let (mut balloon, mut driver) = active(&everything());
    // No two of them touch, and none is memory.
    let frames: Vec<u32> = (0..2000).map(|i| 0x8000_0000 + 2 * i).collect();
    driver.write(LIST, &frames.iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<_>>());
    for _ in 0..100 {
        driver.queues[INFLATE].offer(&[(LIST, 8000, false)]);
    }
    kick(&mut balloon, INFLATE);
    let mut turns = 1;
    let mut answered = std::iter::from_fn(|| driver.queues[INFLATE].used_chain()).count();
    assert_eq!(answered, BUDGET.div_ceil(2001));
    while balloon.wake.read().is_ok() {
        balloon.process(WAKE, EventSet::IN);
        answered += std::iter::from_fn(|| driver.queues[INFLATE].used_chain()).count();
        turns += 1;
    }
    assert_eq!(answered, 100);
    assert!(turns > 30, "{turns}");
}

#[test]
fn chains_without_end_stop_it() {
    for (count, broken) in [(1024, false), (1025, true)] {
        let (mut balloon, mut driver) = active(&everything());
        driver.queues[4].offer_indirect(&vec![(FREE, 0, true); count]);
        kick(&mut balloon, 4);
        assert_eq!(driver.broken(), broken, "{count}");
    }
}
