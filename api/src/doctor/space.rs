//! Room: free memory for guests, and free disk for images, volumes and snapshots.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::{Context, Finding, read};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// How much memory could be given to guests now?
pub fn memory() -> Finding {
    match read("/proc/meminfo").ok().and_then(|text| available(&text)) {
        Some(bytes) => judge_memory(bytes),
        None => Finding::degraded("cannot read /proc/meminfo", "Mount proc on /proc."),
    }
}

/// `MemAvailable` of a `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn judge_memory(bytes: u64) -> Finding {
    let detail = format!("{} available", human(bytes));
    if bytes < 192 * MIB {
        Finding::missing(format!("{detail}: too little for a microVM"), "Stop other programs or add memory.")
    } else if bytes < GIB {
        Finding::degraded(
            format!("{detail}: room for a few small microVMs"),
            "Stop other programs or add memory.",
        )
    } else {
        Finding::ok(detail)
    }
}

/// How much could be written to the data directory?
pub fn disk(context: &Context) -> Finding {
    let wanted = &context.data_dir;
    // The directory is made on first use; until then its nearest existing parent tells the file system.
    let existing = wanted.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match statvfs(existing) {
        Ok(fs) => {
            let free = fs.blocks_available().saturating_mul(fs.fragment_size());
            let read_only = fs.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY);
            judge_disk(wanted, free, read_only)
        }
        Err(e) => Finding::missing(
            format!("cannot look at {}: {e}", existing.display()),
            "Choose another place with --data-dir.",
        ),
    }
}

fn judge_disk(data_dir: &Path, free: u64, read_only: bool) -> Finding {
    let detail = format!("{} free for {}", human(free), data_dir.display());
    let remedy = "Free some, or choose another place with --data-dir.";
    if read_only {
        Finding::missing(format!("{} is on a read-only file system", data_dir.display()), remedy)
    } else if free < GIB {
        Finding::missing(detail, remedy)
    } else if free < 10 * GIB {
        Finding::degraded(format!("{detail}: soon full with images and snapshots"), remedy)
    } else {
        Finding::ok(detail)
    }
}

fn human(bytes: u64) -> String {
    if bytes < 10 * GIB { format!("{} MiB", bytes / MIB) } else { format!("{} GiB", bytes / GIB) }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn reads_available_memory() {
        let text = "MemTotal:       24684000 kB\nMemFree:  1 kB\nMemAvailable:   24269404 kB\n";
        assert_eq!(available(text), Some(24_269_404 * 1024));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        assert_eq!(available("MemAvailable: 99999999999999999999 kB\n"), None);
    }

    #[test]
    fn judges_room() {
        assert_eq!(judge_memory(4 * GIB).state, State::Ok);
        assert_eq!(judge_memory(500 * MIB).state, State::Degraded);
        assert_eq!(judge_memory(100 * MIB).state, State::Missing);
        let disk = |free, read_only| judge_disk(Path::new("/d"), free, read_only).state;
        assert_eq!(disk(50 * GIB, false), State::Ok);
        assert_eq!(disk(5 * GIB, false), State::Degraded);
        assert_eq!(disk(5 * MIB, false), State::Missing);
        assert_eq!(disk(50 * GIB, true), State::Missing);
    }

    #[test]
    fn a_data_directory_that_is_not_there_yet_is_measured_at_its_parent() {
        let here = tempfile::tempdir().unwrap();
        let context = |dir| Context { data_dir: dir, probe_binary: "/bin/true".into() };
        let there = disk(&context(here.path().join("not/yet")));
        assert!(there.detail.contains("not/yet"), "{there:?}");
        assert!(there.detail.contains("free"));
    }
}
