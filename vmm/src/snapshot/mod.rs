//! Snapshots: a machine as files, and a machine from files.
//!
//! A snapshot is two files. The *memory file* is guest memory and nothing else, region after region, sparse
//! where it is zero: it is mapped as it is, privately, so that a restore reads nothing at first, and machines
//! restored from one file share its pages in the host's page cache. The *state file* has everything else: the
//! configuration, vCPUs, interrupt controllers, clock, devices ([`state`]), behind a header ([`file`]).
//!
//! ```text
//!              save                              restore
//!  Running ─▶ Paused ─▶ files      files ─▶ (Machine::restore) ─▶ Paused ─▶ Running
//! ```
//!
//! What does not survive: connections of the vsock device, which end as the driver is told to reset them; frames
//! and metadata connections under way, as on a wire; tokens and contents of the metadata service; the fill of
//! rate limiters' buckets; what was typed on a console and not taken.
//!
//! A restored guest is another machine than the one the snapshot was made of, and there may be many of it: it is
//! told so by a new VM generation identifier, on which its kernel gives its random number generator a new seed.

pub mod file;
pub mod memory;
pub mod state;

pub use file::FileError;
pub use state::State;
