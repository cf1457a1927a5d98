use super::*;
use std::sync::{Arc, Mutex};

use crate::event_loop::{EventLoop, Subscriber, lock};

const NS: Duration = Duration::from_nanos(1);
const MS: Duration = Duration::from_millis(1);

fn bucket(size: u64, burst: u64, refill: Duration) -> (TokenBucket, Instant) {
    let start = Instant::now();
    (TokenBucket::new(size, burst, refill, start).unwrap(), start)
}

#[test]
fn zero_size_or_refill_time_limits_nothing() {
    assert!(TokenBucket::new(0, 10, MS, Instant::now()).is_none());
    assert!(TokenBucket::new(10, 0, Duration::ZERO, Instant::now()).is_none());
}

#[test]
fn refills_to_the_nanosecond() {
    // 3 tokens in 10 ns: one every 3 1/3 ns.
    let (mut b, t) = bucket(3, 0, 10 * NS);
    assert_eq!(b.take(3, t), Ok(()));
    assert_eq!(b.take(1, t), Err(4 * NS));
    assert_eq!(b.take(1, t + 3 * NS), Err(NS));
    assert_eq!(b.take(1, t + 4 * NS), Ok(()));
    assert_eq!(b.take(1, t + 6 * NS), Err(NS));
    assert_eq!(b.take(1, t + 7 * NS), Ok(()));
    assert_eq!(b.take(1, t + 10 * NS), Ok(()), "no third of a token was lost");
    assert_eq!(b.take(1, t + 10 * NS), Err(4 * NS));
}

#[test]
fn never_more_than_full_and_asking_costs_nothing() {
    let (mut b, t) = bucket(1000, 0, 100 * MS);
    assert_eq!(b.take(1000, t), Ok(()));
    let mut now = t;
    while now < t + 100 * MS {
        assert!(b.take(1001, now).is_err());
        now += Duration::from_nanos(12_347);
    }
    assert_eq!(b.take(1000, t + 100 * MS), Ok(()));
    assert_eq!(b.take(1000, t + 1000 * MS), Ok(()), "idle time beyond full brings nothing");
    assert_eq!(b.take(1, t + 1000 * MS), Err(MS / 10));
}

#[test]
fn the_burst_is_spent_first_and_once() {
    let (mut b, t) = bucket(10, 5, 10 * MS);
    assert_eq!(b.available(), 15);
    assert_eq!(b.take(4, t), Ok(()));
    assert_eq!(b.available(), 11);
    assert_eq!(b.take(11, t), Ok(()), "what the burst lacks comes from the bucket");
    assert_eq!(b.take(1, t), Err(MS));
    assert_eq!(b.take(10, t + 10 * MS), Ok(()));
    assert_eq!(b.take(1, t + 10 * MS), Err(MS), "the burst does not come back");
}

#[test]
fn a_request_larger_than_the_bucket_passes_when_full_and_leaves_a_debt() {
    let (mut b, t) = bucket(10, 0, 10 * MS);
    assert_eq!(b.take(1, t), Ok(()));
    assert_eq!(b.take(35, t), Err(MS));
    assert_eq!(b.take(35, t + MS), Ok(()));
    assert_eq!(b.available(), 0);
    // 25 tokens of debt and one token for the request.
    assert_eq!(b.take(1, t + MS), Err(26 * MS));
    assert_eq!(b.take(1, t + 27 * MS), Ok(()));
}

#[test]
fn the_long_run_rate_is_exact() {
    // An awkward rate: 999,983 bytes in 77 ms, by requests of 4093 bytes, for a minute.
    let (mut b, start) = bucket(999_983, 0, 77 * MS);
    let (mut now, mut taken) = (start, 0u128);
    while now < start + Duration::from_secs(60) {
        match b.take(4093, now) {
            Ok(()) => taken += 4093,
            Err(wait) => now += wait,
        }
    }
    let allowed = 999_983 + (now - start).as_nanos() * 999_983 / 77_000_000;
    assert!(taken <= allowed && allowed - taken < 2 * 4093, "{taken} of {allowed}");
}

/// Numbers that look random and are the same each time (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Over every span of time between two requests, no more passes than the bucket holds when full, the burst, and
/// what time brings, to the nanosecond; `most` is the largest request, which may be larger than the bucket.
fn assert_bounded(passed: &[(Instant, u64)], size: u64, burst: u64, refill: Duration, most: u64, ops: &str) {
    for (first, (from, _)) in passed.iter().enumerate() {
        let mut sum = 0;
        for (to, tokens) in &passed[first..] {
            sum += u128::from(*tokens);
            let brought = (*to - *from).as_nanos() * u128::from(size) / refill.as_nanos();
            let allowed = u128::from(size.max(most)) + u128::from(burst) + brought;
            assert!(sum <= allowed, "{ops}: {sum} of {allowed} in {:?}", *to - *from);
        }
    }
}

#[test]
fn never_more_than_burst_and_rate_over_any_span() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for round in 0..60 {
        let (size, burst) = (1 + numbers.below(5000), numbers.below(2) * numbers.below(20_000));
        let refill = Duration::from_nanos(1 + numbers.below(200_000_000));
        // In a third of the rounds larger than the bucket, and then a debt.
        let most = if round % 3 == 0 { 3 * size } else { size };
        let (mut b, mut now) = bucket(size, burst, refill);
        let mut passed = Vec::new();
        for _ in 0..300 {
            let tokens = 1 + numbers.below(most);
            match b.take(tokens, now) {
                Ok(()) => passed.push((now, tokens)),
                // Now and then too early, as when the timer of another bucket reports.
                Err(wait) if numbers.below(4) == 0 => now += wait / 2,
                Err(wait) => now += wait,
            }
            // Busy mostly, then idle for longer than it takes to fill.
            if numbers.below(20) == 0 {
                now += refill * numbers.below(3) as u32 + Duration::from_nanos(numbers.below(1000));
            }
        }
        assert!(passed.len() > 100, "it does pass requests");
        assert_bounded(&passed, size, burst, refill, most, "tokens");
    }
}

#[test]
fn a_limiter_keeps_both_bounds_over_any_span() {
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    let mut now = Instant::now();
    let (ops, bytes) =
        (TokenBucket::new(40, 7, 10 * MS, now), TokenBucket::new(100_000, 30_000, 30 * MS, now));
    let mut limiter = RateLimiter::new(ops, bytes).unwrap();
    let mut passed = Vec::new();
    while passed.len() < 2000 {
        let len = 512 + numbers.below(40_000) / (1 + numbers.below(60));
        if limiter.admit_at(len, now) {
            passed.push((now, len));
        }
        // Whoever asks too often gets no more.
        limiter.unblock();
        now += Duration::from_nanos(numbers.below(400_000));
    }
    let operations: Vec<_> = passed.iter().map(|(at, _)| (*at, 1)).collect();
    assert_bounded(&operations, 40, 7, 10 * MS, 1, "operations");
    assert_bounded(&passed, 100_000, 30_000, 30 * MS, 41_000, "bytes");
    // And what the scarcer one allows does pass.
    let (first, last) = (passed[0].0, passed[passed.len() - 1].0);
    let all: u64 = passed.iter().map(|(_, len)| len).sum();
    let brought = (last - first).as_nanos() * 100_000 / (30 * MS).as_nanos();
    let used = u128::from(all) * 10 >= brought * 8
        || 2000 * 10 >= (last - first).as_nanos() * 40 / (10 * MS).as_nanos() * 8;
    assert!(used, "{all} bytes of {brought}");
}

#[test]
fn extremes_do_not_overflow() {
    let (mut b, t) = bucket(u64::MAX, u64::MAX, Duration::from_millis(u64::MAX));
    for _ in 0..3 {
        assert_eq!(b.take(u64::MAX / 2, t), Ok(()));
    }
    for _ in 0..4 {
        let _ = b.take(u64::MAX, t + Duration::from_secs(1 << 32));
    }
    let (mut b, t) = bucket(1, 0, Duration::from_millis(u64::MAX));
    assert_eq!(b.take(u64::MAX, t), Ok(()));
    for _ in 0..4 {
        assert!(b.take(1, t).is_err());
    }
    assert!(b.take(1, t - Duration::from_millis(1)).is_err(), "a clock that goes back is no harm");
}

#[test]
fn both_buckets_are_taken_from_or_neither() {
    let now = Instant::now();
    let mut limiter =
        RateLimiter::new(TokenBucket::new(2, 0, 10 * MS, now), TokenBucket::new(100, 0, 10 * MS, now))
            .unwrap();
    assert!(limiter.admit_at(60, now));
    assert!(!limiter.admit_at(60, now));
    assert!(limiter.is_blocked());
    assert_eq!(limiter.ops.as_ref().unwrap().available(), 1);
    assert!(!limiter.admit(1), "nothing overtakes what waits");
    limiter.unblock();
    assert!(limiter.admit_at(40, now));
    assert!(!limiter.admit_at(0, now), "out of operations");
    limiter.unblock();
    assert!(limiter.admit_at(0, now + 5 * MS));
}

struct Unblocks(RateLimiter, u32);

impl Subscriber for Unblocks {
    fn process(&mut self, token: u32, _: EventSet) {
        assert_eq!(token, 9);
        self.0.unblock();
        self.1 += 1;
    }
}

#[test]
fn the_timer_reports_when_blocked_and_only_then() {
    let mut event_loop = EventLoop::new().unwrap();
    let limiter = RateLimiter::new(TokenBucket::new(1, 0, 20 * MS, Instant::now()), None).unwrap();
    let device = Arc::new(Mutex::new(Unblocks(limiter, 0)));
    let events = event_loop.subscribe(device.clone());
    lock(&device).0.register(&events, 9).unwrap();

    let start = Instant::now();
    assert!(lock(&device).0.admit(1));
    event_loop.run_once(0).unwrap();
    assert_eq!(lock(&device).1, 0, "not armed while nothing waits");
    for round in 1..4 {
        assert!(!lock(&device).0.admit(1));
        event_loop.run_once(5000).unwrap();
        assert_eq!(lock(&device).1, round, "every expiry is an edge");
        assert!(lock(&device).0.admit(1), "by then it can pass");
    }
    assert!(start.elapsed() >= 59 * MS);
}

#[test]
fn new_limits_release_what_waits() {
    let mut event_loop = EventLoop::new().unwrap();
    let hour = Duration::from_secs(3600);
    let limiter = RateLimiter::new(TokenBucket::new(1, 0, hour, Instant::now()), None).unwrap();
    let device = Arc::new(Mutex::new(Unblocks(limiter, 0)));
    let events = event_loop.subscribe(device.clone());
    lock(&device).0.register(&events, 9).unwrap();
    assert!(lock(&device).0.admit(1));
    assert!(!lock(&device).0.admit(1));
    let none = TokenBucketConfig::default();
    lock(&device).0.update(&RateLimiterConfig { ops: Some(none), bandwidth: None });
    event_loop.run_once(5000).unwrap();
    assert_eq!(lock(&device).1, 1);
    assert!(lock(&device).0.admit(1));
}

#[test]
fn an_update_changes_what_it_names() {
    let bucket = |size| Some(TokenBucketConfig { size, one_time_burst: Some(5), refill_time: 1000 });
    let config = RateLimiterConfig { bandwidth: bucket(100), ops: bucket(10) };
    let mut limiter = RateLimiter::from_config(Some(&config)).unwrap();
    let held = |b: &Option<TokenBucket>| b.as_ref().map(TokenBucket::available);
    assert!(limiter.admit_at(50, Instant::now()));
    assert_eq!((held(&limiter.ops), held(&limiter.bytes)), (Some(14), Some(55)));
    limiter.update(&RateLimiterConfig { bandwidth: None, ops: bucket(20) });
    assert_eq!((held(&limiter.ops), held(&limiter.bytes)), (Some(25), Some(55)));
    let none = Some(TokenBucketConfig::default());
    limiter.update(&RateLimiterConfig { bandwidth: none, ops: None });
    assert_eq!((held(&limiter.ops), held(&limiter.bytes)), (Some(25), None));
    assert!(RateLimiter::from_config(None).unwrap().admit(u64::MAX));
}
