//! An early look at the files a configuration names, so that the request that names a wrong one is the one
//! that fails. Opening, locking and measuring them is the machine's, when it starts. The one file that is
//! read here is a CPU configuration.

use std::fs::Metadata;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::ControlError;
use crate::config::{BootSourceConfig, CpuConfig, DriveConfig, PmemConfig};

/// Looks at kernel and initrd.
pub(super) fn check_boot_source(config: &BootSourceConfig) -> Result<(), ControlError> {
    check("boot-source", "kernel_image_path", &config.kernel_image_path, Metadata::is_file)?;
    match &config.initrd_path {
        Some(path) => check("boot-source", "initrd_path", path, Metadata::is_file),
        None => Ok(()),
    }
}

/// Looks at the file behind a drive.
pub(super) fn check_drive(config: &DriveConfig) -> Result<(), ControlError> {
    config.path_on_host.as_deref().map_or(Ok(()), check_drive_path)
}

/// Looks at the file that is to be behind a drive.
pub(super) fn check_drive_path(path: &Path) -> Result<(), ControlError> {
    check("drives", "path_on_host", path, |m| m.is_file() || m.file_type().is_block_device())
}

/// Looks at the file behind a pmem device.
pub(super) fn check_pmem(config: &PmemConfig) -> Result<(), ControlError> {
    check("pmem", "path_on_host", &config.path_on_host, Metadata::is_file)
}

/// Reads the CPU configuration a configuration file names.
pub(super) fn read_cpu_config(path: &Path) -> Result<CpuConfig, ControlError> {
    let read =
        || -> Result<_, Box<dyn std::error::Error>> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    read().map_err(|error| ControlError::CpuFile { path: path.to_owned(), problem: error.to_string() })
}

fn check(
    section: &'static str,
    field: &'static str,
    path: &Path,
    is_right: impl Fn(&Metadata) -> bool,
) -> Result<(), ControlError> {
    let problem = match std::fs::metadata(path) {
        Ok(metadata) if is_right(&metadata) => return Ok(()),
        Ok(_) => "this is not a file of the right kind".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(ControlError::File { section, field, path: path.to_owned(), problem })
}
