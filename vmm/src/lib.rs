//! The Pulau virtual machine monitor: a library of its parts; `main.rs` is the program.

pub mod api;
pub mod arch;
pub mod bus;
pub mod cli;
pub mod config;
pub mod control;
pub mod devices;
pub mod event_loop;
pub mod exit;
pub mod http;
pub mod jail;
pub mod loader;
pub mod logger;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod program;
pub mod rate_limiter;
pub mod seccomp;
pub mod signals;
pub mod snapshot;
pub mod stop;
pub mod vcpu;
pub mod virtio;
pub mod vm;
