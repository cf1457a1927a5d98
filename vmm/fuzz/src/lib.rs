//! What the fuzz targets share: a guest without CPUs that does to a virtio device whatever a string of bytes
//! says, well-formed or not.
//!
//! The bytes are a list of actions, each an opcode and its operands (little endian; see [`Guest::run`]). When
//! the bytes run out, so do the actions. Numbers are taken as they come; only addresses are folded so
//! that most of them meet memory, and counts so that a run stays short.
//!
//! A target makes a device and lets a [`Guest`] drive it. What must hold however bad the guest was:
//!
//! * nothing panics, overflows, or touches what it must not: the build checks that;
//! * the device writes nowhere but into used rings and buffers it was given to write to ([`watch`]);
//! * after a reset it works as on the first day: each target says what that means.

pub mod devices;
mod guest;
mod host;
mod input;
mod transport;
mod watch;

pub use guest::{Buffer, Guest, HIGH, HIGH_LEN, LOW, new_memory};
pub use host::Host;
pub use input::Input;
pub use transport::Behind;
