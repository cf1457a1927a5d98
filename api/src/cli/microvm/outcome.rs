//! How a run is told: to people as text on standard error, to programs as one JSON document.

use std::fmt::Write as _;
use std::time::Duration;

use pulau_agent_protocol::message::{BootPhase, ExitStatus};
use serde::Serialize;

use super::session::Captured;
use crate::microvm::{BootTimes, Ending};

/// The document `--json` prints.
#[derive(Debug, Serialize)]
pub struct Outcome<'a> {
    pub id: &'a str,
    /// Null if no command was run.
    pub exit_code: Option<i32>,
    /// What the command wrote; bytes that are not UTF-8 are replaced.
    pub stdout: Option<String>,
    pub stderr: Option<String>,
    /// Whether the command wrote more than is told here.
    pub truncated: bool,
    pub boot_times: BootTimes,
    /// The guest's own view: when each phase was done, since its kernel started.
    pub guest_phases: &'a [BootPhase],
}

impl<'a> Outcome<'a> {
    pub fn new(
        id: &'a str,
        times: BootTimes,
        phases: &'a [BootPhase],
        command: Option<(ExitStatus, Captured)>,
    ) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Outcome {
            id,
            exit_code: command.as_ref().map(|(status, _)| status.shell_code()),
            stdout: command.as_ref().map(|(_, captured)| text(&captured.stdout)),
            stderr: command.as_ref().map(|(_, captured)| text(&captured.stderr)),
            truncated: command.is_some_and(|(_, captured)| captured.truncated),
            boot_times: times,
            guest_phases: phases,
        }
    }
}

/// The boot's phases as a small table, each with what it took and the time since the spawn.
pub fn boot_table(times: &BootTimes, phases: &[BootPhase]) -> String {
    let steps = [
        ("VMM process answers", times.api_ready),
        ("configured", times.configured),
        ("vCPUs run", times.started),
        ("agent in the guest answers", times.agent),
    ];
    let mut text = String::from("boot times                        took       since start\n");
    let mut before = Duration::ZERO;
    for (name, at) in steps {
        // Writing to a String cannot fail.
        let _ = match at {
            Some(at) => {
                let took = at.saturating_sub(before);
                before = at;
                writeln!(text, "  {name:<26}{:>10}{:>18}", millis(took), millis(at))
            }
            None => writeln!(text, "  {name:<26}{:>10}{:>18}", "-", "-"),
        };
    }
    if let Some(init) = times.guest_init {
        let _ = writeln!(text, "  boot request → guest's init: {}", millis(init));
    }
    if !phases.is_empty() {
        let list: Vec<_> = phases
            .iter()
            .map(|p| format!("{} {}", p.phase, millis(Duration::from_micros(p.at_us))))
            .collect();
        let _ = writeln!(text, "  by the guest's clock: {}", list.join(", "));
    }
    text
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// What there is to see of a microVM that ended when it should not have: the ends of console and log.
pub fn last_words(ending: &Ending) -> String {
    let mut text = String::new();
    for (title, lines) in [("its console", &ending.console), ("the VMM's log", &ending.log)] {
        if !lines.is_empty() {
            let _ = writeln!(text, "last lines of {title}:");
            for line in lines {
                let _ = writeln!(text, "  {line}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: BootTimes = BootTimes {
        api_ready: Some(Duration::from_micros(5900)),
        configured: Some(Duration::from_micros(7000)),
        started: None,
        agent: Some(Duration::from_micros(150_000)),
        guest_init: Some(Duration::from_micros(131_000)),
    };

    #[test]
    fn the_table_tells_each_step_and_its_sum() {
        let phases = [BootPhase { phase: "init".into(), at_us: 90_000 }];
        let table = boot_table(&TIMES, &phases);
        let line = |name: &str| table.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(line("configured").contains("1.1 ms") && line("configured").contains("7.0 ms"), "{table}");
        assert!(line("vCPUs run").ends_with('-'));
        assert!(line("agent in the guest").contains("143.0 ms"));
        assert!(line("guest's init").ends_with("131.0 ms"));
        assert!(line("guest's clock").ends_with("init 90.0 ms"));
    }

    #[test]
    fn the_document_tells_what_a_program_wants() {
        let captured = Captured { stdout: b"hi\xff".to_vec(), ..Default::default() };
        let outcome = Outcome::new("a", TIMES, &[], Some((ExitStatus::Signal(9), captured)));
        let json = serde_json::to_value(outcome).unwrap();
        assert_eq!(json["exit_code"], 137);
        assert_eq!(json["stdout"], "hi\u{fffd}");
        assert_eq!(json["boot_times"]["api_ready_us"], 5900);
        assert!(json["boot_times"]["started_us"].is_null());
    }
}
