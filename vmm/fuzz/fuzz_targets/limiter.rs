//! The token bucket, against what it promises: in no span of time does it give more than its burst, its size
//! and what was refilled, plus the largest request, which may run into debt; and what it says to wait is enough.

#![no_main]

use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use pulau_vmm::rate_limiter::TokenBucket;
use pulau_vmm_fuzz::Input;

fuzz_target!(|data: &[u8]| {
    let input = &mut Input(data);
    let (size, burst, refill_ns) = (input.u64(), input.u64(), input.u64());
    let refill = Duration::from_nanos(refill_ns);
    let start = Instant::now();
    let Some(mut bucket) = TokenBucket::new(size, burst, refill, start) else {
        assert!(size == 0 || refill_ns == 0);
        return;
    };
    let mut now = start;
    let mut given = 0u128;
    let mut largest = 0u128;
    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        // Debts are cut off where no request comes near.
        let tokens = (input.u64() >> 1) >> (input.u8() % 64);
        let step = input.u64() >> (input.u8() % 64);
        now = now.checked_add(Duration::from_nanos(step)).unwrap_or(now);
        match bucket.take(tokens, now) {
            Ok(()) => {
                largest = largest.max(tokens.into());
                given += u128::from(tokens);
            }
            Err(wait) => {
                assert!(!wait.is_zero());
                // Longer waits are cut off.
                let then = now.checked_add(wait).filter(|_| wait < Duration::from_secs(1 << 30));
                if let Some(then) = then {
                    assert!(bucket.clone().take(tokens, then).is_ok(), "{tokens} after {wait:?}");
                }
            }
        }
        let passed = now.duration_since(start).as_nanos();
        // Sizes and times beyond what is counted with are cut off.
        if size < 1 << 62 && refill_ns < 1 << 62 && passed < 1 << 62 {
            let refilled = u128::from(size) * passed / u128::from(refill_ns);
            assert!(
                given <= u128::from(burst) + u128::from(size) + refilled + largest,
                "{given} in {passed} ns"
            );
        }
    }
});
