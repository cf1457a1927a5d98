//! What the host manager keeps and shows: plain data, as it is stored and as the API gives it.
//!
//! Names, states and their meanings are EC2's where EC2 has the thing. Types here know how to check
//! themselves and nothing else: no store, no host, no HTTP. Within one major version of the API fields may
//! be added, never renamed or given another meaning; a field added gets a default, since older records
//! lack it.

mod api_token;
mod cordon;
mod group;
pub mod id;
mod image;
mod instance;
mod instance_type;
mod key_pair;
mod load_balancer;
mod name;
mod network;
mod patch;
mod published_port;
mod security_group;
mod snapshot;
mod volume;

pub use api_token::ApiToken;
pub use cordon::Cordon;
pub use group::{
    Activity, Deletion, Group, GroupState, HealthCheckType, Member, MemberState, Roll, RollStatus, Schedule,
    TargetTracking,
};
pub use image::{Image, ImageSource, ImageState};
pub use instance::{
    BootReport, Check, Desired, Instance, InstanceState, Interface, ShutdownBehavior, StateReason,
    StatusChecks, reason, yes,
};
pub use instance_type::{INSTANCE_TYPES, InstanceType, Size};
pub use key_pair::KeyPair;
pub use load_balancer::{
    Algorithm, BalancerProtocol, HealthCheck, LoadBalancer, LoadBalancerState, Target, TargetState,
};
pub use name::{NameError, check_name, check_tags};
pub use network::Network;
pub use patch::{InstancePatch, PackageChange, Patch, PatchState};
pub use published_port::{PublishedPort, Transport};
pub use security_group::{Peer, Protocol, Rule, SecurityGroup};
pub use snapshot::{Snapshot, SnapshotState};
pub use volume::{Volume, VolumeAttachment, VolumeState};

/// The kinds of things there are, as error messages and events call them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Group,
    Image,
    Instance,
    InstanceType,
    KeyPair,
    LoadBalancer,
    Network,
    Patch,
    PublishedPort,
    SecurityGroup,
    Snapshot,
    Token,
    Volume,
}

impl Kind {
    /// In the middle of a sentence.
    pub fn noun(self) -> &'static str {
        match self {
            Kind::Group => "group",
            Kind::Image => "image",
            Kind::Instance => "instance",
            Kind::InstanceType => "instance type",
            Kind::KeyPair => "key pair",
            Kind::LoadBalancer => "load balancer",
            Kind::Network => "network",
            Kind::Patch => "patch",
            Kind::PublishedPort => "published port",
            Kind::SecurityGroup => "security group",
            Kind::Snapshot => "snapshot",
            Kind::Token => "token",
            Kind::Volume => "volume",
        }
    }

    /// The command that lists them.
    pub fn list_command(self) -> &'static str {
        match self {
            Kind::Group => "pulau group list",
            Kind::Image => "pulau image list",
            Kind::Instance => "pulau instance list",
            Kind::InstanceType => "pulau instance types",
            Kind::KeyPair => "pulau key-pair list",
            Kind::LoadBalancer => "pulau load-balancer list",
            Kind::Network => "pulau network list",
            Kind::Patch => "pulau instance patches",
            Kind::PublishedPort => "pulau instance show",
            Kind::SecurityGroup => "pulau security-group list",
            Kind::Snapshot => "pulau snapshot list",
            Kind::Token => "pulau token list",
            Kind::Volume => "pulau volume list",
        }
    }
}
