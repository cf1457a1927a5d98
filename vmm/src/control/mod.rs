//! The controller: does what the control API asks, where the microVM's state allows it.

mod machine;

pub use machine::{Machine, MachineBuilder, MachineError, StartError};
