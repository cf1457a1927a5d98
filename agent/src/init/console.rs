//! `pulau.console=shell`: a shell on the console, as root, without a login.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::SigSet;
use nix::unistd::Pid;

use super::supervise::restore_signals;

/// Starts the shell.
///
/// # Errors
/// There is no console or no `/bin/sh`.
pub fn start(signals: &SigSet) -> io::Result<Pid> {
    let console = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(device())?;
    let signals = *signals;
    let home = if Path::new("/root").is_dir() { "/root" } else { "/" };
    let mut command = Command::new("/bin/sh");
    command
        // The leading hyphen makes it read the profile, as a login would.
        .arg0("-sh")
        .env_clear()
        .envs([("PATH", crate::exec::DEFAULT_PATH), ("HOME", home), ("TERM", "linux"), ("USER", "root")])
        .current_dir(home)
        .stdin(Stdio::from(console.try_clone()?))
        .stdout(Stdio::from(console.try_clone()?))
        .stderr(Stdio::from(console));
    // SAFETY: system calls only.
    unsafe {
        command.pre_exec(move || {
            restore_signals(&signals);
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    Ok(Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?))
}

/// The terminal behind `/dev/console`: the last the kernel lists. Job control works on it and not on
/// `/dev/console` itself.
fn device() -> String {
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    match active.split_ascii_whitespace().last() {
        Some(name) => format!("/dev/{name}"),
        None => "/dev/console".to_owned(),
    }
}
