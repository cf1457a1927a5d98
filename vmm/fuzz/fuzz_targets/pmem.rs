//! The persistent memory device's queue. The guest reaches the memory itself without the device, so there
//! is nothing to fuzz about that.

#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use pulau_vmm::config::PmemConfig;
use pulau_vmm::virtio::pmem::Pmem;
use pulau_vmm_fuzz::{Guest, Input, devices};
use tempfile::NamedTempFile;

thread_local! {
    static FILE: LazyCell<NamedTempFile> = LazyCell::new(|| {
        let file = NamedTempFile::new_in("/dev/shm").or_else(|_| NamedTempFile::new()).expect("a file");
        file.as_file().set_len(4096).expect("a page");
        file
    });
}

fuzz_target!(|data: &[u8]| {
    FILE.with(|file| {
        let input = &mut Input(data);
        let config = PmemConfig {
            id: "fuzz".into(),
            path_on_host: file.path().to_owned(),
            read_only: input.u8() & 1 != 0,
            ..PmemConfig::default()
        };
        let mut pmem = Pmem::new(&config).expect("the file is fine");
        Guest::new(input, &mut pmem).run(
            input,
            &mut pmem,
            |_, pmem, input| pmem.place(input.u64()),
            |guest, pmem| devices::pmem_works(guest, pmem),
        );
        assert_eq!(file.as_file().metadata().expect("metadata").len(), 4096);
    });
});
