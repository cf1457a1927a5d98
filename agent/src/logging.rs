//! Where the agent's own words go: the kernel log as PID 1 (so that they appear on the console in order
//! with the kernel's, and in `dmesg`), standard error as a service. A healthy boot says nothing: every
//! character on a serial console costs an exit to the VMM.

use std::fs::OpenOptions;
use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Kmsg;
struct Stderr;

/// From now on log to the kernel log.
pub fn to_kmsg() {
    set(&Kmsg);
}

/// From now on log to standard error.
pub fn to_stderr() {
    set(&Stderr);
}

fn set(logger: &'static dyn Log) {
    // Fails only if a logger is set already, which then stays.
    let _ = log::set_logger(logger);
    log::set_max_level(LevelFilter::Info);
}

impl Log for Kmsg {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // As syslog(3) numbers them; without one the kernel takes its default.
        let level = match record.level() {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
        let line = format!("<{level}>pulau-agent: {}\n", record.args());
        // Opened for each line: there are few. One write is one record; a failure has nowhere to go.
        if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
            let _ = kmsg.write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // Not `eprintln!`, which panics if standard error is closed.
        let _ = writeln!(std::io::stderr(), "pulau-agent: {}", record.args());
    }

    fn flush(&self) {}
}
