//! What a microVM uses of the host.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

/// What a microVM has used since it was started (counters), and uses now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// CPU time of all its threads, guest and VMM, in microseconds.
    pub cpu_time_us: u64,
    /// Memory charged to its control group, in bytes, with the host's cache of its disks; without one, as
    /// `resident_bytes`.
    pub memory_bytes: u64,
    /// Memory of the VMM process that is in RAM, nearly all of it the guest's, in bytes.
    pub resident_bytes: u64,
    pub disk: DiskUsage,
    pub network: NetworkUsage,
}

/// What the guest did with its drives, all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskUsage {
    pub read_bytes: u64,
    pub read_operations: u64,
    pub write_bytes: u64,
    pub write_operations: u64,
}

/// What went through the guest's network interfaces, all together, seen from the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NetworkUsage {
    pub received_bytes: u64,
    pub received_packets: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
}

impl Usage {
    /// Adds what the host knows of the process and its control group.
    pub(super) fn of_host(pid: i32, cgroup: Option<&Path>) -> Self {
        let resident_bytes = resident(pid).unwrap_or_default();
        let read = |file: &str| fs::read_to_string(cgroup?.join(file)).ok();
        let cpu = read("cpu.stat").and_then(|text| cgroup_cpu(&text)).or_else(|| process_cpu(pid));
        let memory = read("memory.current").and_then(|text| text.trim().parse().ok());
        Usage {
            cpu_time_us: cpu.unwrap_or_default(),
            memory_bytes: memory.unwrap_or(resident_bytes),
            resident_bytes,
            ..Default::default()
        }
    }

    /// With what the VMM has counted (its `GET /metrics`).
    pub(super) fn with_metrics(self, metrics: &Value) -> Self {
        let count = |group: &str, field: &str| metrics[group][field].as_u64().unwrap_or_default();
        Usage {
            disk: DiskUsage {
                read_bytes: count("block", "read_bytes"),
                read_operations: count("block", "read_count"),
                write_bytes: count("block", "write_bytes"),
                write_operations: count("block", "write_count"),
            },
            network: NetworkUsage {
                received_bytes: count("net", "rx_bytes_count"),
                received_packets: count("net", "rx_packets_count"),
                sent_bytes: count("net", "tx_bytes_count"),
                sent_packets: count("net", "tx_packets_count"),
            },
            ..self
        }
    }
}

/// `usage_usec` of a `cpu.stat`.
fn cgroup_cpu(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.trim().parse().ok())
}

/// Resident memory of a process, in bytes.
fn resident(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// CPU time of a process, in microseconds.
fn process_cpu(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    cpu_in_stat(&text)
}

/// Kernel clock ticks are hundredths of a second on every Linux machine this runs on (`USER_HZ`).
const TICK_US: u64 = 10_000;

/// Fields 14 and 15 of a `/proc/<pid>/stat`. The second is a name that may hold anything but ends last at a `)`.
fn cpu_in_stat(text: &str) -> Option<u64> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    ticks()?.checked_add(ticks()?)?.checked_mul(TICK_US)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_something() {
        let usage = Usage::of_host(std::process::id() as i32, None);
        assert!(usage.resident_bytes > 100_000, "{usage:?}");
        assert_eq!(usage.memory_bytes, usage.resident_bytes);
        assert_eq!(Usage::of_host(i32::MAX, None), Usage::default());
    }

    #[test]
    fn reads_what_the_kernel_writes() {
        assert_eq!(cgroup_cpu("usage_usec 81234\nuser_usec 1\n"), Some(81234));
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 900 0 0 0 250 17 0 0 20 0 1 0 12 1 2";
        assert_eq!(cpu_in_stat(stat), Some(2_670_000));
        assert_eq!(cpu_in_stat("7 (a"), None);
    }

    #[test]
    fn what_the_vmm_does_not_tell_is_none() {
        let metrics = serde_json::json!({"block": {"read_bytes": 5, "read_count": 1}, "net": 7});
        let usage = Usage::default().with_metrics(&metrics);
        assert_eq!((usage.disk.read_bytes, usage.disk.read_operations), (5, 1));
        assert_eq!(usage.network, NetworkUsage::default());
    }
}
