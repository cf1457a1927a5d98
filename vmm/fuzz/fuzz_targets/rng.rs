//! The entropy device, with and without a limit.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pulau_vmm::config::{RateLimiterConfig, TokenBucketConfig};
use pulau_vmm::virtio::rng::Rng;
use pulau_vmm_fuzz::{Guest, Host, Input, devices};

fuzz_target!(|data: &[u8]| {
    let input = &mut Input(data);
    let bucket = TokenBucketConfig { size: 1 << 16, one_time_burst: None, refill_time: 1_000_000 };
    let limits = RateLimiterConfig { ops: None, bandwidth: Some(bucket) };
    let limited = input.u8() & 1 != 0;
    let mut rng = Rng::new(limited.then_some(&limits)).expect("descriptors");
    let mut host = Host::new(&mut rng);
    Guest::new(input, &mut rng).run(
        input,
        &mut rng,
        |_, rng, _| host.turn(rng),
        |guest, rng| {
            if !limited {
                devices::rng_works(guest, rng);
            }
        },
    );
});
