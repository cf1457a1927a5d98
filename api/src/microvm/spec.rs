//! What a microVM is to be, and what this host runs it with.

use std::path::PathBuf;

use pulau_vmm::config::{ConfigError, VmConfig, check_instance_id};

use super::console::ConsoleLog;
use super::jail::JailSpec;

/// What is the same for every microVM of this host.
#[derive(Clone, Debug)]
pub struct Host {
    /// The `pulau-vmm` program.
    pub vmm: PathBuf,
    /// Where the microVMs' homes are. Whoever calls [`super::sweep`] on it must be the only one to make them.
    pub run_dir: PathBuf,
    /// Control group below which each microVM gets one; its parent must exist.
    pub cgroup_parent: PathBuf,
}

/// One microVM. Paths in it are the host's; the driver puts files into the jail and rewrites them.
#[derive(Clone, Debug, Default)]
pub struct Spec {
    /// 1 to 64 letters, digits and hyphens; unique among the microVMs of one `run_dir`.
    pub id: String,
    /// What to boot, with which devices. If it has a vsock device, the driver chooses its `uds_path`.
    pub vm: VmConfig,
    /// How it is jailed; None runs the VMM as the caller, for development.
    pub jail: Option<JailSpec>,
    /// Whether the VMM logs when the guest's init writes to the boot timer.
    pub boot_timer: bool,
    /// What becomes of the guest's serial console.
    pub console: Console,
    /// What the metadata service tells from the first moment on, if the microVM has one.
    pub metadata: Option<serde_json::Value>,
}

/// What becomes of a guest's serial console. How fast it may write is the VMM's `serial` rate limiter's.
#[derive(Clone, Debug, Default)]
pub struct Console {
    /// A file outside to which it is appended; None keeps it as long as the microVM.
    pub log: Option<ConsoleLog>,
    /// Whether one client at a time may attach to it, see [`super::MicroVm::attach_console`].
    pub attachable: bool,
}

/// Something in a [`Spec`] cannot be meant.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{what} {}: {problem}", path.display())]
    File { what: &'static str, path: PathBuf, problem: String },
}

impl Spec {
    /// Checks what can be checked without touching the host.
    ///
    /// # Errors
    ///
    /// The name is malformed, or there is nothing to boot.
    pub fn check(&self) -> Result<(), SpecError> {
        check_instance_id(&self.id)?;
        self.vm.check_bootable()?;
        Ok(())
    }
}
