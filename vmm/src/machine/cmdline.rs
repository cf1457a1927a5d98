//! The kernel command line: what the user gave, the root device, and the devices where ACPI does not
//! announce them.

use crate::arch::acpi::VirtioWindow;
use crate::arch::layout;
use crate::config::VmConfig;
use crate::virtio::mmio;

/// The command line does not fit.
#[derive(Debug, thiserror::Error)]
#[error("boot_args: {len} bytes with what the VMM adds; the longest command line is {max}")]
pub struct CmdlineError {
    len: usize,
    max: usize,
}

/// Whether the user's command line turns ACPI off.
pub fn acpi_is_off(config: &VmConfig) -> bool {
    config.boot_source.as_ref().is_some_and(|b| b.boot_args().split(' ').any(|arg| arg == "acpi=off"))
}

/// Builds the command line; `windows` are the devices to announce on it. What the VMM adds goes before a
/// `--`, behind which the kernel leaves everything to init.
pub fn build(config: &VmConfig, windows: &[VirtioWindow]) -> Result<String, CmdlineError> {
    let args = config.boot_source.as_ref().map_or("", |b| b.boot_args());
    let (kernel_args, init_args) = match args.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (args, None),
    };
    let mut line = kernel_args.trim().to_owned();
    let mut add = |arg: String| {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(&arg);
    };
    if let Some(drive) = config.drives.iter().find(|d| d.is_root_device) {
        match &drive.partuuid {
            Some(partuuid) => add(format!("root=PARTUUID={partuuid}")),
            None => add("root=/dev/vda".to_owned()),
        }
        add(if drive.read_only() { "ro" } else { "rw" }.to_owned());
    } else if let Some((index, pmem)) = config.pmem.iter().enumerate().find(|(_, p)| p.root_device) {
        add(format!("root=/dev/pmem{index}"));
        add(if pmem.read_only { "ro" } else { "rw" }.to_owned());
    }
    for window in windows {
        add(format!("virtio_mmio.device={}K@{:#x}:{}", mmio::WINDOW / 1024, window.address, window.irq));
    }
    if let Some(init) = init_args {
        add(format!("-- {}", init.trim()));
    }
    let max = layout::CMDLINE_MAX - 1;
    if line.len() > max { Err(CmdlineError { len: line.len(), max }) } else { Ok(line) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootSourceConfig, DriveConfig};

    fn config(args: &str) -> VmConfig {
        let boot_source = BootSourceConfig {
            boot_args: Some(args.into()),
            kernel_image_path: "k".into(),
            ..Default::default()
        };
        VmConfig { boot_source: Some(boot_source), ..Default::default() }
    }

    #[test]
    fn root_device_comes_before_what_is_inits() {
        let mut config = config("quiet -- shell");
        config.drives.push(DriveConfig {
            drive_id: "root".into(),
            is_root_device: true,
            is_read_only: Some(true),
            path_on_host: Some("/disk".into()),
            ..Default::default()
        });
        assert_eq!(build(&config, &[]).unwrap(), "quiet root=/dev/vda ro -- shell");
    }

    #[test]
    fn devices_are_announced_and_length_is_checked() {
        let window = VirtioWindow { address: 0xc000_1000, irq: 6 };
        assert_eq!(build(&config(""), &[window]).unwrap(), "virtio_mmio.device=4K@0xc0001000:6");
        assert!(build(&config(&"x".repeat(2040)), &[window]).is_err());
        assert!(acpi_is_off(&config("a acpi=off b")));
        assert!(!acpi_is_off(&config("a acpi=offish")));
    }
}
