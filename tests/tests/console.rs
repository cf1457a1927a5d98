//! The serial console in a file, and beside a shell on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;
use std::time::Instant;

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pulau_agent_protocol::client::connect;
use pulau_tests::vmm::{BOOT_ARGS, Vmm, drive};
use pulau_tests::{PATIENCE, artifact, child, program, wait_for};
use serde_json::json;

#[test]
fn the_console_may_be_a_file() {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "");
    let file = vmm.path("serial.log");
    vmm.put("/serial", json!({"serial_out_path": file})).ok();
    vmm.boot();
    vmm.sh("echo to-the-file > /dev/ttyS0");
    wait_for("the guest's line", PATIENCE, || {
        std::fs::read_to_string(&file).ok()?.contains("to-the-file\r\n").then_some(())
    });
    assert_eq!(vmm.console(), "", "nothing goes to standard output");
}

/// As in the tour of the README: started with `&` from a shell, whose user goes on typing.
#[test]
fn in_the_background_of_a_terminal_keys_are_the_shells() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let config = json!({
        "boot-source": {"kernel_image_path": artifact("PULAU_TEST_KERNEL"), "boot_args": BOOT_ARGS},
        "drives": [drive("root", &artifact("PULAU_TEST_ROOTFS_MINIMAL"), true, true)],
        "vsock": {"guest_cid": 3, "uds_path": path("vsock")},
    });
    std::fs::write(path("config"), config.to_string()).unwrap();
    let script = format!(
        "set -m; {} --no-api --config-file {} >{} 2>&1 & echo $! >{}; n=0; while read line; do n=$((n + 1)); echo key $n; done",
        program("pulau-vmm").display(),
        path("config").display(),
        path("log").display(),
        path("pid").display(),
    );
    let pty = openpty(None, None).unwrap();
    let mut command = Command::new("bash");
    command.args(["-c", &script]);
    child::on_terminal(&mut command, &pty.slave);
    let mut shell = command.spawn().unwrap();
    let guest = || connect(&path("vsock"), Instant::now() + PATIENCE).unwrap();
    guest();
    let pid: i32 = std::fs::read_to_string(path("pid")).unwrap().trim().parse().unwrap();

    let mut terminal = File::from(pty.master);
    let mut shown = String::new();
    for key in 1..=50 {
        terminal.write_all(b"x\n").unwrap();
        let mut chunk = [0; 1024];
        while !shown.contains(&format!("key {key}\r\n")) {
            let count = terminal.read(&mut chunk).unwrap();
            shown.push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    assert!(!stat.contains(") T "), "the VMM was stopped: {stat}");
    guest();
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    wait_for("the VMM to end", PATIENCE, || (!path("vsock").exists()).then_some(()));
    let _ = shell.kill();
    shell.wait().unwrap();
}
