//! A jail that cannot be made: the error says why, and nothing is left of the attempt.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::cell::{
    Cgroups, Ended, Place, Prisoner, check, expect_no_children, listing, own_mounts, unprivileged,
};
use crate::prisoner::NO_JAIL;
use crate::{Test, Unable};

pub const TESTS: &[Test] = &[
    ("failures_of_the_configuration", configuration),
    ("failures_of_the_tree", tree),
    ("failures_of_the_host", host),
    ("failures_of_every_system_call", system_calls),
    ("failures_of_the_cgroup", cgroup),
    ("failures_after_the_cgroup_is_made_remove_it", after_cgroup),
    ("nothing_is_left_of_a_jail_that_ended", success),
];

/// Runs a prisoner that must not get as far as its attempt, in a place that must not change.
#[track_caller]
fn fails(place: &Place, prisoner: Prisoner, message: &str) {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = (listing(&place.path("")), mounts());
    let ended: Ended = prisoner.attempt(&["nothing"]).run();
    assert_eq!(ended.started.code(), Some(NO_JAIL), "{ended:?}");
    assert!(ended.error.contains(message), "{message:?} is not in {ended:?}");
    assert_eq!(ended.error.lines().count(), 1, "{ended:?}");
    assert_eq!((listing(&place.path("")), mounts()), before);
    expect_no_children();
}

fn configuration() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let jailed = || Prisoner::jailed(&tree);
    fails(&place, jailed().with("uid", 0), "the jail's uid must be neither 0");
    fails(&place, jailed().with("gid", u32::MAX), "the jail's gid must be neither 0");
    fails(&place, jailed().with("cgroup", "vm1"), "vm1 is not an absolute path");
    fails(
        &place,
        jailed().with("resource-limit", "no-file=1099511627776"),
        "cannot set the resource limit no-file=1099511627776: Operation not permitted",
    );
    fails(&place, jailed().with("net", "/nowhere"), "network namespace /nowhere: No such file");
    let not_one = tree.join("disk").display().to_string();
    fails(&place, jailed().with("net", &not_one), &format!("network namespace {not_one}: Invalid argument"));
    fails(&place, jailed().with("tap", "nowhere"), "--tap: there is no interface nowhere on this host");
    fails(&place, jailed().with("pid-file", "/nowhere/pid"), "the pid file /nowhere/pid: No such file");
    Ok(())
}

fn tree() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let (file, link) = (place.file("file"), place.path("link"));
    symlink(&tree, &link).unwrap();
    for (root, why) in [
        (place.path("missing"), "No such file or directory"),
        (file, "not a directory"),
        (link, "not a directory"),
    ] {
        let message = format!("cannot use {} as a jail: {why}", root.display());
        fails(&place, Prisoner::jailed(&tree).with("root", root.display()), &message);
    }
    Ok(())
}

fn host() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let nobody = || unprivileged(65_534);
    fails(&place, Prisoner::jailed(&tree).after(nobody), "making a jail needs root");

    let no_devices = || {
        own_mounts()?;
        let (kind, dev) = (c"tmpfs".as_ptr(), c"/dev".as_ptr());
        // SAFETY: all are constant C strings.
        check(unsafe { libc::mount(kind, dev, kind, 0, std::ptr::null()) })
    };
    fails(&place, Prisoner::jailed(&tree).after(no_devices), "cannot open /dev/kvm: No such file");

    Ok(())
}

/// Fails every system call of the jail in turn.
fn system_calls() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let cgroups = Cgroups::new()?;
    let cgroup = cgroups.path("vm");
    let with = |call| {
        let prisoner = Prisoner::jailed(&tree).with("net", "new").with("cgroup", cgroup.display());
        prisoner.after(move || failing(call))
    };
    for (call, message) in [
        (libc::SYS_close_range, "cannot close inherited file descriptors"),
        (libc::SYS_fsopen, "cannot open /dev/net/tun"),
        (libc::SYS_fsconfig, "cannot open /dev/net/tun"),
        (libc::SYS_fsmount, "cannot open /dev/net/tun"),
        (libc::SYS_mknodat, "cannot open /dev/net/tun"),
        (libc::SYS_fchownat, "cannot open /dev/net/tun"),
        (libc::SYS_open_tree, "as a jail"),
        (libc::SYS_fstatfs, "cannot use the cgroup"),
        (libc::SYS_mkdirat, "cannot use the cgroup"),
        (libc::SYS_unshare, "cannot make new namespaces"),
        (libc::SYS_mount, "make mounts private"),
        (libc::SYS_mount_setattr, "set mount attributes"),
        (libc::SYS_move_mount, "attach the tree"),
        (libc::SYS_fchdir, "enter the tree"),
        (libc::SYS_pivot_root, "pivot_root"),
        (libc::SYS_umount2, "unmount the old root"),
        (libc::SYS_chdir, "enter the root"),
        (libc::SYS_clone3, "cannot start the jailed process"),
    ] {
        fails(&place, with(call), message);
        assert_eq!(cgroups.names(), [""; 0], "{message}");
    }
    // The process is there but cannot be told of: it is ended again. Its parent, this process, reaps it.
    let before = listing(&place.path(""));
    // It would not end by itself: it may have come as far as its attempt by then.
    let ended = with(libc::SYS_renameat).attempt(&["rest"]).run();
    assert_eq!(ended.started.code(), Some(NO_JAIL), "{ended:?}");
    assert!(ended.error.contains("cannot write the pid file"), "{ended:?}");
    assert!(matches!(nix::sys::wait::wait(), Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _))));
    expect_no_children();
    assert_eq!(cgroups.names(), [""; 0]);
    assert_eq!(listing(&place.path("")), before);
    // From here on it is the jailed process that fails; what it leaves is its parent's to remove.
    for (call, message) in [
        (libc::SYS_setsid, "setsid"),
        (libc::SYS_prctl, "bounding set"),
        (libc::SYS_setgroups, "setgroups"),
        (libc::SYS_setresgid, "setresgid"),
        (libc::SYS_setresuid, "setresuid"),
        (libc::SYS_capset, "capset"),
        (libc::SYS_landlock_add_rule, "cannot apply Landlock"),
        (libc::SYS_landlock_restrict_self, "cannot apply Landlock"),
    ] {
        let ended = with(call).attempt(&["nothing"]).run();
        assert!(ended.started.success(), "{ended:?}");
        assert_eq!(ended.jailed.and_then(|status| status.code()), Some(NO_JAIL), "{ended:?}");
        assert!(ended.error.contains(message), "{message:?} is not in {ended:?}");
        fs::remove_dir(&cgroup).unwrap();
        assert_eq!(listing(&place.path("")), before);
        expect_no_children();
    }
    Ok(())
}

/// Makes a system call fail with `EIO` from now on, also in programs this process becomes.
fn failing(call: i64) -> io::Result<()> {
    let rules = [(call, Vec::new())].into_iter().collect();
    let (others, this) = (SeccompAction::Allow, SeccompAction::Errno(libc::EIO as u32));
    let filter = SeccompFilter::new(rules, others, this, TargetArch::x86_64).map_err(io::Error::other)?;
    let program: BpfProgram = filter.try_into().map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

fn cgroup() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let not_one = place.path("cgroup");
    let jailed = |path: &std::path::Path| Prisoner::jailed(&tree).with("cgroup", path.display());
    fails(&place, jailed(&not_one), &format!("{} is not in a cgroup v2", not_one.display()));
    let cgroups = Cgroups::new()?;
    let missing = cgroups.path("missing/vm");
    fails(&place, jailed(&missing), &format!("the cgroup {}: No such file", missing.display()));
    let cgroup = cgroups.path("vm");
    for (limit, message) in [
        ("memory.nonsense=1", format!("cgroup {} has no memory.nonsense", cgroup.display())),
        ("cpu.max=1", format!("cgroup {} has no cpu.max", cgroup.display())),
    ] {
        fails(&place, jailed(&cgroup).with("cgroup-limit", limit), &message);
        assert_eq!(cgroups.names(), [""; 0]);
    }
    cgroups.need("memory")?;
    let message = format!("cgroup {} does not take memory.max=much: Invalid argument", cgroup.display());
    fails(&place, jailed(&cgroup).with("cgroup-limit", "memory.max=much"), &message);
    assert_eq!(cgroups.names(), [""; 0]);
    Ok(())
}

fn after_cgroup() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let cgroups = Cgroups::new()?;
    let cgroup = cgroups.path("vm");
    let jailed = || Prisoner::jailed(&tree).with("cgroup", cgroup.display());
    fails(&place, jailed().with("resource-limit", "no-file=1099511627776"), "no-file");
    assert_eq!(cgroups.names(), [""; 0]);
    let not_one = tree.join("disk").display().to_string();
    fails(&place, jailed().with("net", &not_one), "Invalid argument");
    assert_eq!(cgroups.names(), [""; 0]);
    // A new cgroup below a threaded one can hold no process: the very last step fails.
    let threaded = cgroups.path("threaded");
    fs::create_dir(&threaded).unwrap();
    fs::write(threaded.join("cgroup.type"), "threaded").unwrap();
    let invalid = threaded.join("vm");
    fails(
        &place,
        jailed().with("cgroup", invalid.display()),
        "cannot start the jailed process: Operation not",
    );
    assert!(!invalid.exists());
    Ok(())
}

/// The tree is as before and the host has no mount more; what is left are the cgroup and the pid file,
/// which are the caller's.
fn success() -> Result<(), Unable> {
    let place = Place::new();
    let tree = place.tree("vm");
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = (listing(&tree), mounts());
    for net in ["new", "/proc/self/ns/net"] {
        Prisoner::jailed(&tree).with("net", net).attempt(&["live"]).run().expect_through();
    }
    if let Ok(cgroups) = Cgroups::new() {
        let cgroup = cgroups.path("vm");
        Prisoner::jailed(&tree).with("cgroup", cgroup.display()).attempt(&["live"]).run().expect_through();
        assert_eq!(cgroups.names(), ["vm"]);
        // Empty: the kernel removes no cgroup that has a process.
        fs::remove_dir(&cgroup).unwrap();
    }
    assert_eq!((listing(&tree), mounts()), before);
    expect_no_children();
    Ok(())
}
