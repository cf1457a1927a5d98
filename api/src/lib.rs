//! The Pulau host manager: the parts behind the `pulau` program.

pub mod cli;
pub mod doctor;
pub mod microvm;
pub mod programs;

/// Where Pulau keeps its data unless told otherwise.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/pulau";
