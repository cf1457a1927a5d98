//! Kernel, initrd and command line (`/boot-source`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// What the microVM boots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSourceConfig {
    /// Kernel image on the host: ELF (`vmlinux`) or bzImage.
    pub kernel_image_path: PathBuf,
    /// Initial RAM disk on the host.
    pub initrd_path: Option<PathBuf>,
    /// Kernel command line. [`Self::DEFAULT_BOOT_ARGS`] when absent.
    pub boot_args: Option<String>,
}

impl BootSourceConfig {
    /// The longest command line a client may give, in bytes. The kernel takes 2047 and the VMM
    /// adds its own arguments (root device, virtio devices), which are checked when it boots.
    pub const MAX_BOOT_ARGS: usize = 2047;

    /// The command line of a microVM whose client gave none (Firecracker's default): reboot by the
    /// keyboard controller, end on panic, no modules, no probing for devices that are not there.
    pub const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux \
                                         i8042.nomux i8042.dumbkbd swiotlb=noforce";

    /// The command line, the default one where none was given.
    pub fn boot_args(&self) -> &str {
        self.boot_args.as_deref().unwrap_or(Self::DEFAULT_BOOT_ARGS)
    }

    /// Checks everything that can be checked without opening a file.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.kernel_image_path.as_os_str().is_empty() {
            let field = "kernel_image_path";
            return Err(ConfigError::BootSourceEmptyPath { field });
        }
        if self.initrd_path.as_ref().is_some_and(|p| p.as_os_str().is_empty()) {
            let field = "initrd_path";
            return Err(ConfigError::BootSourceEmptyPath { field });
        }
        let args = self.boot_args();
        if args.len() > Self::MAX_BOOT_ARGS {
            return Err(ConfigError::BootArgsTooLong { len: args.len() });
        }
        if !args.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
            return Err(ConfigError::BootArgsNotPrintable);
        }
        Ok(())
    }
}
