//! A running `pulau-vmm` in a directory of its own.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::api::{self, Response};
use crate::{PATIENCE, artifact, program, wait_for};

/// Command line with which the guests of the tests boot.
pub const BOOT_ARGS: &str = "console=ttyS0 reboot=k panic=1 quiet loglevel=4";

/// A VMM process, killed when dropped. Its log and console are shown if the test panics.
pub struct Vmm {
    child: Child,
    dir: TempDir,
}

impl Vmm {
    /// Starts a VMM that listens for requests, and waits until it does.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same, with more arguments.
    pub fn start_with(arguments: &[&str]) -> Self {
        let vmm = Self::launch(|dir| {
            let socket = dir.join("api.sock");
            [&["--api-sock", &socket.to_string_lossy(), "--id", "test"], arguments]
                .concat()
                .iter()
                .map(|s| s.to_string())
                .collect()
        });
        wait_for("the control API", PATIENCE, || vmm.try_request("GET", "/", "").ok());
        vmm
    }

    /// Starts a VMM with the arguments that `arguments` makes for its directory, and does not wait.
    pub fn launch(arguments: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let output = |name| Stdio::from(File::create(dir.path().join(name)).expect("log file"));
        let child = Command::new(program("pulau-vmm"))
            .args(arguments(dir.path()))
            .stdin(Stdio::null())
            .stdout(output("console.log"))
            .stderr(output("vmm.log"))
            .spawn()
            .expect("pulau-vmm starts");
        Self { child, dir }
    }

    /// The VMM's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the VMM's directory, as text.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a request that may fail to arrive.
    pub fn try_request(&self, method: &str, path: &str, body: &str) -> std::io::Result<Response> {
        api::request(&self.path("api.sock"), method, path, body)
    }

    /// `GET path`.
    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        self.try_request("GET", path, "").expect("an answer")
    }

    /// `PUT path` with a JSON body.
    #[track_caller]
    pub fn put(&self, path: &str, body: Value) -> Response {
        self.try_request("PUT", path, &body.to_string()).expect("an answer")
    }

    /// `PATCH path` with a JSON body.
    #[track_caller]
    pub fn patch(&self, path: &str, body: Value) -> Response {
        self.try_request("PATCH", path, &body.to_string()).expect("an answer")
    }

    /// Configures a guest with our kernel and the minimal root file system, `more` on its command line,
    /// and a vsock device to reach its agent.
    #[track_caller]
    pub fn configure(&self, vcpus: u32, memory_mib: u32, more: &str) {
        self.put("/machine-config", json!({"vcpu_count": vcpus, "mem_size_mib": memory_mib})).ok();
        let args = format!("{BOOT_ARGS} pulau.overlay=tmpfs {more}");
        self.put(
            "/boot-source",
            json!({"kernel_image_path": artifact("PULAU_TEST_KERNEL"), "boot_args": args}),
        )
        .ok();
        let root = artifact("PULAU_TEST_ROOTFS_MINIMAL");
        self.put("/drives/root", drive("root", &root, true, true)).ok();
        self.put("/vsock", json!({"guest_cid": 3, "uds_path": self.path("vsock")})).ok();
    }

    /// `InstanceStart`.
    #[track_caller]
    pub fn boot(&self) {
        self.put("/actions", json!({"action_type": "InstanceStart"})).ok();
    }

    /// Starts, configures and boots a guest with one vCPU and 128 MiB.
    pub fn booted() -> Self {
        let vmm = Self::start();
        vmm.configure(1, 128, "");
        vmm.boot();
        vmm
    }

    /// What the guest wrote to its console so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("console.log")).unwrap_or_default()).into_owned()
    }

    /// What the VMM logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("vmm.log")).unwrap_or_default()).into_owned()
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait for pulau-vmm").is_none()
    }

    /// Waits for the process to end by itself.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        self.wait_at_most(PATIENCE)
    }

    /// The same, at most `patience`.
    #[track_caller]
    pub fn wait_at_most(&mut self, patience: Duration) -> ExitStatus {
        wait_for("pulau-vmm to end", patience, || self.child.try_wait().expect("wait for pulau-vmm"))
    }

    /// Waits for the end and asserts the exit code.
    #[track_caller]
    pub fn exits_with(&mut self, code: i32) {
        let status = self.wait();
        assert_eq!(status.code(), Some(code), "signal {:?}; log: {}", status.signal(), self.log());
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("signal pulau-vmm");
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        // Looked at while it is there: what a guest that hangs hangs in, is gone afterwards.
        let doing = if failed { crate::process::describe(self.pid()) } else { String::new() };
        let _ = self.child.kill();
        let status = self.child.wait();
        if failed {
            eprintln!(
                "pulau-vmm ended with {status:?}; before that:\n{doing}--- log\n{}\n--- console\n{}",
                self.log(),
                self.console()
            );
        }
    }
}

/// A drive's configuration.
pub fn drive(id: &str, path: &Path, root: bool, read_only: bool) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": root, "is_read_only": read_only})
}

/// A kernel that ends its VM at once: an ELF file whose only segment, at 1 MiB, is `ud2`, with an empty
/// interrupt table to handle it by.
pub fn triple_fault_kernel() -> Vec<u8> {
    let code = [0x0f, 0x0b, 0xf4];
    let mut bytes = vec![0; 4096];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    (bytes[16], bytes[18], bytes[32], bytes[54], bytes[56]) = (2, 62, 64, 56, 1);
    let entry = 0x10_0000u64.to_le_bytes();
    bytes[24..32].copy_from_slice(&entry);
    bytes[64] = 1;
    bytes[72..80].copy_from_slice(&4096u64.to_le_bytes());
    bytes[88..96].copy_from_slice(&entry);
    bytes[96..104].copy_from_slice(&(code.len() as u64).to_le_bytes());
    bytes[104..112].copy_from_slice(&4096u64.to_le_bytes());
    bytes.extend_from_slice(&code);
    bytes
}
