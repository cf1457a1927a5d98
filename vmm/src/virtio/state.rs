//! What a virtio device and its transport consist of, to be kept in a file.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

/// One queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl From<QueueState> for SavedQueue {
    fn from(state: QueueState) -> Self {
        let QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = state;
        Self {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        }
    }
}

impl SavedQueue {
    /// The queue, if it can be one.
    pub fn to_queue(self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx_enabled,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }

    /// Most elements the device has room for.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }
}

/// A transport, and the device behind it as far as all devices are alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device type (virtio 1.2, section 5).
    pub device_type: u32,
    pub(super) driver_features: u64,
    pub(super) feature_page: u32,
    pub(super) driver_feature_page: u32,
    pub(super) queue_select: u32,
    pub(super) status: u32,
    pub(super) active: bool,
    pub(super) needs_reset: bool,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    /// As the driver has set them up.
    pub(super) queues: Vec<SavedQueue>,
    /// Those the device works with, where it does.
    pub(super) working: Vec<SavedQueue>,
}

/// Why a device could not be put back into a state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another device than that the state was of.
    #[error("it is a device of type {found}, and the snapshot has one of type {wanted} in its place")]
    Type {
        /// In the configuration.
        found: u32,
        /// In the state.
        wanted: u32,
    },
    /// Other queues than the device has.
    #[error("its queues are not those of the snapshot")]
    Queues,
    /// The guest uses what this host cannot offer.
    #[error("the guest uses features that this host does not have: {0:#x}")]
    Features(u64),
    /// A queue that cannot be.
    #[error("queue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// See [`super::ActivateError`].
    #[error(transparent)]
    Activate(#[from] super::ActivateError),
}
