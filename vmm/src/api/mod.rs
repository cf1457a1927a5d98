//! The control API: HTTP over a Unix socket, compatible with Firecracker's.

mod action;

pub use action::{Action, Answer};
