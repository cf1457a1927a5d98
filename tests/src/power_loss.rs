//! What is left of a guest's writes when the VMM is killed in the middle of them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::vmm::Vmm;
use crate::{PATIENCE, wait_for};

/// Kills the VMM while the guest writes numbered records to `device` and says after each which one it has flushed:
/// every record it said is in `file`, which is behind the device.
#[track_caller]
pub fn loses_nothing_flushed(vmm: &mut Vmm, device: &str, file: &Path) {
    vmm.sh(&format!(
        "cat > /tmp/w <<'E'\n\
         i=0\n\
         while [ $i -lt 2000 ]; do\n\
         printf 'record %08d' $i | dd of={device} bs=512 seek=$i conv=notrunc,fsync,sync 2>/dev/null\n\
         echo flushed $i > /dev/ttyS0\n\
         i=$((i + 1))\n\
         done\n\
         E\n\
         setsid sh /tmp/w >/dev/null 2>&1 </dev/null &"
    ));
    wait_for("twenty records", PATIENCE, || last_flushed(&vmm.console()).filter(|n| *n >= 20));
    vmm.signal(Signal::SIGKILL);
    vmm.wait();
    let last = last_flushed(&vmm.console()).expect("what it had said");
    let disk = File::open(file).expect("the file");
    for record in 0..=last {
        let mut bytes = [0; 15];
        disk.read_exact_at(&mut bytes, record * 512).expect("the record");
        let found = std::str::from_utf8(&bytes).expect("a record is text");
        assert_eq!(found, format!("record {record:08}"), "{device}");
    }
}

/// By the last whole line of the console.
fn last_flushed(console: &str) -> Option<u64> {
    let complete = console.rfind('\n').map_or("", |end| &console[..end]);
    complete.lines().rev().find_map(|line| line.trim().strip_prefix("flushed ")?.parse().ok())
}
