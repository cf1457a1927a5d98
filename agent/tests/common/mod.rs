//! An agent as a service on a Unix socket of its own, and connections to it.
#![allow(dead_code, clippy::unwrap_used)] // each test program uses its part

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use pulau_agent_protocol::Connection;
use pulau_agent_protocol::message::{ExecRequest, WindowSize};

pub struct Service {
    child: Child,
    idle_files: usize,
    pub dir: tempfile::TempDir,
}

impl Service {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_pulau-agent"))
            .arg("--service")
            .arg("--listen")
            .arg(format!("unix:{}", dir.path().join("agent.sock").display()))
            .spawn()
            .unwrap();
        let mut service = Self { child, idle_files: 0, dir };
        wait_for("the agent's socket", || UnixStream::connect(service.socket()).is_ok());
        // After an answered hello there is a thread, whose end can be waited for.
        drop(service.connect());
        wait_for("that connection's end", || service.threads() == 1);
        service.idle_files = service.open_files();
        service
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// A connection without the hello.
    pub fn raw(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    pub fn connect(&self) -> Connection<UnixStream> {
        Connection::new(self.raw(), Some(soon())).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Process ids of the agent's children, zombies too.
    pub fn children(&self) -> Vec<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        tasks
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("children")).ok())
            .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
            .collect()
    }

    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Waits until the agent has no child, and no more descriptors and threads than when idle.
    pub fn assert_idle(&self) {
        wait_for("the agent to be idle", || {
            self.children().is_empty() && self.open_files() == self.idle_files && self.threads() == 1
        });
    }

    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = soon();
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn exists(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

pub fn argv<const N: usize>(argv: [&str; N]) -> ExecRequest {
    ExecRequest { argv: argv.map(str::to_owned).to_vec(), ..Default::default() }
}

pub fn sh(script: &str) -> ExecRequest {
    argv(["sh", "-c", script])
}

pub fn on_tty(request: ExecRequest) -> ExecRequest {
    ExecRequest { tty: Some(WindowSize { rows: 24, cols: 80 }), ..request }
}

/// Endless bytes that do not repeat, the same for the same seed.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }

    pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        Self::new(seed).fill(&mut bytes);
        bytes
    }
}
