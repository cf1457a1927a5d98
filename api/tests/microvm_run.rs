//! `pulau microvm run` where it fails before a guest runs: what it says, and that nothing is left. Runs with
//! guests are whole-system tests (crate `tests`).

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

/// Runs it below a directory of its own, unjailed, with a VMM that is this shell script.
fn run(dir: &Path, vmm: &str, args: &[&str]) -> Output {
    let program = dir.join("vmm");
    fs::write(&program, vmm).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    for image in ["kernel", "rootfs"] {
        fs::write(dir.join(image), image).unwrap();
    }
    Command::new(env!("CARGO_BIN_EXE_pulau"))
        .args(["microvm", "run", "--no-jail", "--name", "t", "--data-dir", "data"])
        .args(args)
        .current_dir(dir)
        .env("PULAU_VMM", program)
        .env_remove("PULAU_KERNEL")
        .env_remove("PULAU_ROOTFS")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn is_empty(data: &Path) -> bool {
    fs::read_dir(data.join("adhoc")).unwrap().all(|entry| entry.unwrap().file_name() == ".lock")
}

const IMAGES: [&str; 4] = ["--kernel", "kernel", "--rootfs", "rootfs"];

#[test]
fn a_missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), "#!/bin/sh\n", &["--kernel", "kernel", "--rootfs", "gone"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("drive gone: No such file"), "{}", stderr(&output));
    assert!(output.stdout.is_empty());
    assert!(is_empty(&dir.path().join("data")));
}

#[test]
fn a_vmm_that_dies_is_reported_with_its_last_words() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), "#!/bin/sh\necho 'no KVM here' >&2\nexit 1\n", &IMAGES);
    assert_eq!(output.status.code(), Some(125));
    let message = stderr(&output);
    assert!(
        message.contains("microVM t: it did not start: the VMM ended as it started (exit code 1)"),
        "{message}"
    );
    assert!(message.contains("last lines of the VMM's log:\n  no KVM here"), "{message}");
    assert!(is_empty(&dir.path().join("data")));
}

#[test]
fn a_missing_vmm_is_said_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_pulau"))
        .args(["microvm", "run", "--no-jail"])
        .args(IMAGES)
        .current_dir(dir.path())
        .env("PULAU_VMM", "/nonexistent/vmm")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("PULAU_VMM names /nonexistent/vmm"), "{}", stderr(&output));
}

#[test]
fn impossible_values_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let with = |args: &[&str]| run(dir.path(), "#!/bin/sh\n", &[&IMAGES, args].concat());
    let output = with(&["--cpus", "33"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("vcpu_count must be between 1 and 32, not 33"), "{}", stderr(&output));
    let output = with(&["--memory", "lots"]);
    assert_eq!(output.status.code(), Some(2), "a malformed option is the command line's fault");
    assert!(stderr(&output).contains("such as 256M"), "{}", stderr(&output));
}

#[test]
fn a_signal_stops_a_start_that_hangs() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vmm"), "#!/bin/sh\n: > \"${0%/*}/started\"\nexec sleep 60\n").unwrap();
    fs::set_permissions(dir.path().join("vmm"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(dir.path().join("image"), "").unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_pulau"))
        .args(["microvm", "run", "--no-jail", "--name", "t", "--data-dir", "data"])
        .args(["--kernel", "image", "--rootfs", "image"])
        .current_dir(dir.path())
        .env("PULAU_VMM", dir.path().join("vmm"))
        .spawn()
        .unwrap();
    let started = dir.path().join("started");
    for _ in 0..12_000 {
        if started.exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(started.exists(), "the VMM was not started within a minute");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(128 + 15));
    assert!(is_empty(&dir.path().join("data")));
}
