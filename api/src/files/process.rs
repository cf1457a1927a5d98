//! Programs run for imports and new file systems: bounded, killed when no longer wanted, and gone with us.

use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use super::{FileError, Task};

/// What is kept of what a program prints.
const OUTPUT_LIMIT: u64 = 1 << 20;
const POLL: Duration = Duration::from_millis(20);

/// A program of the host.
pub struct Tool {
    program: &'static str,
    /// The Debian package that has it, for the message when it is missing.
    package: &'static str,
    command: Command,
    /// The exit status that means success, besides 0.
    also_good: i32,
}

impl Tool {
    pub fn new(program: &'static str, package: &'static str) -> Self {
        let mut command = Command::new(program);
        // What it says is read by programs; where it looks for files is not for the environment to say.
        command.env_clear().env("LC_ALL", "C").env("PATH", SYSTEM_PATH).current_dir("/");
        Tool { program, package, command, also_good: 0 }
    }

    /// Adds to the command line.
    #[must_use]
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Takes a second exit status for success.
    #[must_use]
    pub fn also_good(mut self, status: i32) -> Self {
        self.also_good = status;
        self
    }

    /// Runs it to its end, handing each piece of its standard output to `output`, and returns all of it.
    ///
    /// # Errors
    ///
    /// [`FileError::Tool`]: it is missing, or failed, with what it said. [`FileError::Cancelled`].
    pub fn run(mut self, task: &Task, mut output: impl FnMut(&[u8])) -> Result<Vec<u8>, FileError> {
        task.check()?;
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
        unsafe {
            self.command.pre_exec(|| {
                // The program ends with us, and gets no privileges it was not started with.
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                Ok(nix::sys::prctl::set_no_new_privs()?)
            });
        }
        let mut child = Killed(self.command.spawn().map_err(|e| self.cannot_start(&e))?);
        let stderr = child.0.stderr.take();
        let errors = thread::spawn(move || read_all(stderr, |_| {}));
        let stdout = child.0.stdout.take();
        let (sender, pieces) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || read_all(stdout, |piece| drop(sender.send(piece.to_vec()))));
        let status = loop {
            task.check()?;
            match pieces.recv_timeout(POLL) {
                Ok(piece) => output(&piece),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                // Its output has ended, so it is about to.
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                    thread::sleep(Duration::from_millis(1))
                }
            }
            match child.0.try_wait() {
                Ok(None) => {}
                Ok(Some(status)) => break status,
                Err(e) => return Err(self.failed(e.to_string())),
            }
        };
        let said = errors.join().unwrap_or_default();
        let printed = reader.join().unwrap_or_default();
        pieces.try_iter().for_each(|piece| output(&piece));
        if status.success() || status.code() == Some(self.also_good) {
            return Ok(printed);
        }
        let said = String::from_utf8_lossy(&said);
        if said.contains("No space left on device") {
            return Err(FileError::NoSpace { dir: "/".into(), needed: None, available: 0 });
        }
        let how = match status.signal() {
            Some(signal) => format!("killed by signal {signal}"),
            None => format!("exit status {}", status.code().unwrap_or(-1)),
        };
        let said = said.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        Err(self.failed(format!("{} ({how})", if said.is_empty() { "failed" } else { &said })))
    }

    fn cannot_start(&self, error: &io::Error) -> FileError {
        self.failed(match error.kind() {
            io::ErrorKind::NotFound => {
                format!("not found; install it (on Debian: apt-get install {})", self.package)
            }
            _ => format!("cannot be started: {error}"),
        })
    }

    fn failed(&self, why: String) -> FileError {
        FileError::Tool { program: self.program, why }
    }
}

const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A child that does not outlive the interest in it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_all(from: Option<impl Read>, mut piece: impl FnMut(&[u8])) -> Vec<u8> {
    let mut all = Vec::new();
    let Some(mut from) = from else { return all };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        piece(&buffer[..count]);
        if (all.len() as u64) < OUTPUT_LIMIT {
            all.extend_from_slice(&buffer[..count]);
        }
    }
    all
}
