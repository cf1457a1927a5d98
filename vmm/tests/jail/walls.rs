//! What the jail must and must not let through.

use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};

use crate::cell::{Cgroups, ID, Place, Prisoner, check, expect_no_children, listing, own_mounts};
use crate::{Test, Unable};

pub const TESTS: &[Test] = &[
    ("identity", identity),
    ("a_first_process_stays_alone", first),
    ("the_vmm_can_live_in_the_jail", live),
    ("devices_open_in_the_jail", devices),
    ("the_environment_is_gone", environment),
    ("inherited_descriptors_are_gone", descriptors),
    ("attempts", attempts),
    ("the_network_namespace_is_the_one_given", network_namespace),
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

/// Every attempt gets through without a jail and is refused in one.
fn attempts() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let secret = place.file("secret").display().to_string();
    let other = place.tree("other").join("disk").display().to_string();
    let program = std::env::current_exe().unwrap();
    fs::copy(&program, tree.join("program")).unwrap();
    let inside = tree.join("program").display().to_string();
    let bystander = Bystander::new();
    let pid = bystander.0.id().to_string();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let name = format!("pulau-jail-test-{}", std::process::id());
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let mount_point = place.path("mounted");
    fs::create_dir(&mount_point).unwrap();
    let mount_point = mount_point.display().to_string();
    let node = place.path("node").display().to_string();
    let namespaces = (libc::CLONE_NEWNS | libc::CLONE_NEWPID).to_string();

    // What is attempted without a jail, and in it.
    let table: &[(&[&str], &[&str])] = &[
        (&["read", &secret], &["read", &secret]),
        (&["write", &other], &["write", &other]),
        (&["handle", &secret], &["handle", "/disk"]),
        (&["execute", &inside], &["execute", "/program"]),
        (&["execute", &inside], &["execute", &inside]),
        (&["trace", &pid], &["trace", &pid]),
        (&["signal", &pid], &["signal", &pid]),
        (&["tcp", &port], &["tcp", &port]),
        (&["abstract", &name], &["abstract", &name]),
        (&["raw-socket"], &["raw-socket"]),
        (&["mount", &mount_point], &["mount", "/run"]),
        (&["chroot"], &["chroot"]),
        (&["device", &node], &["device", "/run/node"]),
        (&["become-root"], &["become-root"]),
        (&["unshare", &namespaces], &["unshare", &namespaces]),
    ];
    for (free, jailed) in table {
        println!("  {free:?}");
        Prisoner::free().after(own_mounts).attempt(free).run().expect_through();
        let ended = Prisoner::jailed(&tree).with("net", "new").attempt(jailed).run();
        ended.expect_refused();
    }
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
