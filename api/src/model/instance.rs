//! A machine, as EC2 knows it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use chrono::{DateTime, Utc};
use pulau_vmm::config::MacAddr;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{PublishedPort, Size};

/// An instance.
///
/// ```text
///  run ─▶ pending ─▶ running ─▶ stopping ─▶ stopped ─▶ pending …   (start)
///            │          │           │           │
///            └──────────┴───────────┴───────────┴─▶ shutting-down ─▶ terminated
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// `i-` and 17 hexadecimal digits.
    pub id: String,
    /// Its name in DNS and its host name: the tag `Name` where that can be one, else its id.
    pub hostname: String,
    pub image_id: String,
    /// Name of its type, or `custom`.
    pub instance_type: String,
    #[serde(flatten)]
    pub size: Size,
    pub state: InstanceState,
    /// When `state` became what it is.
    pub state_since: DateTime<Utc>,
    /// Why it is in this state, if somebody or something made it so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<StateReason>,
    /// What it is to become.
    pub desired: Desired,
    /// When it was last asked to run.
    pub launch_time: DateTime<Utc>,
    pub created: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_name: Option<String>,
    pub interface: Interface,
    pub security_groups: Vec<String>,
    /// Ports of the host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published_ports: Vec<PublishedPort>,
    /// Its root disk: what it writes, where the image is shared.
    pub root_volume: String,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub termination_protection: bool,
    #[serde(default)]
    pub shutdown_behavior: ShutdownBehavior,
    /// Whether it is booted anew when its VMM or its agent, having answered before, does not any more.
    #[serde(default = "yes")]
    pub auto_recovery: bool,
    pub status: StatusChecks,
    /// Of its last boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootReport>,
    /// Counts boots asked for; a reboot is one more. Its machine is the one of this number.
    #[serde(default)]
    pub generation: u64,
    /// Base64; given to the guest by the metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// A stop that is under way does not wait for the guest.
    #[serde(default)]
    pub force_stop: bool,
    /// Position among those that one request ran.
    #[serde(default)]
    pub launch_index: u32,
}

/// What is on unless it is turned off.
pub fn yes() -> bool {
    true
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    Pending,
    Running,
    Stopping,
    Stopped,
    ShuttingDown,
    Terminated,
}

impl InstanceState {
    pub const ALL: [Self; 6] =
        [Self::Pending, Self::Running, Self::Stopping, Self::Stopped, Self::ShuttingDown, Self::Terminated];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::ShuttingDown => "shutting-down",
            Self::Terminated => "terminated",
        }
    }

    /// Whether it takes processors and memory of the host.
    pub fn takes_capacity(self) -> bool {
        matches!(self, Self::Pending | Self::Running | Self::Stopping)
    }
}

/// What somebody wants an instance to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Desired {
    Running,
    Stopped,
    Terminated,
}

/// What happens when the guest powers itself off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownBehavior {
    #[default]
    Stop,
    Terminate,
}

/// Why an instance changed its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StateReason {
    /// `Client.…` if a user or the guest caused it, `Server.…` if the host did.
    pub code: String,
    pub message: String,
}

/// The reasons there are.
pub mod reason {
    use super::StateReason;

    pub fn new(code: &str, message: impl Into<String>) -> StateReason {
        StateReason { code: code.to_owned(), message: message.into() }
    }

    pub fn user_initiated(message: &str) -> StateReason {
        new("Client.UserInitiatedShutdown", message)
    }

    pub fn guest_initiated(message: &str) -> StateReason {
        new("Client.InstanceInitiatedShutdown", message)
    }

    /// The code of a guest or VMM that stopped answering.
    pub const UNRESPONSIVE: &str = "Server.Unresponsive";

    /// The host or the microVM failed.
    pub fn internal(message: impl Into<String>) -> StateReason {
        new("Server.InternalError", message)
    }
}

/// Its place in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Interface {
    pub network_id: String,
    #[schema(value_type = String)]
    pub private_address: Ipv4Addr,
    /// `06:…`, derived from the address.
    #[schema(value_type = String)]
    pub mac: MacAddr,
    /// Name of the host's end.
    pub tap: String,
}

/// Whether it does what it should. EC2's three checks: of the host's side, of the guest, of its network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatusChecks {
    /// The VMM process answers.
    pub vmm: Check,
    /// The agent in the guest answers.
    pub agent: Check,
    /// The guest's end of its interface is up.
    pub network: Check,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// It does not run.
    #[default]
    NotApplicable,
    /// It is booting.
    Initializing,
    Ok,
    Impaired,
    /// It cannot be told: the image has no agent, for one.
    Unknown,
}

/// How long the steps of a boot took, in microseconds since the request for it was taken up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootReport {
    /// Disks are ready.
    pub disks_us: Option<u64>,
    /// Network is ready.
    pub network_us: Option<u64>,
    /// The VMM answers.
    pub vmm_us: Option<u64>,
    /// The vCPUs run.
    pub started_us: Option<u64>,
    /// From the start of the vCPUs to the guest's init, by the VMM's boot timer.
    pub guest_init_us: Option<u64>,
    /// The agent answers.
    pub agent_us: Option<u64>,
}
