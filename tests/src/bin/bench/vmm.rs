//! A VMM process under measurement, ours or another that speaks the same API.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pulau_agent_protocol::client::{Connection, connect};
use pulau_agent_protocol::message::{ExecRequest, ExitStatus};
use pulau_tests::{api, artifact};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// Pause between two looks at whether the API is there: the resolution of that figure.
const LOOK: Duration = Duration::from_micros(100);
/// Pause between two looks at what is measured by somebody else: long, so that looking takes no time from it.
const GLANCE: Duration = Duration::from_millis(20);

/// The command line all guests of the benchmarks boot with: nothing printed, nothing probed for.
pub const BOOT_ARGS: &str = "reboot=k panic=1 quiet loglevel=0 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                             i8042.dumbkbd swiotlb=noforce pulau.overlay=tmpfs pulau.boot_timer";

/// A program to measure.
#[derive(Clone)]
pub struct Contender {
    /// Name in the report.
    pub name: String,
    program: PathBuf,
}

/// Ours, and the other one if there is one.
pub fn contenders() -> Result<Vec<Contender>> {
    let ours = pulau_tests::program("pulau-vmm");
    let other = std::env::var_os("PULAU_BENCH_OTHER").map(PathBuf::from);
    [Some(ours), other]
        .into_iter()
        .flatten()
        .map(|program| {
            let name = program.file_name().context("not a program")?.to_string_lossy().into_owned();
            if !program.exists() {
                bail!("{} does not exist", program.display());
            }
            Ok(Contender { name, program })
        })
        .collect()
}

/// Whether time is counted in instructions. Then a little work tells as much as a lot, and a second takes
/// minutes.
pub fn counted() -> bool {
    std::env::var_os("PULAU_TEST_HOST_COUNTED").is_some_and(|value| !value.is_empty() && value != "0")
}

/// Their names.
pub fn names(contenders: &[Contender]) -> Vec<String> {
    contenders.iter().map(|c| c.name.clone()).collect()
}

/// A running one.
pub struct Vmm {
    child: Child,
    dir: TempDir,
    /// From before the process was started to its first answer.
    pub start_to_api: Duration,
}

impl Vmm {
    /// Starts the program and waits for its API.
    pub fn start(contender: &Contender) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (socket, log) = (dir.path().join("api.sock"), dir.path().join("log"));
        File::create(&log)?;
        let mut command = Command::new(&contender.program);
        command.arg("--api-sock").arg(&socket).arg("--boot-timer");
        command.arg("--log-path").arg(&log).args(["--level", "Info", "--id", "bench"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let start = Instant::now();
        let child = command.spawn()?;
        let mut vmm = Self { child, dir, start_to_api: Duration::ZERO };
        vmm.until("the API", LOOK, || {
            api::request(&socket, "GET", "/", "").ok().filter(|r| r.status == 200)
        })?;
        vmm.start_to_api = start.elapsed();
        Ok(vmm)
    }

    fn until<T>(&self, what: &str, pause: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = condition() {
                return Ok(value);
            }
            if Instant::now() > deadline {
                bail!("gave up waiting for {what}; log: {}", self.log());
            }
            std::thread::sleep(pause);
        }
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `PUT path`, which must succeed.
    pub fn put(&self, path: &str, body: Value) -> Result<()> {
        let response = api::request(&self.path("api.sock"), "PUT", path, &body.to_string())?;
        if !(200..300).contains(&response.status) {
            bail!("PUT {path}: {response:?}");
        }
        Ok(())
    }

    /// Configures a guest that boots from the root file system `root`.
    pub fn configure(&self, vcpus: u32, memory_mib: u32, root: &Path) -> Result<()> {
        self.put("/machine-config", json!({"vcpu_count": vcpus, "mem_size_mib": memory_mib}))?;
        let kernel = artifact("PULAU_TEST_KERNEL");
        self.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": BOOT_ARGS}))?;
        self.drive("root", root, true, "Sync")?;
        self.put("/vsock", json!({"guest_cid": 3, "uds_path": self.path("vsock")}))
    }

    /// Adds a drive.
    pub fn drive(&self, id: &str, path: &Path, root: bool, engine: &str) -> Result<()> {
        let drive = json!({
            "drive_id": id, "path_on_host": path, "is_root_device": root, "is_read_only": root,
            "io_engine": engine,
        });
        self.put(&format!("/drives/{id}"), drive)
    }

    /// `InstanceStart`; returns how long the request took.
    pub fn boot(&self) -> Result<Duration> {
        let start = Instant::now();
        self.put("/actions", json!({"action_type": "InstanceStart"}))?;
        Ok(start.elapsed())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Waits for the boot timer and returns what it says.
    pub fn guest_init(&self) -> Result<Duration> {
        let line = self.until("the boot timer", GLANCE, || {
            self.log().lines().find_map(|l| Some(l.split_once("Guest-boot-time")?.1.to_owned()))
        })?;
        let micros = line.trim_start_matches([' ', '=']).split_whitespace().next().context("boot time")?;
        Ok(Duration::from_micros(micros.parse().with_context(|| line.clone())?))
    }

    /// A connection to the guest's agent.
    pub fn agent(&self) -> Result<Connection<UnixStream>> {
        Ok(connect(&self.path("vsock"), Instant::now() + PATIENCE)?)
    }

    /// Runs a shell command in the guest and returns its output.
    pub fn sh(&self, command: &str) -> Result<String> {
        let request =
            ExecRequest { argv: vec!["/bin/sh".into(), "-c".into(), command.into()], ..Default::default() };
        let output = self.agent()?.output(&request, b"")?;
        if output.status != ExitStatus::Code(0) {
            bail!(
                "{command:?} in the guest: {:?}, {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::io::stdout().flush();
    }
}
