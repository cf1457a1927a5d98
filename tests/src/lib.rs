//! The frame of the whole-system tests: starts a real `pulau-vmm`, speaks its control API, reaches the
//! guest's agent, and looks at what the host has left afterwards.
//!
//! The tests find what they need by environment, set by `scripts/test`: the binaries in `PULAU_BIN_DIR`,
//! the images in `PULAU_TEST_*`. They need a KVM that can boot a kernel. Everything waits with a bound:
//! [`PATIENCE`] is generous because the machine may itself be emulated.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub mod api;
pub mod child;
pub mod container;
pub mod daemon;
pub mod footprint;
pub mod guest;
pub mod intruder;
pub mod network;
pub mod power_loss;
pub mod process;
pub mod stand_in;
pub mod vmm;

/// How long anything in a guest may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// An artifact named by environment variable `name`.
pub fn artifact(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(path) => path.into(),
        None => panic!("{name} is not set: run the whole-system tests by scripts/test"),
    }
}

/// A built program of this project.
pub fn program(name: &str) -> PathBuf {
    artifact("PULAU_BIN_DIR").join(name)
}

/// The SHA-256 of a file's content, by `sha256sum`, as a guest says it.
#[track_caller]
pub fn sha256(path: &Path) -> String {
    let output = std::process::Command::new("sha256sum").arg(path).output().expect("sha256sum runs");
    let text = String::from_utf8(output.stdout).expect("text");
    text.split_whitespace().next().expect("a digest").to_owned()
}

/// Waits until `condition` gives something, at most `patience`.
#[track_caller]
pub fn wait_for<T>(what: &str, patience: Duration, condition: impl FnMut() -> Option<T>) -> T {
    give_up_on(patience, condition).unwrap_or_else(|| panic!("gave up waiting for {what} after {patience:?}"))
}

/// What `condition` gives, if it gives anything within `patience`.
fn give_up_on<T>(patience: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = std::time::Instant::now() + patience;
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if std::time::Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes a connection, if one comes in time; whoever is at its other end has to keep it moving.
#[track_caller]
pub fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).expect("a listener");
    let (stream, _) = wait_for("a connection", PATIENCE, || listener.accept().ok());
    stream.set_nonblocking(false).expect("a connection");
    bound(&stream);
    stream
}

/// Lets no read or write on this connection wait for ever.
pub fn bound(stream: &TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).expect("a connection");
    stream.set_write_timeout(Some(PATIENCE)).expect("a connection");
}
