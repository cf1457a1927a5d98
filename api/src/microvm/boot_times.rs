//! When each step of a microVM's start was done.

use std::path::Path;
use std::time::Duration;

use serde::{Serialize, Serializer};

/// Times since the VMM process was about to be spawned, except where said. Serialised in microseconds, with
/// `_us` added to each name; null where the step has not been done or not been seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BootTimes {
    /// The VMM has answered on its control API.
    #[serde(rename = "api_ready_us", serialize_with = "micros")]
    pub api_ready: Option<Duration>,
    /// Everything has been configured; the request to boot is about to be sent.
    #[serde(rename = "configured_us", serialize_with = "micros")]
    pub configured: Option<Duration>,
    /// The VMM has answered the request to boot; the vCPUs run.
    #[serde(rename = "started_us", serialize_with = "micros")]
    pub started: Option<Duration>,
    /// The agent in the guest has answered its hello.
    #[serde(rename = "agent_us", serialize_with = "micros")]
    pub agent: Option<Duration>,
    /// From the VMM's receipt of the request to boot to the guest's init, by the VMM's boot timer.
    #[serde(rename = "guest_init_us", serialize_with = "micros")]
    pub guest_init: Option<Duration>,
}

fn micros<S: Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    time.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)).serialize(serializer)
}

/// The boot timer's figure in a VMM's log, if the guest's init has written to it.
pub fn guest_init_in_log(log: &Path) -> Option<Duration> {
    super::tail::last_lines(log, usize::MAX).iter().rev().find_map(|line| parse_boot_timer(line))
}

/// Reads `… Guest-boot-time = 131000 us 131 ms, …`.
fn parse_boot_timer(line: &str) -> Option<Duration> {
    let figure = line.split_once("Guest-boot-time =")?.1.trim_start();
    let (micros, _) = figure.split_once(" us")?;
    Some(Duration::from_micros(micros.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_boot_timer_among_other_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = "2026-01-01T00:00:00 [a:main] Running\n\
                   2026-01-01T00:00:00 [a:vcpu0] Guest-boot-time = 131042 us 131 ms,  99000 CPU us 99 CPU ms\n\
                   2026-01-01T00:00:01 [a:main] more\n";
        std::fs::write(file.path(), log).unwrap();
        assert_eq!(guest_init_in_log(file.path()), Some(Duration::from_micros(131_042)));
        std::fs::write(file.path(), "Guest-boot-time = soon us\n").unwrap();
        assert_eq!(guest_init_in_log(file.path()), None);
    }

    #[test]
    fn what_has_not_been_seen_is_null() {
        let times = BootTimes { api_ready: Some(Duration::from_millis(6)), ..Default::default() };
        let json = serde_json::to_value(times).unwrap();
        assert_eq!(json["api_ready_us"], 6000);
        assert!(json["guest_init_us"].is_null());
    }
}
