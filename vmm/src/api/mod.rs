//! The control API: HTTP over a Unix socket, compatible with Firecracker's.
//!
//! [`route`] makes an [`Action`] of a request, the [controller](crate::control) does it, and [`respond`]
//! makes a response of what became of it. None of the three does I/O.

mod action;
mod routes;

pub use action::{Action, Answer};
pub use routes::{RouteError, Routed, fault, respond, route};
