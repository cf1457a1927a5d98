//! What the jail must and must not let through.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use pulau_vmm::exit::ExitCode;

use crate::cell::{Cgroups, ID, Place, Prisoner, check, expect_no_children, listing, own_mounts};
use crate::{Test, Unable};

pub const TESTS: &[Test] = &[
    ("identity", identity),
    ("a_first_process_stays_alone", first),
    ("the_vmm_can_live_in_the_jail", live),
    ("devices_open_in_the_jail", devices),
    ("the_environment_is_gone", environment),
    ("inherited_descriptors_are_gone", descriptors),
    ("attempts_get_through_without_walls", attempts_without_walls),
    ("attempts_stop_at_the_jail_alone", jail_alone),
    ("attempts_stop_at_the_filters_alone", filters_alone),
    ("attempts_stop_at_both_walls", both_walls),
    ("a_violation_ends_the_process_and_says_why", violation),
    ("the_network_namespace_is_the_one_given", network_namespace),
    ("taps_are_attached_before_their_namespace_is_left", taps),
    ("resource_limits_hold", resource_limits),
    ("a_cgroup_limits_memory", memory),
    ("a_cgroup_limits_processes", processes),
];

/// Who the process in the jail is.
fn identity() -> Result<(), Unable> {
    let place = Place::new();
    let ended = Prisoner::jailed(&place.tree("vm")).env("HELLO", "there").attempt(&["identity"]).run();
    ended.expect_through();
    let expected = format!(
        "pid 1\nthread 1\nsession 1\nuid {ID} {ID} {ID}\ngid {ID} {ID} {ID}\ngroups 0\nno_new_privs 1\n\
         dumpable 0\nbounding 0\ncapabilities 0\ncore 0\numask 77\nenvironment 0\n\
         root [\"disk\", \"run\"]\ndirectory \"/\"\n"
    );
    assert_eq!(ended.output, expected);
    assert!(ended.started.success());
    expect_no_children();
    Ok(())
}

/// A process that is the first of its namespace already is the jailed one itself.
fn first() -> Result<(), Unable> {
    let place = Place::new();
    let (tree, cgroups) = (place.tree("vm"), Cgroups::new()?);
    let cgroup = cgroups.path("vm");
    let ended = Prisoner::jailed(&tree).with("cgroup", cgroup.display()).first().attempt(&["identity"]).run();
    ended.expect_through();
    assert_eq!(ended.output.lines().next(), Some("pid 1"));
    assert_eq!(listing(&place.path("")).len(), listing(&tree).len() + 1, "a pid file is left");
    expect_no_children();
    Ok(())
}

fn live() -> Result<(), Unable> {
    let place = Place::new();
    Prisoner::jailed(&place.tree("vm")).attempt(&["live"]).run().expect_through();
    Ok(())
}

fn devices() -> Result<(), Unable> {
    let place = Place::new();
    Prisoner::free().attempt(&["devices"]).run().expect_through();
    Prisoner::jailed(&place.tree("vm")).attempt(&["devices"]).run().expect_through();
    Ok(())
}

fn environment() -> Result<(), Unable> {
    let place = Place::new();
    let secret = "hunter2-hunter2";
    let backwards: String = secret.chars().rev().collect();
    let attempt = ["environment", backwards.as_str()];
    Prisoner::free().env("TOKEN", secret).attempt(&attempt).run().expect_through();
    Prisoner::jailed(&place.tree("vm")).env("TOKEN", secret).attempt(&attempt).run().expect_refused();
    Ok(())
}

fn descriptors() -> Result<(), Unable> {
    let place = Place::new();
    // A descriptor of a directory of the host, not closed on exec.
    let leak = || {
        // SAFETY: the path is a constant C string.
        let fd = unsafe { libc::open(c"/usr/bin".as_ptr(), libc::O_RDONLY) };
        // SAFETY: takes numbers only.
        check(unsafe { libc::dup2(fd, 77) })
    };
    Prisoner::free().after(leak).attempt(&["descriptors"]).run().expect_through();
    let ended = Prisoner::jailed(&place.tree("vm")).after(leak).attempt(&["descriptors"]).run();
    ended.expect_refused();
    Ok(())
}

/// A process of the jailed user's outside the jail, ended on drop.
struct Bystander(Child);

impl Bystander {
    fn new() -> Self {
        let mut command = Command::new("/bin/sleep");
        Self(command.arg("1000").uid(ID).gid(ID).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Things on the host that a prisoner may want, and what it attempts to get them.
struct Scene {
    place: Place,
    tree: PathBuf,
    bystander: Bystander,
    tcp: TcpListener,
    name: String,
    _abstract: UnixListener,
}

/// One attempt, where there is no jail and where there is one, and which wall stops it.
struct Attempt {
    free: Vec<String>,
    jailed: Vec<String>,
    stopped_by: StoppedBy,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum StoppedBy {
    Jail,
    Filter,
    Either,
    /// Either, but the filter only once the guest runs: before, that is how the VMM works.
    Running,
}
use StoppedBy::{Either, Filter, Jail, Running};

impl Scene {
    fn new() -> Self {
        let place = Place::new();
        let tree = place.tree("vm");
        place.file("secret");
        place.tree("other");
        fs::create_dir(place.path("mounted")).unwrap();
        fs::copy(std::env::current_exe().unwrap(), tree.join("program")).unwrap();
        let name = format!("pulau-jail-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        Self {
            place,
            tree,
            bystander: Bystander::new(),
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            name,
            _abstract: UnixListener::bind_addr(&address).unwrap(),
        }
    }

    fn attempts(&self) -> Vec<Attempt> {
        let path = |name: &str| self.place.path(name).display().to_string();
        let (secret, other, program) = (&path("secret"), &path("other/disk"), &path("vm/program"));
        let pid = &self.bystander.0.id().to_string();
        let port = &self.tcp.local_addr().unwrap().port().to_string();
        let namespaces = &(libc::CLONE_NEWNS | libc::CLONE_NEWPID).to_string();
        let user_namespace = &libc::CLONE_NEWUSER.to_string();
        let both = |stopped_by, attempt: &[&str]| Attempt {
            free: attempt.iter().map(ToString::to_string).collect(),
            jailed: attempt.iter().map(ToString::to_string).collect(),
            stopped_by,
        };
        let differ = |name: &str, free: &str, jailed: &str| Attempt {
            free: vec![name.into(), free.into()],
            jailed: vec![name.into(), jailed.into()],
            stopped_by: Either,
        };
        vec![
            // Files of the host and of another microVM: a filter knows no paths.
            both(Jail, &["read", secret]),
            both(Jail, &["write", other]),
            both(Running, &["ring", secret]),
            differ("handle", secret, "/disk"),
            // Other programs: the jail has none, but could not keep one from being made in memory.
            both(Either, &["execute", program]),
            differ("execute", program, "/program"),
            Attempt { stopped_by: Filter, ..differ("execute-memory", program, "/program") },
            // Other processes.
            both(Either, &["trace", pid]),
            both(Either, &["read-memory", pid]),
            both(Either, &["signal", pid]),
            // The network and other sockets: a filter knows no addresses.
            both(Either, &["tcp", port]),
            both(Jail, &["abstract", &self.name]),
            both(Either, &["raw-socket"]),
            both(Filter, &["host-socket"]),
            // More than the process has.
            differ("mount", &path("mounted"), "/run"),
            both(Either, &["chroot"]),
            differ("device", &path("node"), "/run/node"),
            both(Either, &["become-root"]),
            both(Either, &["unshare", namespaces]),
            // Unprivileged users may have these, where they are root, if to nothing outside.
            both(Filter, &["unshare", user_namespace]),
        ]
    }

    fn free(&self, attempt: &[String]) -> Prisoner {
        Prisoner::free().after(own_mounts).attempt(attempt)
    }

    fn jailed(&self, attempt: &[String]) -> Prisoner {
        Prisoner::jailed(&self.tree).with("net", "new").attempt(attempt)
    }
}

/// Else that they are refused elsewhere would say nothing.
fn attempts_without_walls() -> Result<(), Unable> {
    let scene = Scene::new();
    scene.attempts().iter().for_each(|attempt| scene.free(&attempt.free).run().expect_through());
    Ok(())
}

fn jail_alone() -> Result<(), Unable> {
    let scene = Scene::new();
    for attempt in scene.attempts() {
        let ended = scene.jailed(&attempt.jailed).run();
        if attempt.stopped_by == Filter { ended.expect_through() } else { ended.expect_refused() }
    }
    Ok(())
}

fn filters_alone() -> Result<(), Unable> {
    let scene = Scene::new();
    for attempt in scene.attempts() {
        for filter in ["setup", "vmm"] {
            let ended = scene.free(&attempt.free).with("filter", filter).run();
            match (attempt.stopped_by, filter) {
                (Jail, _) | (Running, "setup") => ended.expect_through(),
                _ => ended.expect_violation(),
            }
        }
        // A vCPU opens nothing at all.
        scene.free(&attempt.free).with("filter", "vcpu").run().expect_violation();
    }
    Ok(())
}

fn both_walls() -> Result<(), Unable> {
    let scene = Scene::new();
    for attempt in scene.attempts() {
        for filter in ["setup", "vmm", "vcpu"] {
            let ended = scene.jailed(&attempt.jailed).with("filter", filter).run();
            if ended.status().code() != Some(i32::from(ExitCode::BadSyscall.code())) {
                ended.expect_refused();
            }
        }
    }
    Ok(())
}

/// A violation says what it was, and ends the whole process whichever thread it was in.
fn violation() -> Result<(), Unable> {
    let place = Place::new();
    let run =
        |attempt: &[&str]| Prisoner::jailed(&place.tree("vm")).with("filter", "vmm").attempt(attempt).run();
    let ended = run(&["signal", "7"]);
    ended.expect_violation();
    let number = libc::SYS_kill;
    let line = format!("pulau-vmm: made the forbidden system call {number}(0x7,0x0,0x0) in thread 1\n");
    assert_eq!(ended.error, line);
    Ok(())
}

fn network_namespace() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    Prisoner::free().attempt(&["tcp", &port]).run().expect_through();
    let jailed = |net| Prisoner::jailed(&tree).with("net", net).attempt(&["tcp", &port]).run();
    // In the host's namespace Landlock forbids it, in an empty one there is no way.
    let refused = jailed("/proc/self/ns/net");
    refused.expect_refused();
    let refused = jailed("new");
    refused.expect_refused();
    Ok(())
}

/// In the jail's own empty namespace there is the tap that was named, and no way to another one.
fn taps() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let jailed = |attempt: &[&str]| {
        let prisoner = Prisoner::jailed(&tree).after(own_network_with_taps).with("net", "new");
        prisoner.attempt(attempt)
    };
    jailed(&["tap", "jail0"]).with("tap", "jail0").run().expect_through();
    jailed(&["tap", "jail1"]).with("tap", "jail0").with("tap", "jail1").run().expect_through();
    let ended = jailed(&["tap", "jail1"]).with("tap", "jail0").run();
    ended.expect_refused();
    assert!(ended.output.contains("there is no interface jail1"), "{ended:?}");
    jailed(&["devices"]).run().expect_through();
    jailed(&["devices"]).with("tap", "jail0").run().expect_refused();
    // A filter leaves what is needed, as without a jail.
    jailed(&["tap", "jail0"]).with("tap", "jail0").with("filter", "setup").run().expect_through();
    Ok(())
}

/// Moves this process to a network namespace with taps `jail0` and `jail1`, that are root's.
fn own_network_with_taps() -> io::Result<()> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
    for name in [c"jail0", c"jail1"] {
        // SAFETY: the path is a constant C string.
        let tun = unsafe { libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        check(tun)?;
        // SAFETY: all zeroes are a valid value of this structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: the kernel reads and writes one ifreq, and takes a number; nobody else has the descriptor.
        unsafe {
            check(libc::ioctl(tun, TUNSETIFF, &raw mut request))?;
            check(libc::ioctl(tun, TUNSETPERSIST, 1))?;
            check(libc::close(tun))?;
        }
    }
    Ok(())
}

fn resource_limits() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let run = |attempt: &[&str]| {
        let prisoner = Prisoner::jailed(&tree);
        prisoner
            .with("resource-limit", "no-file=40")
            .with("resource-limit", "fsize=65536")
            .attempt(attempt)
            .run()
    };
    run(&["files", "30"]).expect_through();
    let ended = run(&["files", "50"]);
    ended.expect_refused();
    assert!(ended.output.contains("Too many open files"), "{ended:?}");
    run(&["grow", "65536"]).expect_through();
    let ended = run(&["grow", "65537"]);
    ended.expect_refused();
    assert!(ended.output.contains("File too large"), "{ended:?}");
    Ok(())
}

fn memory() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let cgroups = Cgroups::new()?;
    cgroups.need("memory")?;
    let cgroup = cgroups.path("vm");
    let run = |mib| {
        let ended = Prisoner::jailed(&tree)
            .with("cgroup", cgroup.display())
            .with("cgroup-limit", "memory.max=64M")
            .with("cgroup-limit", "memory.swap.max=0")
            .attempt(&["memory", mib])
            .run();
        fs::remove_dir(&cgroup).unwrap();
        ended
    };
    run("16").expect_through();
    let ended = run("128");
    assert_eq!(ended.status().signal(), Some(libc::SIGKILL), "{ended:?}");
    Ok(())
}

fn processes() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let cgroups = Cgroups::new()?;
    cgroups.need("pids")?;
    let cgroup = cgroups.path("vm");
    let run = |count| {
        let ended = Prisoner::jailed(&tree)
            .with("cgroup", cgroup.display())
            .with("cgroup-limit", "pids.max=8")
            .attempt(&["threads", count])
            .run();
        fs::remove_dir(&cgroup).unwrap();
        ended
    };
    run("6").expect_through();
    run("12").expect_refused();
    Ok(())
}
