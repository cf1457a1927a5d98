//! What a host must offer before it can run microVMs, each requirement checked by using it.
//!
//! One file per check. A check reads or briefly uses one facility of the host, puts back whatever it
//! touched, and returns a [`Finding`]: how it stands, what was seen, and what to do about it. The part
//! that reads is kept apart from the part that judges, so that judging is tested on text.
//!
//! Checks never change the host (no module is loaded on purpose, no setting written) and never hang:
//! the one that runs a guest does so in a child process with a deadline.

mod cgroup;
mod huge_pages;
mod io_uring;
mod kernel;
mod kvm;
mod kvm_guest;
mod landlock;
mod limits;
mod namespaces;
mod nftables;
mod privileges;
mod report;
mod seccomp;
mod space;
mod tap;
mod userfaultfd;
mod vmm;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use kvm_guest::probe as probe_kvm_in_this_process;
pub use report::Report;

/// How one requirement stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing to do.
    Ok,
    /// MicroVMs run, with less: slower, or without one feature the detail names.
    Degraded,
    /// MicroVMs cannot be run as they should be until this is mended.
    Missing,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub state: State,
    /// What was seen, in one line.
    pub detail: String,
    /// What a person can do about it. Present unless the state is [`State::Ok`].
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(detail: impl Into<String>) -> Self {
        Finding { state: State::Ok, detail: detail.into(), remedy: None }
    }

    fn degraded(detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { state: State::Degraded, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    fn missing(detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { state: State::Missing, detail: detail.into(), remedy: Some(remedy.into()) }
    }
}

/// What the checks need to know about how they were called.
#[derive(Clone, Debug)]
pub struct Context {
    /// Where Pulau keeps, or will keep, its data. Need not exist.
    pub data_dir: PathBuf,
    /// A `pulau` binary that answers `doctor --run-kvm-probe`, normally the running one.
    pub probe_binary: PathBuf,
}

/// One line of the report.
#[derive(Clone, Copy)]
pub struct Check {
    /// The stable name, as in `--check NAME` and in the JSON report.
    pub name: &'static str,
    /// What it is, for people.
    pub title: &'static str,
    run: fn(&Context) -> Finding,
}

/// Every check, in the order they are reported.
pub const CHECKS: &[Check] = &[
    Check { name: "kvm", title: "KVM device", run: |_| kvm::device() },
    Check { name: "kvm-real", title: "KVM runs guests at full speed", run: kvm::real },
    Check { name: "kvm-extensions", title: "KVM extensions", run: |_| kvm::extensions() },
    Check { name: "kernel", title: "Kernel version", run: |_| kernel::check() },
    Check { name: "privileges", title: "Privileges", run: |_| privileges::check() },
    Check { name: "namespaces", title: "Namespaces", run: |_| namespaces::check() },
    Check { name: "cgroup", title: "Control groups v2", run: |_| cgroup::check() },
    Check { name: "seccomp", title: "System call filters", run: |_| seccomp::check() },
    Check { name: "landlock", title: "Landlock", run: |_| landlock::check() },
    Check { name: "tap", title: "Tap devices", run: |_| tap::check() },
    Check { name: "nftables", title: "Packet filter", run: |_| nftables::check() },
    Check { name: "io-uring", title: "Asynchronous I/O", run: |_| io_uring::check() },
    Check { name: "userfaultfd", title: "Page faults in user space", run: |_| userfaultfd::check() },
    Check { name: "huge-pages", title: "Huge pages", run: |_| huge_pages::check() },
    Check { name: "limits", title: "Open files", run: |_| limits::check() },
    Check { name: "memory", title: "Free memory", run: |_| space::memory() },
    Check { name: "disk", title: "Free disk", run: space::disk },
    Check { name: "vmm", title: "pulau-vmm", run: |_| vmm::check() },
];

/// The checks `selectors` name: exactly, or by the part before a dash (`kvm` selects `kvm`, `kvm-real` and
/// `kvm-extensions`). No selector selects all.
///
/// # Errors
///
/// The first selector that names no check.
pub fn select(selectors: &[String]) -> Result<Vec<Check>, String> {
    let names = |selector: &str, check: &Check| {
        check.name == selector || check.name.strip_prefix(selector).is_some_and(|rest| rest.starts_with('-'))
    };
    if let Some(unknown) = selectors.iter().find(|s| !CHECKS.iter().any(|c| names(s, c))) {
        return Err(unknown.clone());
    }
    let wanted = |check: &&Check| selectors.is_empty() || selectors.iter().any(|s| names(s, check));
    Ok(CHECKS.iter().filter(wanted).copied().collect())
}

/// Runs `checks` one after the other. Takes well under 100 ms, a little more where KVM is not real.
pub fn examine(checks: &[Check], context: &Context) -> Report {
    Report::new(checks.iter().map(|check| (*check, (check.run)(context))))
}

/// A whole file as text, or why not.
fn read(path: impl AsRef<Path>) -> Result<String, std::io::Error> {
    std::fs::read_to_string(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(selectors: &[&str]) -> Result<Vec<&'static str>, String> {
        let owned: Vec<String> = selectors.iter().map(|s| (*s).to_owned()).collect();
        select(&owned).map(|checks| checks.iter().map(|c| c.name).collect())
    }

    #[test]
    fn selects_by_name_and_by_family() {
        assert_eq!(names(&["kvm"]).unwrap(), ["kvm", "kvm-real", "kvm-extensions"]);
        assert_eq!(names(&["kvm-real", "disk"]).unwrap(), ["kvm-real", "disk"]);
        assert_eq!(names(&[]).unwrap().len(), CHECKS.len());
    }

    #[test]
    fn refuses_a_name_that_is_only_a_beginning() {
        assert_eq!(names(&["kv"]).unwrap_err(), "kv");
        assert_eq!(names(&["disk", "tpm"]).unwrap_err(), "tpm");
    }

    #[test]
    fn names_are_unique() {
        let mut all: Vec<_> = CHECKS.iter().map(|c| c.name).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), CHECKS.len());
    }
}
