//! The Pulau host manager: the parts behind the `pulau` program.

pub mod balancer;
pub mod cli;
pub mod client;
pub mod doctor;
pub mod fault;
pub mod files;
pub mod groups;
pub mod http;
pub mod image;
pub mod instances;
pub mod microvm;
pub mod model;
pub mod network;
pub mod programs;
pub mod records;
pub mod serve;
pub mod store;
pub mod tls;
pub mod volume;

use std::path::PathBuf;

/// Where Pulau keeps its data unless told otherwise: of the system if root runs it, else of the user.
pub fn default_data_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/var/lib/pulau".into();
    }
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = variable("XDG_STATE_HOME").or_else(|| variable("HOME").map(|home| home.join(".local/state")));
    state.unwrap_or_else(|| "/tmp".into()).join("pulau")
}
