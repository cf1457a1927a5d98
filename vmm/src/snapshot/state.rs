//! What is in a state file.

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::vcpu_state::VcpuState;
use crate::arch::vm_state::VmState;
use crate::config::{FullVmConfig, VmConfig};
use crate::devices::i8042::I8042State;
use crate::devices::serial::SerialState;
use crate::memory::{self, Memory};
use crate::virtio::balloon::BalloonState;
use crate::virtio::state::TransportState;

/// A machine without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// Version of the program that made it.
    pub made_by: String,
    /// Its configuration, as JSON: what it was made of, and the paths of what it uses.
    pub config: String,
    /// Where memory lies in the guest and, one region after the other, in the memory file.
    pub memory: Vec<Region>,
    /// See [`VmState`].
    pub vm: VmState,
    /// In their order.
    pub vcpus: Vec<VcpuState>,
    /// Virtio devices in the order of their windows.
    pub transports: Vec<TransportState>,
    /// Of the balloon, if there is one.
    pub balloon: Option<BalloonState>,
    /// Of the serial port.
    pub serial: SerialState,
    /// Of the keyboard controller.
    pub keyboard: I8042State,
    /// Whether the guest was given ACPI tables, and with them a VM generation identifier.
    pub acpi: bool,
}

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest physical address.
    pub start: u64,
    /// In bytes.
    pub len: u64,
}

/// Why a state cannot be that of a machine.
#[derive(Debug, thiserror::Error)]
pub enum Inconsistent {
    /// The configuration cannot be read.
    #[error("its configuration: {0}")]
    Config(String),
    /// Configuration and contents differ.
    #[error("its {0} are not those of its configuration")]
    Parts(&'static str),
}

/// The regions of `memory`.
pub fn regions(memory: &Memory) -> Vec<Region> {
    memory.iter().map(|region| Region { start: region.start_addr().0, len: region.len() }).collect()
}

impl State {
    /// The configuration, which fits what else is in the state.
    pub fn configuration(&self) -> Result<VmConfig, Inconsistent> {
        let full: FullVmConfig =
            serde_json::from_str(&self.config).map_err(|e| Inconsistent::Config(e.to_string()))?;
        let config = VmConfig::try_from(full).map_err(|e| Inconsistent::Config(e.to_string()))?;
        let expected: Vec<_> = memory::ranges(config.machine.mem_size_bytes())
            .map(|(start, len)| Region { start, len })
            .collect();
        if expected != self.memory {
            return Err(Inconsistent::Parts("memory regions"));
        }
        if self.vcpus.len() != usize::from(config.machine.vcpu_count) {
            return Err(Inconsistent::Parts("vCPUs"));
        }
        if self.balloon.is_some() != config.balloon.is_some() {
            return Err(Inconsistent::Parts("balloon"));
        }
        Ok(config)
    }

    /// Length of the memory file, in bytes.
    pub fn memory_len(&self) -> u64 {
        self.memory.iter().map(|region| region.len).sum()
    }
}
