//! A daemon that dies at a point of its work on disks and images, as by a power cut, and the next one. The process is a real
//! one; its microVMs are pretended.

#![allow(clippy::unwrap_used, clippy::expect_used)] // It is all tests.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

struct Daemon<'a> {
    dir: &'a Path,
    child: Child,
}

impl<'a> Daemon<'a> {
    /// Starts one that dies at the first passage of `fault`.
    fn start(dir: &'a Path, fault: Option<&str>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pulau"));
        command.args(["serve", "--simulate", "--data-dir"]).arg(dir.join("data"));
        command.arg("--socket").arg(dir.join("socket")).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null()).env_remove("PULAU_FAULT");
        if let Some(fault) = fault {
            command.env("PULAU_FAULT", format!("{fault}:1"));
        }
        let mut daemon = Daemon { dir, child: command.spawn().unwrap() };
        wait("the daemon", || daemon.has_died() || daemon.pulau(&["volume", "list"]).status.success());
        daemon
    }

    fn has_died(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    fn pulau(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pulau"));
        command.args(arguments).env("PULAU_SOCKET", self.dir.join("socket")).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// What `pulau KIND list` shows.
    fn list(&self, kind: &str) -> Vec<Value> {
        let output = self.pulau(&[kind, "list", "--json"]);
        let list: Value = serde_json::from_slice(&output.stdout).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    /// The states of all of a kind, in order.
    fn states(&self, kind: &str) -> Vec<String> {
        let mut states: Vec<_> =
            self.list(kind).iter().map(|item| item["state"].as_str().unwrap().to_owned()).collect();
        states.sort();
        states
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Disks that are there.
fn files(dir: &Path, kind: &str) -> usize {
    let entries = std::fs::read_dir(dir.join("data").join(kind)).unwrap().flatten();
    entries.filter(|entry| entry.path().is_file()).count()
}

struct Case {
    /// Where the daemon dies.
    fault: &'static str,
    /// What it is asked for then.
    request: &'static [&'static str],
    /// The states that volumes and snapshots come to.
    volumes: &'static [&'static str],
    snapshots: &'static [&'static str],
}

#[test]
fn a_daemon_that_dies_at_work_on_disks_is_followed_by_one_that_finishes_or_undoes_it() {
    // A volume that is available and a snapshot that is completed are there.
    let cases = [
        Case {
            fault: "volume.made",
            request: &["volume", "create", "--size", "1"],
            volumes: &["available", "available"],
            snapshots: &["completed"],
        },
        Case {
            fault: "volume.made",
            request: &["volume", "create", "--snapshot", "SNAPSHOT"],
            volumes: &["available", "available"],
            snapshots: &["completed"],
        },
        Case {
            fault: "volume.removed",
            request: &["volume", "delete", "VOLUME"],
            volumes: &[],
            snapshots: &["completed"],
        },
        Case {
            fault: "snapshot.taken",
            request: &["snapshot", "create", "VOLUME"],
            volumes: &["available"],
            snapshots: &["completed", "error"],
        },
        Case {
            fault: "snapshot.forgotten",
            request: &["snapshot", "delete", "SNAPSHOT"],
            volumes: &["available"],
            snapshots: &[],
        },
    ];
    for Case { fault, request, volumes, snapshots } in cases {
        let dir = tempfile::tempdir().unwrap();
        let first = Daemon::start(dir.path(), None);
        assert!(first.pulau(&["volume", "create", "--size", "1"]).status.success());
        let volume = first.list("volume")[0]["id"].as_str().unwrap().to_owned();
        assert!(first.pulau(&["snapshot", "create", &volume]).status.success());
        let snapshot = first.list("snapshot")[0]["id"].as_str().unwrap().to_owned();
        drop(first);

        let mut dies = Daemon::start(dir.path(), Some(fault));
        let named = request.iter().map(|word| match *word {
            "VOLUME" => volume.as_str(),
            "SNAPSHOT" => snapshot.as_str(),
            word => word,
        });
        // It may have been answered, or not.
        let _ = dies.pulau(&named.collect::<Vec<_>>());
        wait(fault, || dies.has_died());
        drop(dies);

        let last = Daemon::start(dir.path(), None);
        wait(fault, || last.states("volume") == volumes && last.states("snapshot") == snapshots);
        let whole = snapshots.iter().filter(|state| **state == "completed").count();
        assert_eq!(
            (files(dir.path(), "volumes"), files(dir.path(), "snapshots")),
            (volumes.len(), whole),
            "{fault}"
        );
        for staging in ["volumes/tmp", "snapshots/tmp"] {
            assert_eq!(files(dir.path(), staging), 0, "{fault}");
        }
    }
}
