//! The first boot of an instance: runs what the root file system has for it, once.
//!
//! Which instance it was last is kept in [`KNOWN`]. A disk that was copied from another instance's has that one's id
//! in it, so this boot is a first one there, too. What fails is tried again at the next boot.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PROGRAM: &str = "/usr/lib/pulau/first-boot";
const KNOWN: &str = "/var/lib/pulau/instance";
/// What the program wrote on standard error. A file and no pipe, so that nobody who holds on to it is waited for.
const SAID: &str = "/run/pulau-first-boot.log";
/// The rest of the boot waits for it.
const WITHIN: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(2);
/// How much of the end of what it said is told.
const TOLD: usize = 400;

/// Runs the program with the instance's id, if this is its first boot and there is such a program. Returns whether
/// it did.
///
/// # Errors
/// A sentence saying how it failed.
pub fn run(instance: &str) -> Result<bool, String> {
    if !Path::new(PROGRAM).exists() || fs::read_to_string(KNOWN).is_ok_and(|known| known == instance) {
        return Ok(false);
    }
    let log = File::create(SAID).map_err(|error| format!("{SAID}: {error}"))?;
    let mut command = Command::new(PROGRAM);
    command.arg(instance).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let status = command.spawn().and_then(|mut child| wait(&mut child));
    match status.map_err(|error| format!("{PROGRAM}: {error}"))? {
        Some(status) if status.success() => {
            remember(instance).map_err(|error| format!("{KNOWN}: {error}"))?;
            Ok(true)
        }
        Some(status) => {
            let said = fs::read(SAID).unwrap_or_default();
            let said = String::from_utf8_lossy(&said[said.len().saturating_sub(TOLD)..]).trim().to_owned();
            Err(format!("{PROGRAM}: {status}: {said}"))
        }
        None => Err(format!("{PROGRAM}: took longer than {} s", WITHIN.as_secs())),
    }
}

/// How it ended; none if it had to be killed.
fn wait(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + WITHIN;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(PAUSE);
    }
}

/// Whole or not at all, so that a power cut in between leaves a first boot to come.
fn remember(instance: &str) -> io::Result<()> {
    let known = Path::new(KNOWN);
    if let Some(dir) = known.parent() {
        fs::create_dir_all(dir)?;
    }
    let new = known.with_extension("new");
    fs::write(&new, instance)?;
    nix::unistd::sync();
    fs::rename(new, known)
}
