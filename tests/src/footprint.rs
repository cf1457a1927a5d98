//! What a host has that a microVM may leave behind: processes, network interfaces, cgroups, mounts, files.

use std::collections::BTreeSet;
use std::path::Path;

/// Everything counted at one moment; two of them compare.
#[derive(Debug, PartialEq, Eq)]
pub struct Footprint(BTreeSet<String>);

impl Footprint {
    /// Takes stock of the host and of the files below `dirs`.
    pub fn take(dirs: &[&Path]) -> Self {
        let mut all = BTreeSet::new();
        for name in names(Path::new("/proc")) {
            let command = std::fs::read_to_string(format!("/proc/{name}/comm")).unwrap_or_default();
            if command.starts_with("pulau") {
                all.insert(format!("process {name} {}", command.trim()));
            }
        }
        all.extend(names(Path::new("/sys/class/net")).into_iter().map(|n| format!("interface {n}")));
        tree(Path::new("/sys/fs/cgroup"), "cgroup", true, &mut all);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        all.extend(mounts.lines().map(|l| format!("mount {l}")));
        for dir in dirs {
            tree(dir, "file", false, &mut all);
        }
        Self(all)
    }

    /// What is here now that was not there `before`.
    pub fn left_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn tree(dir: &Path, kind: &str, only_dirs: bool, all: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        if is_dir || !only_dirs {
            all.insert(format!("{kind} {}", entry.path().display()));
        }
        if is_dir {
            tree(&entry.path(), kind, only_dirs, all);
        }
    }
}

/// Open descriptors of process `pid`.
pub fn descriptors(pid: u32) -> usize {
    names(Path::new(&format!("/proc/{pid}/fd"))).len()
}
