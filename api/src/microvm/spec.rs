//! What a microVM is to be, and what this host runs it with.

use std::path::PathBuf;

use pulau_vmm::config::{
    ConfigError, EntropyConfig, SerialConfig, TokenBucketConfig, VmConfig, VsockConfig, check_instance_id,
};

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

/// What a guest may write to its console at once, and each second after that: enough for a chatty boot, too
/// little to fill a disk unnoticed.
const CONSOLE_BYTES: u64 = 1 << 20;

/// The host side of vsock is a socket of a microVM's own, so every guest can have the same number.
const GUEST_CID: u32 = 3;

/// Gives a microVM what all of Pulau's have: a way to the agent, random numbers, and a console that cannot
/// fill the host's disk.
///
/// # Errors
///
/// None, for a configuration that has no vsock device yet.
pub fn furnish(vm: &mut VmConfig) -> Result<(), ConfigError> {
    // The driver chooses the path; it only must not be empty.
    vm.set_vsock(VsockConfig { vsock_id: None, guest_cid: GUEST_CID, uds_path: "vsock.sock".into() })?;
    vm.set_entropy(EntropyConfig::default());
    let limit = TokenBucketConfig { size: CONSOLE_BYTES, one_time_burst: None, refill_time: 1000 };
    vm.set_serial(SerialConfig { rate_limiter: Some(limit), ..Default::default() });
    Ok(())
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
