//! Configuration files and the metadata file. A configuration that is accepted is the same after it was written
//! and read again, and what it says a device is called is so.

#![no_main]

use libfuzzer_sys::fuzz_target;
use pulau_vmm::config::{FullVmConfig, VmConfig};

fuzz_target!(|data: &[u8]| {
    let full: FullVmConfig = match serde_json::from_slice(data) {
        Ok(full) => full,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    let config = match VmConfig::try_from(full) {
        Ok(config) => config,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    assert!((1..=32).contains(&config.machine.vcpu_count), "{}", config.machine.vcpu_count);
    assert!(config.machine.mem_size_mib > 0);
    let written = serde_json::to_string(&FullVmConfig::from(&config)).expect("it is a plain tree");
    let read: FullVmConfig = serde_json::from_str(&written).expect("it was written here");
    let again = VmConfig::try_from(read).expect("it was accepted before");
    assert_eq!(config, again, "{written}");
    let _ = config.check_bootable();
});
