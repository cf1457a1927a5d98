//! How large an instance is.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// vCPUs and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Size {
    /// 1 to 32.
    pub vcpus: u8,
    /// MiB.
    pub memory_mib: u64,
}

/// A size with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct InstanceType {
    pub name: &'static str,
    #[serde(flatten)]
    pub size: Size,
}

const fn of(name: &'static str, vcpus: u8, memory_mib: u64) -> InstanceType {
    InstanceType { name, size: Size { vcpus, memory_mib } }
}

/// All that have a name, smallest first. Any other size is `custom`.
pub const INSTANCE_TYPES: [InstanceType; 8] = [
    of("nano", 1, 128),
    of("micro", 1, 256),
    of("small", 1, 512),
    of("medium", 1, 1024),
    of("large", 2, 2048),
    of("xlarge", 4, 4096),
    of("2xlarge", 8, 8192),
    of("4xlarge", 16, 16384),
];

impl InstanceType {
    /// The name of sizes that have none.
    pub const CUSTOM: &'static str = "custom";

    pub fn named(name: &str) -> Option<&'static Self> {
        INSTANCE_TYPES.iter().find(|known| known.name == name)
    }
}
