//! `pulau microvm run` with real guests, as a user calls it: jailed, from the images of this project.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pulau_tests::{PATIENCE, artifact, child, program};

/// A user with a data directory of its own and a microVM's name nobody else uses.
struct User {
    data: tempfile::TempDir,
    name: String,
}

impl User {
    fn new(test: &str) -> Self {
        let name = format!("{test}-{}", std::process::id());
        User { data: tempfile::tempdir().expect("temporary directory"), name }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.data.path().join(name)
    }

    /// `pulau microvm run` with the test images.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("pulau"));
        command
            .args(["microvm", "run", "--boot-timeout", "120", "--name", &self.name])
            .arg("--data-dir")
            .arg(self.path("data"))
            .arg("--kernel")
            .arg(artifact("PULAU_TEST_KERNEL"))
            .arg("--rootfs")
            .arg(artifact("PULAU_TEST_ROOTFS_MINIMAL"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(arguments);
        child::output(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pulau starts"))
    }

    /// Starts a run and waits until its guest has printed a line.
    fn start(&self, script: &str) -> Child {
        let script = format!("echo running; {script}");
        let mut command = self.command(&["--", "sh", "-c", &script]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pulau starts");
        let mut stdout = child.stdout.take().expect("a pipe");
        let (sender, line) = mpsc::channel();
        thread::spawn(move || {
            let mut line = [0; 8];
            let read = stdout.read_exact(&mut line).map(|()| line);
            let _ = sender.send((read, stdout));
        });
        let (line, stdout) = line.recv_timeout(2 * PATIENCE).expect("the guest's line in time");
        child.stdout = Some(stdout);
        match line {
            Ok(line) => assert_eq!(&line, b"running\n"),
            Err(_) => panic!("no line of the guest's: {:?}", child::output(child)),
        }
        child
    }

    fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup/pulau").join(&self.name)
    }

    fn vmm_pid(&self) -> i32 {
        let file = self.path("data/adhoc").join(&self.name).join("vmm.pid");
        fs::read_to_string(file).expect("a pid file").trim().parse().expect("a number")
    }

    /// Checks that the host is as it was before.
    #[track_caller]
    fn assert_clean(&self) {
        let homes = fs::read_dir(self.path("data/adhoc")).expect("the directory of homes");
        let left: Vec<_> = homes.map(|e| e.unwrap().file_name()).filter(|name| name != ".lock").collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        assert!(!self.cgroup().exists(), "the control group is left");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(&self.data.path().display().to_string()), "a mount is left: {mounts}");
        for process in fs::read_dir("/proc").unwrap() {
            let arguments = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
            assert!(!arguments.contains(&self.name), "a process is left: {arguments}");
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).expect("a signal");
}

#[test]
fn a_commands_streams_and_exit_code_are_the_callers() {
    let user = User::new("streams");
    let output =
        user.run(&["--env", "A=b c", "--", "sh", "-c", "echo out $A; echo err >&2; hostname; exit 7"]);
    assert_eq!(text(&output.stdout), format!("out b c\n{}\n", user.name));
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(7));
    user.assert_clean();
}

#[test]
fn standard_input_reaches_the_command_to_its_end() {
    let user = User::new("stdin");
    let mut child = user
        .command(&["--", "wc", "-c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("pulau");
    let mut stdin = child.stdin.take().expect("a pipe");
    // More than any window on the way holds.
    let writer = thread::spawn(move || stdin.write_all(&vec![b'x'; 3 << 20]));
    let output = child::output(child);
    writer.join().expect("the writer").expect("all of it was taken");
    assert_eq!(text(&output.stdout).trim(), (3 << 20).to_string());
    assert!(output.status.success());

    // Without a command, a shell reads it.
    let mut child = user.command(&[]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("pulau");
    child.stdin.take().expect("a pipe").write_all(b"echo a\nexit 4\n").expect("a script");
    let output = child::output(child);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("a\n", Some(4)));
    user.assert_clean();
}

#[test]
fn the_document_tells_output_and_boot_times() {
    let user = User::new("json");
    let output = user.run(&["--cpus", "2", "--memory", "192M", "--json", "--", "sh", "-c", "nproc; exit 3"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a document");
    assert_eq!(document["stdout"], "2\n");
    assert_eq!(document["exit_code"], 3);
    let time =
        |name: &str| document["boot_times"][name].as_u64().unwrap_or_else(|| panic!("{name}: {document}"));
    let order = ["api_ready_us", "configured_us", "started_us", "agent_us"].map(time);
    assert!(order.is_sorted() && order[0] > 0, "{document}");
    assert!(time("guest_init_us") > 0 && time("guest_init_us") < time("agent_us"), "{document}");
    let phases = document["guest_phases"].as_array().expect("phases");
    assert!(phases.iter().any(|phase| phase["phase"] == "ready"), "{document}");

    let table = user.run(&["--boot-times", "--", "true"]);
    assert!(text(&table.stderr).contains("agent in the guest answers"), "{}", text(&table.stderr));
    user.assert_clean();
}

#[test]
fn drives_are_written_only_where_allowed_and_go_back_to_their_owner() {
    let user = User::new("drives");
    let (data, fixed) = (user.path("data.img"), user.path("fixed.img"));
    for image in [&data, &fixed] {
        File::create(image).unwrap().set_len(1 << 20).unwrap();
    }
    let owner = |path: &Path| fs::metadata(path).map(|meta| (meta.uid(), meta.gid())).unwrap();
    let before = owner(&data);
    let script =
        "echo written | dd of=/dev/vdb conv=fsync 2>/dev/null && ! { echo x | dd of=/dev/vdc; } 2>/dev/null";
    let drives = ["--drive", &data.display().to_string(), "--drive", &format!("{}:ro", fixed.display())];
    let output = user.run(&[&drives[..], &["--", "sh", "-c", script]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(fs::read(&data).unwrap().starts_with(b"written\n"));
    assert!(fs::read(&fixed).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(owner(&data), before);
    user.assert_clean();
}

#[test]
fn the_vmm_is_jailed_and_limited() {
    let user = User::new("jailed");
    let child = user.start("sleep 600");
    let pid = user.vmm_pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the VMM's status");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
        line.split_whitespace().next().expect("a value").to_owned()
    };
    assert!(field("Uid:").parse::<u32>().unwrap() >= 2_000_000_000, "{status}");
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    let limit: u64 =
        fs::read_to_string(user.cgroup().join("memory.max")).expect("a limit").trim().parse().expect("bytes");
    assert!(limit > 256 << 20 && limit < 512 << 20, "{limit}");
    let members = fs::read_to_string(user.cgroup().join("cgroup.procs")).unwrap();
    assert_eq!(members.trim(), pid.to_string());
    signal(&child, Signal::SIGTERM);
    child::output(child);
    user.assert_clean();
}

#[test]
fn a_signal_ends_it_in_good_order() {
    for (number, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let user = User::new("signal");
        let child = user.start("sleep 600");
        signal(&child, number);
        let output = child::output(child);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        user.assert_clean();
    }
}

#[test]
fn what_a_killed_run_leaves_the_next_one_removes() {
    let user = User::new("killed");
    let mut child = user.start("sleep 600");
    let vmm = user.vmm_pid();
    child.kill().expect("a kill");
    child::end(&mut child);
    assert!(Path::new(&format!("/proc/{vmm}")).exists(), "the VMM runs on by itself");
    let output = user.run(&["--", "true"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), format!("pulau: removed what was left of {}\n", user.name));
    user.assert_clean();
}

#[test]
fn a_panic_is_an_error_with_the_consoles_last_lines_and_not_a_hang() {
    let user = User::new("panic");
    // The kernel panics when its init ends.
    let output = user.run(&["--boot-args", "console=ttyS0 quiet panic=-1 init=/bin/true", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    let message = text(&output.stderr);
    assert!(message.contains("the guest's kernel panicked"), "{message}");
    assert!(message.contains("Kernel panic - not syncing: Attempted to kill init"), "{message}");
    user.assert_clean();
}

#[test]
fn a_guest_that_ends_by_itself_is_told_from_one_whose_command_ended() {
    let user = User::new("poweroff");
    // Forced, so that the command does not end first.
    let output = user.run(&["--", "sh", "-c", "poweroff -f; sleep 600"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("the guest powered itself off"), "{}", text(&output.stderr));
    let output = user.run(&["--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
    user.assert_clean();
}

#[test]
fn a_vmm_that_is_killed_is_an_error_at_once() {
    let user = User::new("vmmdies");
    let child = user.start("sleep 600");
    kill(Pid::from_raw(user.vmm_pid()), Signal::SIGKILL).expect("a kill");
    let output = child::output(child);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("killed by signal 9"), "{}", text(&output.stderr));
    user.assert_clean();
}

#[test]
fn images_that_do_not_boot_are_named() {
    let user = User::new("images");
    let bad = user.path("bad");
    fs::write(&bad, "this is not a kernel").unwrap();
    let run = |kernel: &Path, rootfs: &Path| {
        let output = Command::new(program("pulau"))
            .args(["microvm", "run", "--boot-timeout", "60", "--name", &user.name, "--data-dir"])
            .arg(user.path("data"))
            .arg("--kernel")
            .arg(kernel)
            .arg("--rootfs")
            .arg(rootfs)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let output = child::output(output.expect("pulau starts"));
        assert_eq!(output.status.code(), Some(125));
        user.assert_clean();
        text(&output.stderr)
    };
    let (kernel, rootfs) = (artifact("PULAU_TEST_KERNEL"), artifact("PULAU_TEST_ROOTFS_MINIMAL"));
    assert!(run(&user.path("none"), &rootfs).contains("/none: No such file"));
    let message = run(&bad, &rootfs);
    assert!(message.contains("kernel"), "{message}");
    // A disk of no whole number of sectors, then one without a file system.
    let message = run(&kernel, &bad);
    assert!(message.contains("sector") || message.contains("512"), "{message}");
    // By the name it was given, not the one it has in the jail, by which only the VMM's own log knows it.
    let reason = message.lines().next().unwrap_or_default();
    assert!(reason.contains(bad.to_str().unwrap()) && !reason.contains("/drive-"), "{message}");
    File::create(&bad).unwrap().set_len(1 << 20).unwrap();
    let message = run(&kernel, &bad);
    assert!(message.contains("Unable to mount root fs"), "{message}");
}

/// A run on a terminal of this size, and everything it shows there.
struct OnTerminal {
    child: Child,
    keyboard: File,
    screen: mpsc::Receiver<Vec<u8>>,
    shown: String,
}

impl OnTerminal {
    fn start(user: &User, size: Winsize) -> Self {
        let pty = openpty(Some(&size), None).expect("a terminal");
        let mut command = user.command(&[]);
        command.env("TERM", "vt100");
        child::on_terminal(&mut command, &pty.slave);
        let child = command.spawn().expect("pulau starts");
        drop(command);
        drop(pty.slave);
        let keyboard = File::from(pty.master);
        let mut output = keyboard.try_clone().expect("a descriptor");
        let (sender, screen) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = output.read(&mut buffer) {
                if length == 0 || sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        OnTerminal { child, keyboard, screen, shown: String::new() }
    }

    fn type_in(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("a keyboard");
    }

    /// Waits until the screen has shown `wanted` since the last call.
    #[track_caller]
    fn wait_for(&mut self, wanted: &str) {
        while !self.shown.contains(wanted) {
            match self.screen.recv_timeout(PATIENCE) {
                Ok(bytes) => self.shown.push_str(&text(&bytes)),
                Err(e) => panic!("no {wanted:?} ({e}) in {:?}", self.shown),
            }
        }
        self.shown.clear();
    }
}

const SMALL: Winsize = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };

#[test]
fn on_a_terminal_it_is_a_shell_of_the_terminals_size() {
    let user = User::new("terminal");
    let mut terminal = OnTerminal::start(&user, SMALL);
    // The shell's echo shows what is typed, so results are told apart from it by arithmetic.
    terminal.type_in("stty size; echo $((40 + 2)) $TERM; tty\r");
    terminal.wait_for("30 100\r\n42 vt100\r\n/dev/pts/");
    let larger = Winsize { ws_row: 50, ..SMALL };
    // SAFETY: the request reads one winsize from a valid pointer.
    unsafe { libc::ioctl(terminal.keyboard.as_raw_fd(), libc::TIOCSWINSZ, &raw const larger) };
    thread::sleep(std::time::Duration::from_millis(500));
    terminal.type_in("stty size\r");
    terminal.wait_for("50 100");
    // Ctrl-C is for the guest.
    terminal.type_in("sleep 1000\r");
    thread::sleep(std::time::Duration::from_millis(500));
    terminal.type_in("\x03");
    terminal.type_in("echo $((50 + 5))\r");
    terminal.wait_for("55");
    terminal.type_in("exit 6\r");
    assert_eq!(child::end(&mut terminal.child).code(), Some(6));
    user.assert_clean();
}

#[test]
fn a_terminal_can_be_left_and_is_as_it_was() {
    let user = User::new("left");
    let mut terminal = OnTerminal::start(&user, SMALL);
    let modes =
        |terminal: &OnTerminal| nix::sys::termios::tcgetattr(&terminal.keyboard).expect("modes").local_flags;
    let before = modes(&terminal);
    terminal.type_in("echo $((40 + 2)); sleep 1000\r");
    terminal.wait_for("42");
    assert_ne!(modes(&terminal), before, "raw");
    terminal.type_in("\r~.");
    assert_eq!(child::end(&mut terminal.child).code(), Some(137));
    assert_eq!(modes(&terminal), before);
    user.assert_clean();
}
