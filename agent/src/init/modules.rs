//! Loading drivers in guests whose kernel has them as modules (a distribution's kernel) and where no udev
//! does it: for each virtio device without a driver, `modprobe` by the name the device gives itself.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::utsname::uname;

const DEVICES: &str = "/sys/bus/virtio/devices";

/// Loads what is missing; says what went wrong. Does nothing, and quickly, where there are no modules for
/// the running kernel, as with Pulau's own.
pub fn load() -> Result<(), String> {
    let Ok(kernel) = uname() else { return Ok(()) };
    if !Path::new("/lib/modules").join(kernel.release()).join("modules.dep").exists() {
        return Ok(());
    }
    let Ok(devices) = fs::read_dir(DEVICES) else { return Ok(()) };
    let wanted: Vec<String> = devices
        .flatten()
        .map(|device| device.path())
        .filter(|device| !device.join("driver").exists())
        .filter_map(|device| fs::read_to_string(device.join("modalias")).ok())
        .map(|alias| alias.trim().to_owned())
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let status = Command::new("modprobe")
        .env("PATH", crate::exec::DEFAULT_PATH)
        .args(["-a", "-b", "-q"])
        .args(&wanted)
        .stdin(Stdio::null())
        .status();
    match status {
        // A device no module is for is not an error of this boot: modprobe then fails for all.
        Ok(_) => Ok(()),
        Err(e) => Err(format!("modprobe {}: {e}", wanted.join(" "))),
    }
}
