//! The agent in real guests: what namespaces on this machine cannot show. Everything goes over vsock.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, VsockAddr};
use pulau_agent_protocol::message::{
    CopyIn, EntropySeed, ExecRequest, ExitStatus, Identity, Resumed, Role, Shutdown, ShutdownAction,
    WallClock, WindowSize,
};
use pulau_tests::vmm::{Vmm, drive};
use pulau_tests::{PATIENCE, program, wait_for};
use pulau_vmm::exit::ExitCode;

fn request(argv: &[&str]) -> ExecRequest {
    ExecRequest { argv: argv.iter().map(|s| s.to_string()).collect(), ..Default::default() }
}

fn shut_down(vmm: &Vmm, action: ShutdownAction) {
    vmm.agent().shutdown(Shutdown { action, grace_ms: None }).unwrap();
}

#[test]
fn a_boot_has_no_problems_and_its_phases_are_timed() {
    let vmm = Vmm::start_with(&["--boot-timer"]);
    vmm.configure(1, 128, "pulau.boot_timer pulau.hostname=web-1");
    vmm.boot();
    let mut agent = vmm.agent();
    assert_eq!(agent.agent().role, Role::Init);
    let health = agent.health().unwrap();
    assert_eq!((health.problems, health.hostname.as_str()), (vec![], "web-1"));
    let phases: BTreeMap<&str, u64> = health.boot.iter().map(|p| (p.phase.as_str(), p.at_us)).collect();
    eprintln!("boot phases, us since the guest's kernel began: {:?}", health.boot);
    assert!(0 < phases["init"] && phases["init"] < phases["overlay"] && phases["network"] <= phases["ready"]);
    assert!(health.memory_available < health.memory_total && health.memory_total < 128 << 20);
}

#[test]
fn a_process_gets_its_input_and_gives_its_output_whole() {
    let vmm = Vmm::booted();
    let input: Vec<u8> =
        (0..8_000_000u32).flat_map(|i| (i.wrapping_mul(2_654_435_761) >> 8).to_le_bytes()).collect();
    let output = vmm.agent().output(&request(&["cat"]), &input).unwrap();
    assert_eq!(output.status, ExitStatus::Code(0));
    assert!(output.stdout == input, "{} bytes of {}", output.stdout.len(), input.len());
}

#[test]
fn a_terminal_works_over_vsock() {
    let vmm = Vmm::booted();
    let tty = Some(WindowSize { rows: 30, cols: 100 });
    let mut exec = vmm.agent().exec(&ExecRequest { tty, ..request(&["sh", "-i"]) }).unwrap();
    exec.input.write_all(b"stty size; tty; exit 7\n").unwrap();
    let mut out = Vec::new();
    let status = exec.output.copy_to(&mut out, &mut std::io::sink()).unwrap();
    let out = String::from_utf8_lossy(&out);
    assert!(out.contains("30 100\r\n") && out.contains("/dev/pts/"), "{out}");
    assert_eq!(status, ExitStatus::Code(7));
}

#[test]
fn a_vanished_hosts_process_is_ended() {
    let vmm = Vmm::booted();
    let exec = vmm.agent().exec(&request(&["sleep", "4242"])).unwrap();
    let pid = exec.pid;
    assert!(vmm.sh(&format!("cat /proc/{pid}/cmdline")).contains("4242"));
    drop(exec);
    wait_for("the process to end", PATIENCE, || {
        vmm.sh(&format!("test -e /proc/{pid} || echo gone")).contains("gone").then_some(())
    });
}

#[test]
fn files_go_in_and_come_out() {
    let vmm = Vmm::booted();
    let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i / 7) as u8).collect();
    let wanted = CopyIn {
        path: "/srv/app/data".into(),
        size: bytes.len() as u64,
        mode: 0o640,
        owner: Some("12:34".into()),
        parents: true,
        sync: true,
    };
    vmm.agent().copy_in(&wanted, bytes.as_slice()).unwrap();
    assert_eq!(vmm.sh("stat -c '%s %a %u %g' /srv/app/data").trim(), "3000001 640 12 34");
    let mut back = Vec::new();
    vmm.agent().copy_out("/srv/app/data", &mut back).unwrap();
    assert!(back == bytes);
}

/// What a clone is told after a restore, here told to a guest that was not.
#[test]
fn a_guest_becomes_who_it_is_told_it_is() {
    let vmm = Vmm::booted();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let resumed = Resumed {
        identity: Identity { id: "i-0042".into(), hostname: Some("clone".into()) },
        network: vec![],
        wall_clock: WallClock { secs: now + 100_000, nanos: 5 },
        entropy_seed: EntropySeed::new((0..64).collect()).unwrap(),
    };
    vmm.agent().resumed(&resumed).unwrap();
    let health = vmm.agent().health().unwrap();
    assert_eq!((health.id.as_deref(), health.hostname.as_str()), (Some("i-0042"), "clone"));
    let time: u64 = vmm.sh("date +%s").trim().parse().unwrap();
    assert!((now + 100_000..now + 100_000 + PATIENCE.as_secs()).contains(&time), "{time} is not after {now}");
}

#[test]
fn the_clock_is_the_hosts_and_can_be_set() {
    let vmm = Vmm::booted();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let guests = || vmm.sh("date +%s").trim().parse::<u64>().unwrap();
    let before = now();
    let time = guests();
    assert!((before - 2..=now() + 2).contains(&time), "the guest's {time} began as the host's {before}");
    vmm.agent().set_time(WallClock { secs: 2_000_000_000, nanos: 0 }).unwrap();
    assert!((2_000_000_000..2_000_000_000 + PATIENCE.as_secs()).contains(&guests()));
}

#[test]
fn a_process_that_takes_all_memory_dies_and_the_agent_does_not() {
    let vmm = Vmm::booted();
    let (status, _, _) = vmm.try_sh("exec tail /dev/zero");
    assert_eq!(status, ExitStatus::Signal(9));
    assert_eq!(vmm.sh("echo alive").trim(), "alive");
}

#[test]
fn a_layer_on_a_disk_survives_and_is_left_clean() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("layer.ext4");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    tool("mkfs.ext4", &["-q"], &disk);
    for (command, expected) in [
        ("echo kept > /etc/kept; cat /etc/kept", "kept"),
        ("cat /etc/kept; rm /etc/kept", "kept"),
        ("ls /etc/kept 2>&1 || :", "ls: "),
    ] {
        let mut vmm = Vmm::start();
        vmm.configure(1, 128, "pulau.overlay=/dev/vdb");
        vmm.put("/drives/layer", drive("layer", &disk, false, false)).ok();
        vmm.boot();
        assert_eq!(vmm.agent().health().unwrap().problems, [""; 0]);
        assert!(vmm.sh(command).starts_with(expected));
        shut_down(&vmm, ShutdownAction::PowerOff);
        vmm.exits_with(ExitCode::Ok as i32);
        let state = tool("dumpe2fs", &["-h"], &disk);
        assert!(state.contains("state:         clean") && !state.contains("needs_recovery"), "{state}");
    }
}

fn tool(program: &str, args: &[&str], path: &Path) -> String {
    let output =
        Command::new(program).args(args).arg(path).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn requests_and_commands_in_the_guest_end_it() {
    let mut vmm = Vmm::booted();
    shut_down(&vmm, ShutdownAction::Reboot);
    vmm.exits_with(ExitCode::GuestReboot as i32);
    // BusyBox's, which signal PID 1.
    for (command, code) in [("poweroff", ExitCode::Ok), ("reboot", ExitCode::GuestReboot)] {
        let mut vmm = Vmm::booted();
        vmm.sh("true");
        let _ = vmm.agent().output(&request(&[command]), b"");
        vmm.exits_with(code as i32);
    }
}

#[test]
fn the_console_has_a_shell_if_asked_for() {
    let vmm = Vmm::start();
    vmm.configure(1, 128, "pulau.console=shell");
    vmm.boot();
    wait_for("a prompt on the console", PATIENCE, || vmm.console().contains("# ").then_some(()));
    // The terminal is its to control, and it comes back when it ends.
    let shell =
        || vmm.sh("cd /proc; grep -l '^-sh' [0-9]*/cmdline 2>/dev/null || :").replace("/cmdline\n", "");
    let first = shell();
    let terminal = vmm.sh(&format!("cut -d' ' -f7 /proc/{first}/stat"));
    assert_eq!(terminal.trim(), "1088", "ttyS0 is device 4:64");
    vmm.sh(&format!("kill -9 {first}"));
    wait_for("another shell", PATIENCE, || {
        (![String::new(), first.clone()].contains(&shell())).then_some(())
    });
}

/// Over vsock's loopback on the machine of the tests, an agent is asked by a process beside it.
#[test]
fn only_the_host_may_ask() {
    let loaded = Command::new("modprobe").arg("vsock_loopback").env("PATH", "/usr/sbin:/sbin").status();
    if !loaded.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this machine's kernel has no vsock loopback");
        return;
    }
    const PORT: u32 = 40_024;
    let mut agent = Command::new(program("pulau-agent"))
        .args(["--service", "--listen", &format!("vsock:{PORT}")])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let fd = wait_for("the agent to listen", PATIENCE, || {
        let fd =
            socket::socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let address = VsockAddr::new(nix::libc::VMADDR_CID_LOCAL, PORT);
        socket::connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).is_ok().then_some(fd)
    });
    // No answer to a hello, not even an error: the end.
    let mut stream = std::os::unix::net::UnixStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let hello = br#"{"min_version":1,"max_version":1,"client":"test"}"#;
    let _ = pulau_agent_protocol::frame::write(&mut stream, pulau_agent_protocol::Kind::Hello, hello);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    agent.kill().unwrap();
    let log = agent.wait_with_output().unwrap().stderr;
    assert_eq!(answer, b"");
    assert!(String::from_utf8_lossy(&log).contains("refused a connection from CID 1"));
}

#[test]
fn an_unformatted_disk_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("blank");
    std::fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let vmm = Vmm::start();
    vmm.put("/drives/layer", drive("layer", &disk, false, false)).ok();
    vmm.configure(1, 128, "pulau.overlay=/dev/vdb");
    vmm.boot();
    let problems = vmm.agent().health().unwrap().problems;
    assert!(matches!(&problems[..], [p] if p.contains("mount /dev/vdb as ext4")), "{problems:?}");
    assert!(vmm.sh("touch /x 2>&1 || :").contains("Read-only"));
}
