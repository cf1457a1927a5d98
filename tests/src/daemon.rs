//! A running `pulau serve` with a data directory and a network namespace of its own, and its command line.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::{PATIENCE, artifact, child, program, wait_for};

/// A daemon, ended with all its instances when dropped. Its log is shown if the test panics.
pub struct Daemon {
    dir: TempDir,
    child: Option<Child>,
    /// What `pulau serve` is told besides where its files are.
    arguments: &'static [&'static str],
}

impl Daemon {
    /// Starts a daemon that has an image `minimal`. To be called in a thread with a network namespace of its
    /// own: see [`crate::network::in_empty_network`].
    pub fn start() -> Self {
        Self::with(&["--vcpus", "16", "--memory", "3G", "--stop-timeout", "60"])
    }

    /// The same, with microVMs that are simulated, and room for any number of them.
    pub fn simulated() -> Self {
        Self::with(&["--simulate", "--vcpus", "100000", "--memory", "1000000G"])
    }

    fn with(arguments: &'static [&'static str]) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut daemon = Self { dir, child: None, arguments };
        daemon.restart(&[]);
        let (kernel, root) = (artifact("PULAU_TEST_KERNEL"), artifact("PULAU_TEST_ROOTFS_MINIMAL"));
        let (kernel, root) = (kernel.to_string_lossy().into_owned(), root.to_string_lossy().into_owned());
        daemon.pulau(&["image", "import", "minimal", "--kernel", &kernel, "--root", &root]);
        daemon
    }

    /// Starts it, again after it was killed, with more environment variables.
    pub fn restart(&mut self, environment: &[(&str, &str)]) {
        let log = File::options().create(true).append(true).open(self.path("log")).expect("log file");
        let child = Command::new(program("pulau"))
            .arg("serve")
            .args(self.arguments)
            .arg("--data-dir")
            .arg(self.path("data"))
            .arg("--socket")
            .arg(self.path("api.sock"))
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("pulau starts");
        self.child = Some(child);
        wait_for("the daemon", PATIENCE, || {
            let child = self.child.as_mut()?;
            let ended = child.try_wait().expect("a child");
            assert!(
                ended.is_none() || !environment.is_empty(),
                "the daemon ended: {ended:?}\n{}",
                self.log()
            );
            (ended.is_some() || self.try_pulau(&["instance", "list"]).status.success()).then_some(())
        });
    }

    /// Kills it, as a crash or an operator would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Tells it to end, and waits until it has.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it can be told");
            let status = wait_for("the daemon to end", PATIENCE, || child.try_wait().expect("a child"));
            assert!(status.success(), "{status:?}\n{}", self.log());
        }
    }

    /// Its process number, while it runs.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Whether it has died, by itself.
    pub fn has_died(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().expect("a child").is_some())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Runs `pulau` with these arguments.
    pub fn try_pulau(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(program("pulau"));
        command.args(arguments).env("PULAU_SOCKET", self.path("api.sock")).stdin(Stdio::null());
        child::output(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pulau starts"))
    }

    /// The same; it has to succeed. What it printed.
    #[track_caller]
    pub fn pulau(&self, arguments: &[&str]) -> String {
        let output = self.try_pulau(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "pulau {arguments:?}: {:?}\n{errors}\n{}",
            output.status,
            self.log()
        );
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The same with `--json`.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut arguments = arguments.to_vec();
        // Before what goes to the guest.
        arguments.insert(2, "--json");
        serde_json::from_str(&self.pulau(&arguments)).expect("JSON")
    }

    /// Runs an instance and waits for its agent; its id.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        let all =
            [&["instance", "run", "--image", "minimal", "--wait", "--root-size", "1"], arguments].concat();
        let ran = self.json(&all);
        ran["items"][0]["id"].as_str().expect("an id").to_owned()
    }

    /// Runs a shell command in an instance; its output.
    #[track_caller]
    pub fn sh(&self, id: &str, script: &str) -> String {
        self.pulau(&["instance", "exec", id, "--", "sh", "-c", script])
    }

    /// An instance, as the API shows it.
    #[track_caller]
    pub fn show(&self, id: &str) -> Value {
        self.json(&["instance", "show", id])
    }

    /// Names of the microVMs there are.
    pub fn machines(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("data/run")).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| !name.starts_with('.')).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
        }
        self.kill();
        // What is left of its microVMs goes, too.
        for machine in self.machines() {
            let pid = std::fs::read_to_string(self.path("data/run").join(&machine).join("vmm.pid"));
            if let Ok(pid) = pid.unwrap_or_default().trim().parse::<i32>() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        }
    }
}
