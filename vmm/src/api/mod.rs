//! The control API: HTTP over a Unix socket, compatible with Firecracker's.
//!
//! [`ApiServer`] takes bytes from clients and makes requests of them; [`route`] makes an [`Action`] of a
//! request; the [controller](crate::control) does it; [`respond`] makes a response of what became of it.
//! Only the first does I/O, and it never waits.

mod action;
mod connection;
mod routes;
mod serve;
mod server;

pub use action::{Action, Answer};
pub use connection::Handler;
pub use routes::{RouteError, Routed, fault, respond, route};
pub use serve::serve;
pub use server::{ApiServer, ApiSocket, MAX_CONNECTIONS, ServerError};
