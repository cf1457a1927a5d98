//! Homes made, kept apart, removed and swept.

use std::process::{Command, Stdio};

use super::*;

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn two_homes_of_one_name_do_not_exist() {
    let run = tempfile::tempdir().unwrap();
    let home = Home::create(run.path(), "a", false).unwrap();
    let again = Home::create(run.path(), "a", false).unwrap_err();
    assert!(again.to_string().contains("already a microVM named a"), "{again}");
    home.remove().unwrap();
    Home::create(run.path(), "a", false).unwrap();
}

#[test]
fn removing_leaves_nothing() {
    let run = tempfile::tempdir().unwrap();
    let home = Home::create(run.path(), "a", false).unwrap();
    fs::write(home.socket("api.sock"), "").unwrap();
    home.remove().unwrap();
    let left: Vec<_> = fs::read_dir(run.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"]);
}

#[test]
fn sweeping_takes_what_nobody_drives() {
    let run = tempfile::tempdir().unwrap();
    let _driven = Home::create(run.path(), "driven", false).unwrap();
    drop(Home::create(run.path(), "left", false).unwrap());
    assert_eq!(sweep(run.path()).unwrap(), ["left"]);
    assert!(run.path().join("driven/root/run").exists());
    assert!(!run.path().join("left").exists());
    assert!(sweep(&run.path().join("never/made")).unwrap().is_empty());
}

#[test]
fn sweeping_ends_the_vmm_that_still_runs_and_no_other_process() {
    let run = tempfile::tempdir().unwrap();
    let left = |id: &str| {
        let home = Home::create(run.path(), id, false).unwrap();
        (home.pid_file(), home.socket("api.sock"))
    };
    let sleep = |argument: &Path| {
        let script =
            Command::new("sh").args(["-c", "sleep 60; :"]).arg(argument).stdin(Stdio::null()).spawn();
        script.unwrap()
    };
    let (pid_file, socket) = left("mine");
    let mut mine = sleep(&socket);
    fs::write(pid_file, mine.id().to_string()).unwrap();
    let (pid_file, _) = left("reused");
    let mut other = sleep(Path::new("/unrelated"));
    fs::write(pid_file, other.id().to_string()).unwrap();

    let mut swept = sweep(run.path()).unwrap();
    swept.sort();
    assert_eq!(swept, ["mine", "reused"]);
    assert!(!mine.wait().unwrap().success(), "the VMM was killed");
    assert!(other.try_wait().unwrap().is_none(), "a process that only has the number was left alone");
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn each_jail_has_a_user_of_its_own_and_loans_are_returned() {
    if !is_root() {
        return; // Giving files away takes root; the checks in the test host run as root.
    }
    let run = tempfile::tempdir().unwrap();
    let disk = tempfile::NamedTempFile::new().unwrap();
    let owner = || fs::metadata(disk.path()).unwrap().uid();
    let before = owner();
    let (a, b) = (Home::create(run.path(), "a", true).unwrap(), Home::create(run.path(), "b", true).unwrap());
    assert_ne!(a.jail_user(), b.jail_user());
    a.borrow(disk.path()).unwrap();
    assert_eq!(Some(owner()), a.jail_user());
    drop(a); // As when the program is killed.
    assert_eq!(sweep(run.path()).unwrap(), ["a"]);
    assert_eq!(owner(), before);
    let c = Home::create(run.path(), "c", true).unwrap();
    assert_eq!(c.jail_user(), Some(JAIL_USERS.start), "a user is used again once its home is gone");
}
