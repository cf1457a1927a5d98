#![doc = include_str!("../README.md")]

pub mod boot;
pub mod client;
pub mod frame;
pub mod message;
pub mod network;

pub use boot::BootOptions;
pub use client::{ClientError, Connection};
pub use frame::{Decoder, FrameError, Kind};
pub use message::{ErrorCode, Request};

/// vsock port the agent listens on in the guest.
pub const AGENT_PORT: u32 = 1024;

/// Oldest protocol version this build speaks.
pub const MIN_VERSION: u32 = 1;
/// Newest protocol version this build speaks.
pub const MAX_VERSION: u32 = 1;

/// Bytes of standard input a host may have sent for an exec and not yet seen acknowledged.
pub const STDIN_WINDOW: usize = 256 * 1024;
