//! How the guest is doing.

use std::fs;

use nix::sys::sysinfo::sysinfo;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gethostname;
use pulau_agent_protocol::message::{ErrorReply, Health};

use crate::agent::Agent;
use crate::refusal::Context;

/// # Errors
/// The kernel gives no figures; none in a working guest.
pub fn report(agent: &Agent) -> Result<Health, ErrorReply> {
    let info = sysinfo().context("sysinfo")?;
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).context("read the boot clock")?;
    let (one, five, fifteen) = info.load_average();
    let total = info.ram_total();
    // A kernel older than 3.14 has no such line; free memory is then the nearest there is.
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    Ok(Health {
        id: agent.id(),
        hostname: gethostname().context("get hostname")?.to_string_lossy().into_owned(),
        uptime_ms: u64::try_from(uptime.tv_sec() * 1000 + uptime.tv_nsec() / 1_000_000).unwrap_or(0),
        load: [one, five, fifteen],
        memory_total: total,
        memory_available: available.unwrap_or(info.ram_unused()),
        execs: agent.execs.get(),
        boot: agent.boot.clone(),
        problems: agent.problems.clone(),
    })
}

/// `MemAvailable:    123456 kB`
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_in_kib() {
        let text = "MemTotal:        123456 kB\nMemFree:  1 kB\nMemAvailable:      2048 kB\nBuffers: 7 kB\n";
        assert_eq!(mem_available(text), Some(2048 * 1024));
        assert_eq!(mem_available("MemTotal: 1 kB\n"), None);
        assert_eq!(mem_available("MemAvailable: 99999999999999999999 kB\n"), None);
    }
}
