//! Requests that do something rather than configure something, and the small answers.

use serde::{Deserialize, Serialize};

/// What `PUT /actions` can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Boot the microVM.
    InstanceStart,
    /// Write the metrics now.
    FlushMetrics,
    /// Press Ctrl+Alt+Del on the guest's keyboard: an orderly stop if the guest listens.
    SendCtrlAltDel,
}

/// The body of `PUT /actions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionConfig {
    pub action_type: ActionType,
}

/// What `PATCH /vm` can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmStateChange {
    Paused,
    Resumed,
}

/// The body of `PATCH /vm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStateUpdate {
    pub state: VmStateChange,
}

/// The body of `GET /version`. The field has Firecracker's name because its clients look for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    pub firecracker_version: String,
}

/// The body of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// For a person to read.
    pub fault_message: String,
}
