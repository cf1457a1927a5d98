//! The driver's memory statistics (virtio 1.2, 5.5.6.3).

use std::io::Read;

use crate::config::BalloonStats;

/// Bytes of one statistic: a tag of 16 bits and a value of 64.
const ENTRY: usize = 10;
/// Most statistics read; there are 16.
const MAX_ENTRIES: usize = 64;

/// The statistics in a driver's buffer. What is unknown is passed over, and so is what is too much.
pub fn parse(mut buffer: impl Read) -> BalloonStats {
    let mut stats = BalloonStats::default();
    let mut entry = [0; ENTRY];
    for _ in 0..MAX_ENTRIES {
        if buffer.read_exact(&mut entry).is_err() {
            break;
        }
        let [t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] = entry;
        let value = Some(u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]));
        // The tags in the order of the specification, VIRTIO_BALLOON_S_SWAP_IN to _DIRECT_RECLAIM.
        match u16::from_le_bytes([t0, t1]) {
            0 => stats.swap_in = value,
            1 => stats.swap_out = value,
            2 => stats.major_faults = value,
            3 => stats.minor_faults = value,
            4 => stats.free_memory = value,
            5 => stats.total_memory = value,
            6 => stats.available_memory = value,
            7 => stats.disk_caches = value,
            8 => stats.hugetlb_allocations = value,
            9 => stats.hugetlb_failures = value,
            // From here on since Linux 6.12.
            10 => stats.oom_kill = value,
            11 => stats.alloc_stall = value,
            12 => stats.async_scan = value,
            13 => stats.direct_scan = value,
            14 => stats.async_reclaim = value,
            15 => stats.direct_reclaim = value,
            _ => {}
        }
    }
    stats
}
