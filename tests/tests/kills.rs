//! A daemon that dies between any two steps of what it does with real microVMs, and a host that is switched off.
//! The fault points that need no microVMs, and what comes of hundreds of deaths: `api/tests/kills`.

use std::collections::BTreeSet;
use std::path::Path;

use pulau_tests::daemon::Daemon;
use pulau_tests::network::{in_empty_network, ip};
use pulau_tests::{PATIENCE, wait_for};

/// Points on the way to a booting guest, and on the way back.
const BOOT: [&str; 8] =
    ["vm.home", "vm.lent", "vm.jail", "vm.forked", "vm.spawned", "vm.answers", "vm.configured", "vm.booting"];
const END: [&str; 5] = ["vm.ended", "vm.cgroup-removed", "vm.settled", "vm.jail-removed", "vm.removed"];

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn taps() -> usize {
    ip("-o link").lines().filter(|line| line.contains(": pl-")).count()
}

/// The control groups of instances, which other daemons' may be among.
fn groups(of: &str) -> usize {
    names(Path::new("/sys/fs/cgroup/pulau")).iter().filter(|name| name.contains(of)).count()
}

/// Has the daemon die at `point` while it does what `ask` asks for, and starts another.
fn die(daemon: &mut Daemon, point: &str, ask: impl FnOnce(&Daemon)) {
    daemon.kill();
    daemon.restart(&[("PULAU_FAULT", &format!("{point}:1"))]);
    ask(daemon);
    wait_for(point, PATIENCE, || daemon.has_died().then_some(()));
    daemon.kill();
    daemon.restart(&[]);
}

fn at_rest(daemon: &Daemon, id: &str, state: &str, machines: usize) {
    daemon.pulau(&["instance", "wait", id, state, "--timeout", "120"]);
    let there = || (daemon.machines().len(), taps(), groups(id));
    if machines > 0 {
        // One that was lost with the daemon that started it is started again after a pause, in which the instance
        // is running as it is wanted.
        wait_for("the microVM", PATIENCE, || (there() == (machines, machines, machines)).then_some(()));
    }
    assert_eq!(there(), (machines, machines, machines), "{}", daemon.log());
}

#[test]
fn a_daemon_that_dies_with_a_microvm_half_made_is_followed_by_one_that_makes_it() {
    in_empty_network(|| {
        let mut daemon = Daemon::start();
        let id = daemon.run(&[]);
        daemon.pulau(&["instance", "stop", &id, "--force", "--wait"]);
        for point in BOOT {
            die(&mut daemon, point, |daemon| _ = daemon.try_pulau(&["instance", "start", &id]));
            at_rest(&daemon, &id, "running", 1);
            daemon.pulau(&["instance", "stop", &id, "--force", "--wait"]);
            at_rest(&daemon, &id, "stopped", 0);
        }
        // It is whole after all that.
        daemon.pulau(&["instance", "start", &id]);
        daemon.pulau(&["instance", "wait", &id, "running", "--agent", "--timeout", "120"]);
        assert_eq!(daemon.sh(&id, "echo here"), "here\n");
    });
}

#[test]
fn a_daemon_that_dies_with_a_microvm_half_removed_is_followed_by_one_that_removes_it() {
    in_empty_network(|| {
        let mut daemon = Daemon::start();
        let id = daemon.run(&[]);
        for point in END {
            die(&mut daemon, point, |daemon| _ = daemon.try_pulau(&["instance", "stop", &id, "--force"]));
            at_rest(&daemon, &id, "stopped", 0);
            daemon.pulau(&["instance", "start", &id]);
            at_rest(&daemon, &id, "running", 1);
        }
        daemon.pulau(&["instance", "terminate", &id, "--wait"]);
        at_rest(&daemon, &id, "terminated", 0);
    });
}

/// Of the host only its disks are left: instances come back as they were wanted.
#[test]
fn a_host_may_be_switched_off() {
    in_empty_network(|| {
        let mut daemon = Daemon::start();
        let (runs, stopped) = (daemon.run(&[]), daemon.run(&[]));
        daemon.sh(&runs, "echo kept > /root/file; sync");
        let before = daemon.show(&runs)["interface"].clone();
        daemon.pulau(&["instance", "stop", &stopped, "--force", "--wait"]);
        daemon.kill();
        for machine in daemon.machines() {
            let pid =
                std::fs::read_to_string(daemon.path("data/run").join(&machine).join("vmm.pid")).unwrap();
            let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        for line in ip("-o link").lines().filter(|line| line.contains(": pl")) {
            let name = line.split(": ").nth(1).unwrap();
            ip(&format!("link delete {name}"));
        }
        let flushed = std::process::Command::new("nft").args(["flush", "ruleset"]).status().unwrap();
        assert!(flushed.success());
        daemon.restart(&[]);
        daemon.pulau(&["instance", "wait", &runs, "running", "--agent", "--timeout", "120"]);
        assert_eq!(daemon.sh(&runs, "cat /root/file"), "kept\n");
        assert_eq!((daemon.show(&runs)["interface"].clone(), daemon.machines().len()), (before, 1));
        daemon.sh(&runs, "ping -c 1 -W 20 10.77.0.1");
        assert_eq!(daemon.show(&stopped)["state"], "stopped");
    });
}
