//! What the services stand on: the records, and this host's parts.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::wiring::Wiring;
use crate::image::Images;
use crate::microvm::Machines;
use crate::records::Records;
use crate::volume::Volumes;

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct Limits {
    /// vCPUs of all instances together.
    pub vcpus: u32,
    /// Memory of all instances together, in MiB.
    pub memory_mib: u64,
    /// How long a guest may take to stop before it is killed.
    pub stop_within: Duration,
    /// First pause before a failed machine is started again; it doubles each time.
    pub retry_after: Duration,
    /// Between two looks at a guest that runs.
    pub check_every: Duration,
    /// How long a terminated instance stays visible.
    pub terminated_visible: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            vcpus: 64,
            memory_mib: 65_536,
            stop_within: Duration::from_secs(30),
            retry_after: Duration::from_secs(1),
            check_every: Duration::from_secs(30),
            terminated_visible: Duration::from_secs(3600),
        }
    }
}

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Host {
    pub records: Records,
    pub machines: Machines,
    pub wiring: Wiring,
    pub images: Images,
    pub volumes: Volumes,
    /// The guests' side of Pulau, for images made of container images. None if this host does not have it.
    pub agent: Option<PathBuf>,
    pub limits: Arc<Limits>,
    /// Where consoles are kept.
    pub logs: PathBuf,
    /// Whether VMMs run jailed; not in development and tests without root.
    pub jailed: bool,
}

impl Host {
    /// Now.
    pub fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }
}
