//! What a VMM process is doing, for the report of a test that gave up on it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Each thread's name, state and place in the kernel; and what KVM counted for each vCPU within half a second:
/// whether a guest that does not answer runs, waits, or is not let in at all. Needs root for most of it; what
/// cannot be read is left out.
pub fn describe(pid: u32) -> String {
    let mut text = String::new();
    let mut tasks = entries(&PathBuf::from(format!("/proc/{pid}/task")));
    tasks.sort();
    for task in tasks {
        let read = |name| fs::read_to_string(task.join(name)).unwrap_or_default();
        let stat = read("stat");
        // proc(5): the state is the first field after the name, which stands in parentheses.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or("gone");
        let _ = writeln!(
            text,
            "thread {:?}: state {state}, syscall {}",
            read("comm").trim(),
            read("syscall").trim()
        );
        for line in read("stack").lines() {
            let _ = writeln!(text, "    {line}");
        }
    }
    let before = kvm_counters(pid);
    std::thread::sleep(Duration::from_millis(500));
    for (name, now) in kvm_counters(pid) {
        let was = before.get(&name).copied().unwrap_or(0);
        if now != was || name.ends_with("guest_mode") {
            let _ = writeln!(text, "KVM: {name}: {was}, then {now}");
        }
    }
    text
}

/// KVM's counters in debugfs, `vcpu0/exits` and the like, each a number.
fn kvm_counters(pid: u32) -> BTreeMap<String, i64> {
    let mut counters = BTreeMap::new();
    for vm in entries(Path::new("/sys/kernel/debug/kvm")) {
        let of_pid = vm.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&format!("{pid}-")));
        for vcpu in if of_pid { entries(&vm) } else { vec![] } {
            for file in entries(&vcpu) {
                let value = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse().ok());
                if let (Some(value), Ok(name)) = (value, file.strip_prefix(&vm)) {
                    counters.insert(name.display().to_string(), value);
                }
            }
        }
    }
    counters
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
