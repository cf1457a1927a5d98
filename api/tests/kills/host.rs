//! A host for daemons that are killed: a data directory and a network namespace that outlive them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pulau::client::{Client, Endpoint, Refused};
use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything in here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Host {
    dir: TempDir,
    /// A process that does nothing but keep the network namespace.
    namespace: Child,
}

impl Host {
    pub fn new() -> Self {
        // In memory, where there is such a place: nothing here is about disks that lose what was not synced.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let host = Host { dir, namespace: namespace() };
        std::fs::create_dir(host.path("files")).unwrap();
        let mut kernel = vec![0; 0x300];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(host.path("files/kernel"), kernel).unwrap();
        let root = host.path("files/root");
        File::create(&root).unwrap().set_len(4 << 20).unwrap();
        let made = Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&root).status().expect("e2fsprogs");
        assert!(made.success());
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The host is switched off and on: what was in its memory is gone.
    pub fn lose(&mut self) {
        let _ = self.namespace.kill();
        let _ = self.namespace.wait();
        self.namespace = namespace();
        let _ = std::fs::remove_dir_all(self.path("data/simulated"));
    }

    /// A command in the host's network.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let namespace = self.namespace.id().to_string();
        command.args(["--preserve-credentials", "-U", "-n", "-t", &namespace, program]);
        command
    }

    /// What a command in the host's network prints.
    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts a daemon, which may die at once.
    pub fn serve(&self, fault: Option<(&str, u32)>) -> Daemon {
        let socket = self.path("api.sock");
        let log = File::create(self.path("log")).unwrap();
        let mut command = self.command(env!("CARGO_BIN_EXE_pulau"));
        command.args(["serve", "--simulate", "--simulate-network", "--vcpus", "64", "--memory", "64G"]);
        command.args(["--stop-timeout", "5", "--forget-after", "0", "--data-dir"]);
        command.arg(self.path("data")).arg("--socket").arg(&socket);
        if let Some((point, passage)) = fault {
            command.env("PULAU_FAULT", format!("{point}:{passage}"));
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = Client(Endpoint::Socket(socket));
        let mut daemon = Daemon { child, runtime, client, log: self.path("log"), faulty: fault.is_some() };
        let begun = Instant::now();
        while !daemon.is_dead() {
            match daemon.call("GET", "/v1/host", None) {
                Ok(_) => break,
                Err(_) => assert!(begun.elapsed() < PATIENCE, "it does not answer:\n{}", daemon.log()),
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        daemon
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.namespace.kill();
        let _ = self.namespace.wait();
    }
}

fn namespace() -> Child {
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--net", "sh", "-c", "ip link set lo up; echo; exec sleep 100000"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("util-linux");
    let mut line = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).expect("a namespace of our own");
    child
}

pub struct Daemon {
    child: Child,
    runtime: tokio::runtime::Runtime,
    client: Client,
    log: PathBuf,
    faulty: bool,
}

/// What came of a request.
pub enum Failure {
    Refused(Refused),
    /// There was no answer: it may have been done.
    Lost,
}

impl Daemon {
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let call = async {
            match (method, body) {
                ("GET", _) => self.client.get(path).await,
                ("DELETE", _) => self.client.delete(path).await,
                ("PATCH", body) => self.client.patch(path, body.unwrap_or(&Value::Null)).await,
                (_, body) => self.client.post(path, body.unwrap_or(&Value::Null)).await,
            }
        };
        let answered = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, call).await });
        match answered.expect("an answer, or a dead daemon") {
            Ok(answer) => Ok(answer),
            Err(error) => Err(error.downcast().map_or(Failure::Lost, Failure::Refused)),
        }
    }

    /// Whether it has died. One that was not to die must not.
    pub fn is_dead(&mut self) -> bool {
        let status = self.child.try_wait().unwrap();
        assert!(status.is_none() || self.faulty, "it ended: {status:?}\n{}", self.log());
        if let Some(status) = status {
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(status.signal(), Some(libc::SIGKILL), "it ended:\n{}", self.log());
        }
        status.is_some()
    }

    /// Waits until one is dead that has broken off: its connections are closed before it is.
    pub fn wait_dead(&mut self) {
        let begun = Instant::now();
        while !self.is_dead() {
            assert!(begun.elapsed() < PATIENCE, "it broke off and lives:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills it. Returns whether it was dead already.
    pub fn kill(&mut self) -> bool {
        let dead = self.is_dead();
        let _ = self.child.kill();
        let _ = self.child.wait();
        dead
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
