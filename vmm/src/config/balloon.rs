//! The memory balloon (`/balloon`).

use serde::{Deserialize, Serialize};

/// A device through which the host takes memory back from the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much the balloon should hold, in MiB.
    pub amount_mib: u32,
    /// Whether the guest may take memory out of the balloon rather than end a process.
    pub deflate_on_oom: bool,
    /// Seconds between statistics; 0 means none, and cannot be changed once the guest runs.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether free page hinting runs can be started.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports pages as they become free.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// The body of `PATCH /balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    pub amount_mib: u32,
}

/// The body of `PATCH /balloon/statistics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    pub stats_polling_interval_s: u16,
}

/// The body of `GET /balloon/statistics`: the state of the balloon, and what the guest said last
/// (virtio 1.2, 5.5.6.3; amounts of memory are bytes). What it did not say is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStats {
    /// 4 KiB pages the balloon should hold.
    pub target_pages: u32,
    /// 4 KiB pages the balloon holds.
    pub actual_pages: u32,
    pub target_mib: u32,
    pub actual_mib: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_allocations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugetlb_failures: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_kill: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alloc_stall: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_scan: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub async_reclaim: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_reclaim: Option<u64>,
}

/// The body of `PATCH /balloon/hinting/start`; the whole body may be absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonHintingStart {
    /// Whether the VMM ends the run itself once the guest is done.
    #[serde(default = "acknowledge_by_default")]
    pub acknowledge_on_stop: bool,
}

fn acknowledge_by_default() -> bool {
    true
}

impl Default for BalloonHintingStart {
    fn default() -> Self {
        Self { acknowledge_on_stop: acknowledge_by_default() }
    }
}

/// The body of `GET /balloon/hinting/status`: command ids of virtio 1.2, 5.5.6.6.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonHintingStatus {
    /// The last command of the host.
    pub host_cmd: u32,
    /// The last command the guest answered.
    pub guest_cmd: Option<u32>,
}
