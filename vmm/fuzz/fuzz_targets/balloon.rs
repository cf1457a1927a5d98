//! The balloon with all its queues, and what the API can ask of it meanwhile.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pulau_vmm::config::BalloonConfig;
use pulau_vmm::virtio::balloon::Balloon;
use pulau_vmm_fuzz::{Guest, Input, devices};

fuzz_target!(|data: &[u8]| {
    let input = &mut Input(data);
    let flags = input.u8();
    let config = BalloonConfig {
        amount_mib: u32::from(flags) << 24,
        deflate_on_oom: flags & 1 != 0,
        stats_polling_interval_s: u16::from(flags & 2),
        free_page_hinting: flags & 4 != 0,
        free_page_reporting: flags & 8 != 0,
    };
    let mut balloon = Balloon::new(&config).expect("descriptors");
    let mut guest = Guest::new(input, &mut balloon);
    guest.watch().allow_zeroing();
    let other = |_: &mut Guest, balloon: &mut Balloon, input: &mut Input| match input.u8() % 4 {
        0 => balloon.set_target(input.u32()),
        1 => balloon.start_hinting(input.u8() & 1 != 0),
        2 => balloon.stop_hinting(),
        _ => {
            let stats = balloon.stats();
            assert!(stats.target_mib <= stats.target_pages && stats.actual_mib <= stats.actual_pages);
        }
    };
    guest.run(input, &mut balloon, other, |guest, balloon| devices::balloon_works(guest, balloon));
});
