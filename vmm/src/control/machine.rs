//! What the controller needs of a machine: two narrow traits, so that the controller is tested
//! with a machine that is not there, and knows nothing of KVM.

use std::error::Error;

use crate::config::{
    BalloonHintingStart, BalloonHintingStatus, BalloonStats, DriveUpdate, NetworkInterfaceUpdate, PmemUpdate,
    SnapshotCreateConfig, SnapshotLoadConfig, VmConfig,
};

/// Why a machine could not be started. The message names the field or file at fault.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(#[source] pub Box<dyn Error + Send + Sync>);

/// Why a machine could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// There is no such device.
    #[error("there is no {kind} {id:?}")]
    NoSuchDevice { kind: &'static str, id: String },
    /// The machine, as configured, cannot do this; the message says what would make it able to.
    #[error("{0}")]
    NotConfigured(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(#[source] Box<dyn Error + Send + Sync>),
}

impl MachineError {
    /// An attempt that failed, with its cause.
    pub fn failed(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Failed(cause.into())
    }
}

/// Makes machines out of configurations.
pub trait MachineBuilder {
    /// Builds the machine `config` describes and starts its vCPUs.
    ///
    /// `config` has passed its own checks and has a boot source. With an error nothing is left
    /// behind (no file, socket, tap or thread), and the call may be repeated.
    fn start(&mut self, config: &VmConfig) -> Result<Box<dyn Machine>, StartError>;

    /// Makes the machine of a snapshot, paused, and returns it with its configuration. With an error nothing is
    /// left behind, and the call may be repeated.
    fn load(&mut self, request: &SnapshotLoadConfig) -> Result<(Box<dyn Machine>, VmConfig), StartError>;
}

/// A started machine. Every call is made from the thread of the main loop and may take a moment,
/// but never waits for the guest. With an error, the machine is as it was before the call.
pub trait Machine {
    /// Stops every vCPU and device. Only called while running; returns once nothing runs.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// Lets vCPUs and devices go on. Only called while paused.
    fn resume(&mut self) -> Result<(), MachineError>;

    /// Writes a snapshot of the machine, which was made as `config` says. Only called while paused.
    fn save(&mut self, request: &SnapshotCreateConfig, config: &VmConfig) -> Result<(), MachineError>;

    /// Presses Ctrl+Alt+Del on the guest's keyboard.
    fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError>;

    /// Puts another file behind a drive (the guest is told of the new size), or changes its
    /// limits. At least one of the two is given.
    fn update_drive(&mut self, update: &DriveUpdate) -> Result<(), MachineError>;

    /// Changes the limits of a network interface.
    fn update_network_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), MachineError>;

    /// Changes the limits of a pmem device.
    fn update_pmem(&mut self, update: &PmemUpdate) -> Result<(), MachineError>;

    /// Sets what the balloon should hold. Not more than memory.
    fn set_balloon_target(&mut self, amount_mib: u32) -> Result<(), MachineError>;

    /// Sets the seconds between statistics. Only called for a balloon that has statistics, and
    /// never with 0.
    fn set_balloon_stats_interval(&mut self, seconds: u16) -> Result<(), MachineError>;

    /// The balloon's state and the guest's last statistics.
    fn balloon_stats(&mut self) -> Result<BalloonStats, MachineError>;

    /// Starts a free page hinting run. Only called for a balloon that has hinting, as the two
    /// below.
    fn start_balloon_hinting(&mut self, start: &BalloonHintingStart) -> Result<(), MachineError>;

    /// How the free page hinting run is going.
    fn balloon_hinting_status(&mut self) -> Result<BalloonHintingStatus, MachineError>;

    /// Ends a free page hinting run.
    fn stop_balloon_hinting(&mut self) -> Result<(), MachineError>;
}
