//! The host's side of the guests' network: taps, routes, packet filter, DHCP and DNS.
//!
//! It is told what should be, and makes the host so; it keeps no records, and what it did is all on the host,
//! where [`Fabric::reconcile`] finds it again after a crash. It touches links whose names begin with its prefix,
//! routes of protocol 112 with its metric, nftables' tables of its name, and settings under `/proc/sys/net`. It
//! never enters a guest or a VMM, and knows nothing of instances.
//!
//! The network is routed, as a VPC is, not bridged:
//!
//! ```text
//!   guest 10.0.0.4 ── tap pl-a ─┐                  ┌─ tap pl-b ── guest 10.0.0.5
//!                               │   host routes    │
//!            10.0.0.4/32 dev pl-a                 10.0.0.5/32 dev pl-b
//!                               └──── nftables ────┘
//!                     plgw 10.0.0.1 (DHCP, DNS)   uplink (masquerade, published ports)
//! ```
//!
//! Each guest has a link of its own on which the host answers ARP for everybody (proxy ARP), so it takes itself
//! to be in an ordinary subnet, while every packet is routed and filtered. There is no broadcast between guests.
//! The gateways' addresses are on a link of their own, a tap that nobody attaches to. Addresses of a subnet that
//! are nobody's lead nowhere.
//!
//! See `docs/network.md` for what guests can and cannot do, and how to look into it.

pub mod addresses;
mod conntrack;
mod definition;
mod dhcp;
mod directory;
mod dns;
mod fabric;
mod host;
mod netlink;
mod nft;
mod route;
mod sysctl;
mod tap;

pub use definition::{
    Attachment, DefinitionError, GroupDef, MAX_GROUPS, NetworkDef, Peer, Plan, Ports, Published, Rule,
    Traffic, Transport, is_label,
};
pub use fabric::Fabric;
pub use host::{Config, NetworkError};
pub use nft::NftError;
pub use route::Counters;
