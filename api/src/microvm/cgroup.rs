//! The control group of one microVM, below a parent all of Pulau's microVMs share. The VMM makes its own as
//! it starts (see its `--cgroup`); here the parent is prepared and the group removed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// The controllers that hold a microVM to its share.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// A group whose processes are dead is empty once the kernel has buried them.
const REMOVE_WITHIN: Duration = Duration::from_secs(5);

/// The parent of microVMs' groups cannot be made.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot prepare control group {}: {source} (`pulau doctor --check cgroup` says what lacks; --no-cgroup runs \
     the microVM without limits)",
    path.display()
)]
pub struct CgroupError {
    path: PathBuf,
    source: io::Error,
}

/// Makes `parent` with the controllers its children need. Does little if that has been done before.
///
/// # Errors
///
/// There is no cgroup v2 there, it lacks a controller, or is not writable.
pub fn prepare_parent(parent: &Path) -> Result<(), CgroupError> {
    let error = |source| CgroupError { path: parent.to_owned(), source };
    if let Err(e) = fs::create_dir(parent)
        && e.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(error(e));
    }
    // Top down: a group can hand on only what it was handed.
    for group in [parent.parent(), Some(parent)].into_iter().flatten() {
        enable_controllers(group).map_err(error)?;
    }
    Ok(())
}

fn enable_controllers(group: &Path) -> io::Result<()> {
    let file = group.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&file)?;
    let wanted = missing(&enabled);
    if wanted.is_empty() { Ok(()) } else { fs::write(file, wanted) }
}

/// What to write to a `cgroup.subtree_control` that reads `enabled`.
fn missing(enabled: &str) -> String {
    let has = |name: &str| enabled.split_whitespace().any(|other| other == name);
    let lacking = CONTROLLERS.iter().filter(|name| !has(name)).map(|name| format!("+{name}"));
    lacking.collect::<Vec<_>>().join(" ")
}

/// Kills what is in the group and removes it. That it does not exist is no error. May take some seconds.
///
/// # Errors
///
/// The group is still there.
pub fn remove(group: &Path) -> io::Result<()> {
    // Before Linux 5.14 there is no such file, and then only the VMM we know has been killed.
    let _ = fs::write(group.join("cgroup.kill"), "1");
    let deadline = Instant::now() + REMOVE_WITHIN;
    loop {
        match fs::remove_dir(group) {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enables_only_what_lacks() {
        assert_eq!(missing(""), "+cpu +memory +pids");
        assert_eq!(missing("cpuset cpu io memory\n"), "+pids");
        assert_eq!(missing("cpu memory pids"), "");
    }

    #[test]
    fn a_place_that_is_no_cgroup_is_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let error = prepare_parent(&dir.path().join("pulau")).unwrap_err();
        assert!(error.to_string().contains("pulau doctor"), "{error}");
    }

    #[test]
    fn removing_what_is_not_there_succeeds() {
        remove(Path::new("/nonexistent/group")).unwrap();
    }
}
