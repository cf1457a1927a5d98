//! The agent as PID 1, in namespaces of its own on the machine that runs the tests: a read-only root with
//! little in it, a kernel command line of the test's choosing, an agent that listens on a Unix socket.
//! What needs a kernel of its own (boot timer, vsock, the end of a real machine) is tested in real guests.
//!
//! Needs root; without it the tests say that they were skipped.

#![allow(clippy::unwrap_used)] // clippy.toml allows it in test functions, not in their helpers

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use common::{argv, exists, on_tty, sh, soon, wait_for};
use pulau_agent_protocol::Connection;
use pulau_agent_protocol::client::OutputEvent;
use pulau_agent_protocol::message::{CopyIn, ExitStatus, Role, Shutdown, ShutdownAction};

const PROGRAMS: [&str; 7] = ["sh", "cat", "sleep", "stty", "tty", "touch", "ls"];

/// Sets the namespaces up and becomes the agent: `$1` holds the root's files, `$2` is the file to show as
/// the kernel command line. The root is a file system of its own, read-only as an image is: the agent
/// makes the root's file system read-only at the end, and must not reach this machine's.
const SETUP: &str = r#"
set -e
mount -t tmpfs -o mode=755 image /mnt
cp -a "$1/." /mnt
mount -o remount,ro /mnt
mount -t proc proc /mnt/proc
mount --bind "$2" /mnt/proc/cmdline
ip link add eth0 type veth peer name peer0
exec chroot /mnt /sbin/init these arguments=are the-kernels
"#;

struct Guest {
    unshare: Child,
    /// PID 1's number out here.
    init: u32,
    _dir: tempfile::TempDir,
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root for namespaces and mounts");
    }
    root
}

fn install(program: &Path, root: &Path, at: &str) {
    let target = root.join(at.trim_start_matches('/'));
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    fs::copy(fs::canonicalize(program).unwrap(), &target).unwrap();
    let libraries = Command::new("ldd").arg(program).output().unwrap().stdout;
    for word in String::from_utf8(libraries).unwrap().split_whitespace().filter(|w| w.starts_with('/')) {
        let target = root.join(&word[1..]);
        if !target.exists() {
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            fs::copy(word, target).unwrap();
        }
    }
}

impl Guest {
    /// Boots with this command line (and a socket to listen on), and waits until the agent answers.
    fn boot(cmdline: &str) -> Self {
        Self::boot_with(cmdline, |_| {})
    }

    /// Lets the caller change the root before the boot.
    fn boot_with(cmdline: &str, prepare: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for name in ["proc", "sys", "dev", "run", "tmp", "etc", "root", "bin"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        install(Path::new(env!("CARGO_BIN_EXE_pulau-agent")), &root, "/sbin/init");
        for program in PROGRAMS {
            let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap();
            install(
                Path::new(String::from_utf8(found.stdout).unwrap().trim()),
                &root,
                &format!("/bin/{program}"),
            );
        }
        fs::write(root.join("etc/hostname"), "from-the-image\n").unwrap();
        fs::write(root.join("etc/resolv.conf"), "# from the image\n").unwrap();
        fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
        prepare(&root);
        let file = dir.path().join("cmdline");
        fs::write(&file, format!("quiet panic=-1 {cmdline} pulau.listen=unix:/run/agent.sock\n")).unwrap();

        let unshare = Command::new("unshare")
            .args(["-pfmniuC", "--kill-child", "sh", "-c", SETUP, "sh"])
            .args([&root, &file])
            .spawn()
            .unwrap();
        let mut guest = Self { unshare, init: 0, _dir: dir };
        wait_for("PID 1", || {
            let children = format!("/proc/{0}/task/{0}/children", guest.unshare.id());
            let first = fs::read_to_string(children).ok();
            guest.init = first.and_then(|list| list.split_whitespace().next()?.parse().ok()).unwrap_or(0);
            guest.init != 0
        });
        wait_for("the agent to answer", || UnixStream::connect(guest.path("/run/agent.sock")).is_ok());
        guest
    }

    /// A path in the guest, from out here.
    fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    fn connect(&self) -> Connection<UnixStream> {
        Connection::new(UnixStream::connect(self.path("/run/agent.sock")).unwrap(), Some(soon())).unwrap()
    }

    /// What a script that must succeed prints.
    fn says(&self, script: &str) -> String {
        let output = self.connect().output(&sh(script), b"").unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
        let (out, err) = (text(output.stdout), text(output.stderr));
        assert_eq!(output.status, ExitStatus::Code(0), "{script}: {out} {err}");
        out
    }

    /// What a command prints that is run out here in the guest's network namespace.
    fn ip(&self, args: &str) -> String {
        let output = Command::new("nsenter")
            .args(["-n", "-t", &self.init.to_string(), "ip"])
            .args(args.split(' '))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn problems(&self) -> Vec<String> {
        self.connect().health().unwrap().problems
    }

    fn shut_down(self, action: ShutdownAction, grace_ms: Option<u32>) -> End {
        self.connect().shutdown(Shutdown { action, grace_ms }).unwrap();
        self.wait()
    }

    /// How the guest ends; a PID namespace tells reboot(2)'s modes apart by the signal that its PID 1 then
    /// seems to have died of.
    fn wait(mut self) -> End {
        let mut status = None;
        wait_for("the guest to end", || {
            status = self.unshare.try_wait().unwrap();
            status.is_some()
        });
        match status.unwrap().signal() {
            Some(libc::SIGHUP) => End::Restart,
            Some(libc::SIGINT) => End::PowerOff,
            _ => panic!("{status:?}"),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    Restart,
    PowerOff,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

fn mounts(guest: &Guest) -> Vec<(String, String, String)> {
    let table = guest.says("cat /proc/mounts");
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(1).map(str::to_owned);
        (fields.next().unwrap(), fields.next().unwrap(), fields.next().unwrap())
    };
    table.lines().map(mount).collect()
}

#[test]
fn a_plain_boot_has_everything_a_program_expects() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot("");
    assert_eq!(guest.problems(), [""; 0]);
    assert_eq!(guest.connect().agent().role, Role::Init);
    let mounts = mounts(&guest);
    for (path, kind) in [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev", "devtmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/run", "tmpfs"),
        ("/tmp", "tmpfs"),
        ("/sys/fs/cgroup", "cgroup2"),
    ] {
        let found: Vec<_> = mounts.iter().filter(|m| m.0 == path).collect();
        assert!(matches!(found[..], [m] if m.1 == kind), "{path}: {found:?}");
    }
    assert_eq!(fs::metadata(guest.path("/tmp")).unwrap().permissions().mode() & 0o7777, 0o1777);
    assert_eq!(guest.says("cat /proc/sys/kernel/hostname"), "from-the-image");
    assert_eq!(guest.says("ls -l /dev/fd | cat > /dev/stderr; echo ok > /dev/stdout"), "ok");
    assert!(guest.ip("addr show lo").contains("127.0.0.1/8"));
    assert!(guest.says("touch /file 2>&1 || :").contains("Read-only"));
    let health = guest.connect().health().unwrap();
    let phases: Vec<&str> = health.boot.iter().map(|phase| phase.phase.as_str()).collect();
    assert_eq!(phases, ["init", "mounts", "network", "ready"]);
    assert!(health.boot.is_sorted_by_key(|phase| phase.at_us));
    assert_eq!(health.hostname, "from-the-image");

    // A terminal, on the guest's own devpts.
    let output = guest.connect().output(&on_tty(sh("tty; stty size")), b"").unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "/dev/pts/0\r\n24 80\r\n");
}

#[test]
fn what_cannot_be_done_is_reported_and_the_boot_goes_on() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot(
        "pulau.overlay=/dev/no-such-disk pulau.ip=dev=nope0,10.0.0.2/24 pulau.nonsense=1 pulau.init=/no/such/init",
    );
    let problems = guest.problems();
    for expected in [
        "kernel command line: pulau.nonsense=1: no such option",
        "overlay: /dev/no-such-disk did not appear",
        "network: interface nope0: ",
        "pulau.init=/no/such/init: No such file",
    ] {
        assert!(problems.iter().any(|p| p.contains(expected)), "{expected} is not in {problems:?}");
    }
    assert_eq!(problems.len(), 4, "{problems:?}");
    assert!(guest.says("touch /file 2>&1 || :").contains("Read-only"), "still on the image");
}

#[test]
fn the_network_is_set_up_at_boot_and_anew_later() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot(
        "pulau.hostname=web-1 pulau.ip=10.1.2.3/24,fd00::2/64,gw=10.1.2.1,gw=fd00::1,dns=9.9.9.9,search=a.example,mtu=1400",
    );
    assert_eq!(guest.problems(), [""; 0]);
    assert_eq!(guest.says("cat /proc/sys/kernel/hostname"), "web-1");
    let addresses = guest.ip("addr show eth0");
    for expected in
        ["UP", "mtu 1400", "inet 10.1.2.3/24 brd 10.1.2.255 scope global", "inet6 fd00::2/64 scope global"]
    {
        assert!(addresses.contains(expected), "{expected} is not in {addresses}");
    }
    assert!(guest.ip("route").contains("default via 10.1.2.1 dev eth0"));
    assert!(guest.ip("-6 route").contains("default via fd00::1 dev eth0"));
    // The root cannot be written, so the file is bound over the image's.
    assert_eq!(guest.says("cat /etc/resolv.conf"), "search a.example\nnameserver 9.9.9.9");

    // As a restored guest is told: other address, other gateway, none of IPv6, other hardware address.
    let mut connection = guest.connect();
    let config = "10.9.0.7/32,gw=10.9.0.1,dns=1.1.1.1,mac=06:00:ac:10:00:02".parse().unwrap();
    for _ in 0..2 {
        connection.configure_network(&config).unwrap();
    }
    let addresses = guest.ip("addr show eth0");
    assert!(addresses.contains("inet 10.9.0.7/32 scope global"), "{addresses}");
    assert!(addresses.contains("06:00:ac:10:00:02"), "{addresses}");
    assert!(!addresses.contains("10.1.2.3") && !addresses.contains("fd00::2"), "{addresses}");
    let routes = guest.ip("route");
    assert_eq!(routes.lines().count(), 1, "{routes}");
    assert!(routes.starts_with("default via 10.9.0.1 dev eth0 proto static onlink"), "{routes}");
    assert!(!guest.ip("-6 route").contains("default"), "{}", guest.ip("-6 route"));
    assert_eq!(guest.says("cat /etc/resolv.conf"), "nameserver 1.1.1.1");
    assert_eq!(mounts(&guest).iter().filter(|m| m.0 == "/etc/resolv.conf").count(), 1, "bound once");
}

#[test]
fn a_layer_in_memory_makes_the_root_writable() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot("pulau.overlay=tmpfs pulau.ip=10.1.2.3/24,dns=9.9.9.9");
    assert_eq!(guest.problems(), [""; 0]);
    assert_eq!(guest.says("echo new > /etc/hostname; touch /bin/x /file; cat /etc/hostname"), "new");
    assert_eq!(guest.says("cat /etc/resolv.conf"), "nameserver 9.9.9.9");
    let mounts = mounts(&guest);
    assert!(matches!(&mounts.iter().find(|m| m.0 == "/").unwrap().1[..], "overlay"), "{mounts:?}");
    for path in ["/proc", "/dev", "/sys", "/run", "/tmp"] {
        assert_eq!(mounts.iter().filter(|m| m.0 == path).count(), 1, "{path}: {mounts:?}");
    }
    assert_eq!(guest.shut_down(ShutdownAction::Reboot, None), End::Restart);
}

#[test]
fn a_layer_on_a_disk_keeps_what_is_written_and_is_left_clean() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("layer.img");
    fs::File::create(&image).unwrap().set_len(32 << 20).unwrap();
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let image = image.to_str().unwrap();
    run("mkfs.ext4", &["-q", image]);
    struct Loop(String);
    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["-d", &self.0]).status();
        }
    }
    let device = Loop(run("losetup", &["-f", "--show", image]).trim().to_owned());
    let cmdline = format!("pulau.overlay={}", device.0);

    let guest = Guest::boot(&cmdline);
    assert_eq!(guest.problems(), [""; 0]);
    guest.says("echo kept > /etc/kept; : > /etc/passwd; cat /etc/kept");
    assert_eq!(guest.shut_down(ShutdownAction::PowerOff, None), End::PowerOff);
    let state = run("dumpe2fs", &["-h", image]);
    assert!(state.contains("Filesystem state:         clean"), "{state}");
    assert!(!state.contains("needs_recovery"), "the journal was not closed: {state}");

    let guest = Guest::boot(&cmdline);
    assert_eq!(guest.problems(), [""; 0]);
    assert_eq!(guest.says("cat /etc/kept /etc/passwd"), "kept");
    assert_eq!(guest.shut_down(ShutdownAction::PowerOff, None), End::PowerOff);
}

#[test]
fn a_disk_that_is_not_formatted_is_reported_and_the_root_stays() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot("pulau.overlay=/dev/null");
    let problems = guest.problems();
    assert!(
        matches!(&problems[..], [p] if p.starts_with("overlay: mount /dev/null as ext4: ")),
        "{problems:?}"
    );
    assert!(guest.says("touch /file 2>&1 || :").contains("Read-only"));
}

#[test]
fn orphans_are_reaped_and_execs_keep_their_status() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot("");
    // Orphans end all the time while execs come and go.
    for n in 0..40 {
        let script = format!("(sleep 0.0{}; exit 1) & (exit 2) & exit {n}", n % 10);
        let output = guest.connect().output(&sh(&script), b"").unwrap();
        assert_eq!(output.status, ExitStatus::Code(n));
    }
    // In the guest: PID 1, the serving process, and nothing dead.
    wait_for("the orphans to be reaped", || {
        // One or another of them may end while they are listed.
        let list = guest.says("cat /proc/[0-9]*/stat 2>/dev/null || :");
        !list.contains(") Z ") && !list.contains("(sleep)")
    });
}

#[test]
fn the_serving_process_comes_back() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot("");
    let serving = guest.says("read a b c ppid rest < /proc/self/stat; echo $ppid; cat /proc/$PPID/stat");
    let pid = serving.lines().nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let _ = guest.connect().output(&argv(["/bin/sh", "-c", &format!("kill -9 {pid}")]), b"");
    wait_for("the agent to answer again", || {
        UnixStream::connect(guest.path("/run/agent.sock"))
            .ok()
            .and_then(|stream| Connection::new(stream, Some(soon())).ok())
            .is_some()
    });
    assert!(exists(guest.init));
    assert_ne!(guest.says("echo $PPID"), pid);
}

#[test]
fn processes_are_asked_then_killed_and_hosts_hear_of_it() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot("");
    let start = |script: &str| {
        let mut exec = guest.connect().exec(&sh(script)).unwrap();
        assert_eq!(exec.output.next_event().unwrap(), OutputEvent::Stdout(b"up\n"));
        exec
    };
    let mut obeys = start("trap 'echo asked; exit 5' TERM; echo up; while :; do sleep 0.02; done");
    let mut deaf = start("trap '' TERM; echo up; while :; do sleep 0.02; done");
    // An interactive shell at a terminal does not heed SIGTERM, but the hang-up.
    let mut shell = guest.connect().exec(&on_tty(argv(["sh", "-i"]))).unwrap();
    shell.output.next_event().unwrap();

    let begun = Instant::now();
    guest.connect().shutdown(Shutdown { action: ShutdownAction::PowerOff, grace_ms: Some(700) }).unwrap();
    let mut asked = Vec::new();
    assert_eq!(obeys.output.copy_to(&mut asked, &mut std::io::sink()).unwrap(), ExitStatus::Code(5));
    assert_eq!(asked, b"asked\n");
    shell.output.copy_to(&mut std::io::sink(), &mut std::io::sink()).unwrap();
    assert!(begun.elapsed() < Duration::from_millis(650), "{:?}", begun.elapsed());
    // Killed with everything else: its host may hear of it, or see the connection end.
    if let Ok(status) = deaf.output.copy_to(&mut std::io::sink(), &mut std::io::sink()) {
        assert_eq!(status, ExitStatus::Signal(9));
    }
    assert_eq!(guest.wait(), End::PowerOff);
    assert!(begun.elapsed() >= Duration::from_millis(700), "{:?}", begun.elapsed());
}

#[test]
fn an_idle_guest_ends_at_once() {
    if !is_root() {
        return;
    }
    // Long before the grace is over: there is nobody to wait for. (Most of the time is sync(2)'s, which is
    // for all of this machine's disks.)
    let guest = Guest::boot("");
    let begun = Instant::now();
    assert_eq!(guest.shut_down(ShutdownAction::Reboot, Some(120_000)), End::Restart);
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
}

/// As BusyBox's commands send them, and as the kernel does for control-alt-delete.
#[test]
fn signals_end_the_guest() {
    if !is_root() {
        return;
    }
    for (signal, end) in [("INT", End::Restart), ("USR2", End::PowerOff)] {
        let guest = Guest::boot("");
        let _ = guest.connect().output(&sh(&format!("kill -{signal} 1; sleep 5")), b"");
        assert_eq!(guest.wait(), end, "{signal}");
    }
}

#[test]
fn files_copied_in_are_on_the_layer() {
    if !is_root() {
        return;
    }
    let guest = Guest::boot("pulau.overlay=tmpfs");
    let wanted =
        CopyIn { path: "/srv/new/app".into(), size: 3, mode: 0o755, owner: None, parents: true, sync: true };
    guest.connect().copy_in(&wanted, &b"hi\n"[..]).unwrap();
    assert_eq!(guest.says("cat /srv/new/app"), "hi");
}

/// A script is PID 1 after the set-up, and runs the agent as its service.
#[test]
fn another_init_takes_over_after_the_set_up() {
    if !is_root() {
        return;
    }
    const OTHER: &str = "#!/bin/sh\n/sbin/init --service --listen unix:/run/agent.sock &\n\
        while :; do sleep 1; done\n";
    let guest = Guest::boot_with("pulau.overlay=tmpfs pulau.hostname=db-1 pulau.init=/sbin/other", |root| {
        fs::write(root.join("sbin/other"), OTHER).unwrap();
        fs::set_permissions(root.join("sbin/other"), fs::Permissions::from_mode(0o755)).unwrap();
    });
    assert_eq!(guest.connect().agent().role, Role::Service);
    assert_eq!(guest.says("cat /proc/1/comm; cat /proc/sys/kernel/hostname; touch /file"), "other\ndb-1");
    assert!(guest.says("cat /proc/1/status").contains("SigBlk:\t0000000000000000"));
    // It has no commands to end it by.
    let mut connection = guest.connect();
    let error =
        connection.shutdown(Shutdown { action: ShutdownAction::PowerOff, grace_ms: None }).unwrap_err();
    assert!(error.to_string().contains("the guest has no /sbin/poweroff"), "{error}");
    connection.health().unwrap();
}

/// `auto` is systemd where it runs the agent, and the agent itself anywhere else.
#[test]
fn an_image_with_an_init_of_its_own_gets_it_only_if_the_agent_is_its_service() {
    if !is_root() {
        return;
    }
    const OTHER: &str = "#!/bin/sh\n/sbin/init --service --listen unix:/run/agent.sock &\n\
        while :; do sleep 1; done\n";
    let systemd = |root: &Path| {
        fs::create_dir_all(root.join("lib/systemd")).unwrap();
        fs::write(root.join("lib/systemd/systemd"), OTHER).unwrap();
        fs::set_permissions(root.join("lib/systemd/systemd"), fs::Permissions::from_mode(0o755)).unwrap();
    };
    let alone = Guest::boot_with("pulau.init=auto", systemd);
    assert_eq!(alone.connect().agent().role, Role::Init);
    assert_eq!(alone.problems(), [""; 0]);
    let both = Guest::boot_with("pulau.init=auto", |root| {
        systemd(root);
        fs::create_dir_all(root.join("usr/lib/systemd/system")).unwrap();
        fs::write(root.join("usr/lib/systemd/system/pulau-agent.service"), "").unwrap();
    });
    assert_eq!(both.connect().agent().role, Role::Service);
}

#[test]
fn the_first_boot_of_an_instance_runs_what_is_there_for_it() {
    if !is_root() {
        return;
    }
    let with = |cmdline: &str, known: &str, script: &str| {
        Guest::boot_with(&format!("pulau.overlay=tmpfs {cmdline}"), |root| {
            fs::create_dir_all(root.join("usr/lib/pulau")).unwrap();
            fs::create_dir_all(root.join("var/lib/pulau")).unwrap();
            fs::write(root.join("var/lib/pulau/instance"), known).unwrap();
            let program = root.join("usr/lib/pulau/first-boot");
            fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        })
    };
    let runs = "echo ran for $1 >/ran";
    let look = "cat /ran /var/lib/pulau/instance 2>/dev/null || :";
    let new = with("pulau.instance=i-2", "i-1", runs);
    assert_eq!(new.says(look), "ran for i-2\ni-2");
    assert_eq!(with("pulau.instance=i-1", "i-1", runs).says(look), "i-1");
    assert_eq!(with("", "i-1", runs).says(look), "i-1");
    let fails = with("pulau.instance=i-2", "i-1", "echo no such luck >&2; exit 3");
    assert_eq!(fails.problems(), ["first boot: /usr/lib/pulau/first-boot: exit status: 3: no such luck"]);
    assert_eq!(fails.says(look), "i-1", "it is tried again");
}

#[test]
fn the_agent_does_not_take_over_from_itself() {
    if !is_root() {
        return;
    }
    let problems = Guest::boot("pulau.init=/sbin/init").problems();
    assert_eq!(problems, ["pulau.init=/sbin/init: is the agent itself"]);
}
