//! The debian root file system is a Debian: with systemd or without it, one installs packages and logs in by ssh.

use std::path::Path;
use std::process::{Command, Output};

use pulau_agent_protocol::message::{CopyIn, Role, Shutdown, ShutdownAction};
use pulau_tests::network::{HOST, in_own_network};
use pulau_tests::vmm::{Vmm, drive};
use pulau_tests::{PATIENCE, artifact, wait_for};
use pulau_vmm::exit::ExitCode;
use serde_json::json;

const SYSTEMD: &str = "pulau.init=/lib/systemd/systemd";
const GUEST: &str = "172.16.0.2";

/// A guest with the debian root file system, not booted yet.
fn debian(more: &str) -> Vmm {
    let vmm = Vmm::start();
    vmm.configure(2, 512, more);
    vmm.put("/drives/root", drive("root", &artifact("PULAU_TEST_ROOTFS_DEBIAN"), true, true)).ok();
    vmm
}

fn copy_in(vmm: &Vmm, path: &str, mode: u32, bytes: &[u8]) {
    let request =
        CopyIn { path: path.into(), size: bytes.len() as u64, mode, owner: None, parents: true, sync: false };
    vmm.agent().copy_in(&request, bytes).unwrap();
}

#[test]
fn systemd_starts_the_agent_and_ends_the_guest_in_order() {
    let mut vmm = debian(SYSTEMD);
    vmm.boot();
    assert_eq!(vmm.agent().agent().role, Role::Service);
    let state = vmm.sh("systemctl is-system-running --wait || systemctl --failed --no-legend");
    assert_eq!(state.trim(), "running");
    assert_eq!(vmm.sh("cat /proc/1/comm; systemctl is-active pulau-agent ssh"), "systemd\nactive\nactive\n");
    // What the host runs is of no session and outlives a restart of the agent.
    vmm.sh("setsid sleep 4242 >/dev/null 2>&1 </dev/null & sleep 0.1");
    vmm.sh_and_end("systemctl restart pulau-agent");
    wait_for("the agent to be back", PATIENCE, || {
        (vmm.sh("systemctl is-active pulau-agent || :").trim() == "active").then_some(())
    });
    assert!(vmm.sh("pgrep -f 'sleep 424[2]'").trim().parse::<u32>().is_ok());
    vmm.agent().shutdown(Shutdown { action: ShutdownAction::PowerOff, grace_ms: None }).unwrap();
    vmm.exits_with(ExitCode::Ok as i32);

    let mut vmm = debian(SYSTEMD);
    vmm.boot();
    vmm.agent().shutdown(Shutdown { action: ShutdownAction::Reboot, grace_ms: None }).unwrap();
    vmm.exits_with(ExitCode::GuestReboot as i32);

    let mut vmm = debian(SYSTEMD);
    vmm.boot();
    vmm.sh("systemctl is-system-running --wait || :");
    vmm.put("/actions", json!({"action_type": "SendCtrlAltDel"})).ok();
    vmm.exits_with(ExitCode::Ok as i32);
}

/// `ssh` into the guest with `key` only.
fn ssh(key: &Path, command: &str) -> Output {
    Command::new("ssh")
        .args(["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=30"])
        .args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
        ])
        .arg("-i")
        .arg(key)
        .arg(format!("root@{GUEST}"))
        .arg(command)
        .output()
        .expect("ssh runs")
}

fn key(dir: &Path, name: &str) -> (std::path::PathBuf, Vec<u8>) {
    let path = dir.join(name);
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path).status();
    assert!(made.expect("ssh-keygen runs").success());
    let public = std::fs::read(path.with_extension("pub")).unwrap();
    (path, public)
}

#[test]
fn ssh_lets_in_who_has_the_key_with_systemd_and_without() {
    in_own_network(|| {
        for init in ["", SYSTEMD] {
            let vmm = debian(&format!("pulau.ip={GUEST}/24,gw={HOST} pulau.hostname=deb {init}"));
            // The same for both: the host would go on sending to the first for as long as it holds it for reachable.
            let mac = "06:00:00:00:00:02";
            let eth0 = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": mac});
            vmm.put("/network-interfaces/eth0", eth0).ok();
            vmm.boot();
            let (right, public) = key(vmm.dir(), "right");
            let (wrong, _) = key(vmm.dir(), "wrong");
            copy_in(&vmm, "/root/.ssh/authorized_keys", 0o600, &public);
            if init.is_empty() {
                vmm.sh("mkdir -p /run/sshd && ssh-keygen -A >/dev/null && /usr/sbin/sshd");
            } else {
                vmm.sh("systemctl is-system-running --wait || :");
            }
            let output = ssh(&right, "hostname; echo $SSH_CONNECTION; exit 7");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert_eq!(output.status.code(), Some(7), "{output:?}");
            assert!(text.starts_with(&format!("deb\n{HOST} ")) && text.ends_with(&format!("{GUEST} 22\n")));
            let output = ssh(&wrong, "true");
            assert_eq!(output.status.code(), Some(255), "{output:?}");
        }
    });
}

/// A package with a program and a script that runs when it is installed, from a repository in the guest:
/// tests need no network.
#[test]
fn apt_installs_and_removes_packages() {
    let vmm = debian("");
    vmm.boot();
    vmm.sh("set -e
        mkdir -p /srv/repo /tmp/p/DEBIAN /tmp/p/usr/bin
        printf '#!/bin/sh\\necho greetings\\n' >/tmp/p/usr/bin/greet; chmod +x /tmp/p/usr/bin/greet
        printf '#!/bin/sh\\nset -e\\necho \"$1\" >/var/lib/greet\\n' >/tmp/p/DEBIAN/postinst
        chmod +x /tmp/p/DEBIAN/postinst
        printf 'Package: greet\\nVersion: 1\\nArchitecture: all\\nMaintainer: t <t@example.org>\\nDepends: libc6\\nDescription: t\\n' >/tmp/p/DEBIAN/control
        dpkg-deb --build --root-owner-group /tmp/p /srv/repo/greet.deb >/dev/null
        cd /srv/repo
        { cat /tmp/p/DEBIAN/control; echo Filename: ./greet.deb; echo Size: $(stat -c %s greet.deb); echo SHA256: $(sha256sum <greet.deb | cut -d' ' -f1); } >Packages
        echo 'deb [trusted=yes] file:/srv/repo ./' >/etc/apt/sources.list");
    vmm.sh("apt-get update -q 2>&1 && DEBIAN_FRONTEND=noninteractive apt-get install -qy greet 2>&1");
    assert_eq!(vmm.sh("greet; cat /var/lib/greet"), "greetings\nconfigure\n");
    vmm.sh("apt-get remove -qy greet 2>&1; ! command -v greet");
    assert_eq!(vmm.sh("dpkg --audit; apt-get check -q 2>&1 >/dev/null"), "");
}
