//! State files of snapshots. One that is accepted is the same after it was written and read again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pulau_vmm::snapshot::file::{contents, decode, encode};

fuzz_target!(|data: &[u8]| {
    if let Err(e) = decode(data) {
        assert!(!e.to_string().is_empty());
    }
    // The checksum would keep out nearly all that the fuzzer makes.
    let state = match contents(data) {
        Ok(state) => state,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    let written = encode(&state).expect("it was read before");
    let again = decode(&written).expect("it was written here");
    assert_eq!(encode(&again).expect("it was read before"), written);
    match state.configuration() {
        Ok(config) => assert_eq!(config.machine.mem_size_bytes(), state.memory_len()),
        Err(e) => assert!(!e.to_string().is_empty()),
    }
});
