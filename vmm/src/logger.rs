//! The VMM's own log: a backend of the `log` crate that writes a line per message to standard error, or
//! to the file or named pipe that `/logger` or the command line gave.
//!
//! A line looks as Firecracker's do, `2026-01-31T23:59:59.000000000 [id:thread:LEVEL:file:line] message`
//! (level and origin where asked for), save that the time is UTC. Logging never waits and never fails;
//! lines that could not be written are counted.
//!
//! Guests cause messages as often as they like, and the libraries between them and the devices log too. So of
//! warnings and errors each place in the program has ten in five seconds ([`LogLimit`]); the rest are counted,
//! and the last line says so. Free of it are the answers to the API's clients, a line for each, and what is
//! logged at the levels Debug and Trace, by which somebody asked for all there is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::config::{DEFAULT_INSTANCE_ID, LogLevel, LoggerConfig};
use crate::metrics::{METRICS, NonBlockingFile};

/// Why the log could not be configured.
#[derive(Debug, thiserror::Error)]
#[error("logger: log_path {path:?}: {error}")]
pub struct LoggerError {
    path: std::path::PathBuf,
    error: std::io::Error,
}

struct State {
    instance_id: Option<String>,
    /// Standard error if there is none.
    file: Option<NonBlockingFile>,
    module: Option<String>,
    show_level: bool,
    show_origin: bool,
    /// The line being made; kept for its memory.
    line: String,
    /// By file and line of the message.
    limits: BTreeMap<(Option<&'static str>, Option<u32>), LogLimit>,
}

/// What is logged for each of a client's requests.
const UNLIMITED: &str = "pulau_vmm::api";

impl State {
    /// Whether this message is one too many, or the last that is not.
    fn admit(&mut self, record: &Record<'_>) -> Admitted {
        let free = record.module_path().is_some_and(|path| path.starts_with(UNLIMITED));
        if free || record.level() > Level::Warn {
            return Admitted::Yes;
        }
        let place = (record.file_static(), record.line());
        self.limits.entry(place).or_insert(LogLimit::new()).admit()
    }
}

struct Logger(Mutex<State>);

static LOGGER: Logger = Logger(Mutex::new(State {
    instance_id: None,
    file: None,
    module: None,
    show_level: false,
    show_origin: false,
    line: String::new(),
    limits: BTreeMap::new(),
}));

impl Logger {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the `log` crate's messages come here, at level Info. Later calls only change the id.
pub fn init(instance_id: &str) {
    LOGGER.lock().instance_id = Some(instance_id.to_owned());
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Changes how and where is logged. With an error nothing changes.
pub fn configure(config: &LoggerConfig) -> Result<(), LoggerError> {
    let open = |path: &std::path::PathBuf| {
        NonBlockingFile::open(path).map_err(|error| LoggerError { path: path.clone(), error })
    };
    let file = config.log_path.as_ref().map(open).transpose()?;
    let mut state = LOGGER.lock();
    state.file = file.or(state.file.take());
    if let Some(file) = &state.file {
        crate::signals::report_to(file.as_raw_fd());
    }
    state.show_level = config.show_level.unwrap_or(state.show_level);
    state.show_origin = config.show_log_origin.unwrap_or(state.show_origin);
    state.module = config.module.clone().or(state.module.take());
    log::set_max_level(match config.level.unwrap_or_default() {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Error => LevelFilter::Error,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Trace => LevelFilter::Trace,
    });
    Ok(())
}

/// Whether messages go to standard error.
pub fn is_stderr() -> bool {
    LOGGER.lock().file.is_none()
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut state = self.lock();
        if let Some(module) = &state.module
            && !record.module_path().is_some_and(|path| path.starts_with(module))
        {
            return;
        }
        let admitted = state.admit(record);
        if admitted == Admitted::No {
            return;
        }
        let mut line = std::mem::take(&mut state.line);
        line.clear();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        write_line(&mut line, &state, now, record);
        if admitted == Admitted::Last {
            line.truncate(line.trim_end().len());
            line.push_str(" (for some seconds, more of these are not logged)\n");
        }
        let written = match &mut state.file {
            Some(file) => file.write_line(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
        if written.is_err() {
            METRICS.logger.missed_log_count.inc();
        }
        state.line = line;
    }

    fn flush(&self) {}
}

/// Appends the line for a message. Writing to a String does not fail.
fn write_line(line: &mut String, state: &State, now: Duration, record: &Record<'_>) {
    write_time(line, now);
    let id = state.instance_id.as_deref().unwrap_or(DEFAULT_INSTANCE_ID);
    let thread = std::thread::current();
    let _ = write!(line, " [{id}:{}", thread.name().unwrap_or("-"));
    if state.show_level {
        let _ = write!(line, ":{}", record.level());
    }
    if state.show_origin {
        let _ = write!(line, ":{}:{}", record.file().unwrap_or("?"), record.line().unwrap_or(0));
    }
    line.push_str("] ");
    let start = line.len();
    let _ = write!(line, "{}", record.args());
    // A message is one line whatever was put into it.
    if line[start..].contains('\n') {
        let escaped = line[start..].replace('\n', "\\n");
        line.truncate(start);
        line.push_str(&escaped);
    }
    line.push('\n');
}

/// Appends a time since the epoch as `2026-01-31T23:59:59.000000000`, in UTC.
fn write_time(line: &mut String, since_epoch: Duration) {
    let seconds = since_epoch.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days are counted from 1 March of year 0, so that the leap day is the last of its year. A day is
    // then found by the lengths of 400, 100, 4 and 1 years, which repeat.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let nanos = since_epoch.subsec_nanos();
    let _ = write!(line, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}");
}

/// Lets through ten messages in five seconds and counts the others, so that a guest cannot fill a disk
/// with the log. One for each message:
///
/// ```
/// use pulau_vmm::logger::LogLimit;
/// static LIMIT: LogLimit = LogLimit::new();
/// if LIMIT.allow() {
///     log::warn!("the guest did something odd");
/// }
/// ```
#[derive(Debug)]
pub struct LogLimit {
    /// The window's number in the upper half, messages in it in the lower.
    state: AtomicU64,
}

/// What a limit says of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admitted {
    Yes,
    /// Yes, but the next will not be.
    Last,
    No,
}

impl LogLimit {
    const MESSAGES: u64 = 10;
    const WINDOW: Duration = Duration::from_secs(5);

    /// Nothing was logged yet.
    #[allow(clippy::new_without_default, reason = "only meant for statics")]
    pub const fn new() -> Self {
        Self { state: AtomicU64::new(0) }
    }

    /// Whether one more message may be logged.
    pub fn allow(&self) -> bool {
        self.admit() != Admitted::No
    }

    fn admit(&self) -> Admitted {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let admitted = self.admit_at(now);
        if admitted == Admitted::No {
            METRICS.logger.rate_limited_log_count.inc();
        }
        admitted
    }

    fn admit_at(&self, now: Duration) -> Admitted {
        let window = (now.as_secs() / Self::WINDOW.as_secs()) << 32;
        let count = |state: u64| state & u64::from(u32::MAX);
        let update = |state: u64| {
            let state = if state & !u64::from(u32::MAX) == window { state } else { window };
            (count(state) < Self::MESSAGES).then_some(state + 1)
        };
        match self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update) {
            Ok(before) if before == window + Self::MESSAGES - 1 => Admitted::Last,
            Ok(_) => Admitted::Yes,
            Err(_) => Admitted::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;

    #[test]
    fn time_is_right() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000005"),
            (951_782_399, "2000-02-28T23:59:59.000000005"),
            (951_782_400, "2000-02-29T00:00:00.000000005"),
            (951_868_800, "2000-03-01T00:00:00.000000005"),
            (1_704_067_199, "2023-12-31T23:59:59.000000005"),
            (4_107_542_400, "2100-03-01T00:00:00.000000005"),
        ] {
            let mut line = String::new();
            write_time(&mut line, Duration::new(seconds, 5));
            assert_eq!(line, text);
        }
    }

    #[test]
    fn limit_opens_again_in_the_next_window() {
        let limit = LogLimit::new();
        let at = |seconds: u64| Duration::from_secs(1_700_000_000 + seconds);
        let allowed =
            |from: u64, to: u64| (from..to).filter(|s| limit.admit_at(at(s / 100)) != Admitted::No).count();
        assert_eq!(allowed(0, 100), 10);
        assert_eq!(allowed(100, 500), 0);
        assert_eq!(allowed(500, 600), 10);
    }

    /// One test, because the logger is of the process.
    #[test]
    fn lines_go_where_they_were_sent() {
        init("vm-1");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut config = LoggerConfig {
            log_path: Some(path.clone()),
            level: Some(LogLevel::Warn),
            show_level: Some(true),
            show_log_origin: Some(true),
            module: Some("a::b".to_owned()),
        };
        configure(&config).unwrap();
        assert_eq!(log::max_level(), LevelFilter::Warn);
        let log = |module, text: &str| {
            let mut record = Record::builder();
            record.level(Level::Warn).module_path(Some(module)).file(Some("f.rs")).line(Some(7));
            LOGGER.log(&record.args(format_args!("{text}")).build());
        };
        log("a::b::c", "one");
        log("b", "filtered");
        log("a::b", "two\nlines");

        config.log_path = Some(dir.path().join("no/such/file"));
        config.level = Some(LogLevel::Off);
        let error = configure(&config).unwrap_err().to_string();
        assert!(error.starts_with("logger: log_path \""), "{error}");
        assert_eq!(log::max_level(), LevelFilter::Warn);

        config = LoggerConfig { show_log_origin: Some(false), ..Default::default() };
        configure(&config).unwrap();
        assert_eq!(log::max_level(), LevelFilter::Info);
        log("a::b", "three");

        let before = METRICS.logger.rate_limited_log_count.total();
        for i in 0..100 {
            log("a::b::device", &format!("flood {i}"));
            log("pulau_vmm::api::serve", "answer");
        }
        assert!(METRICS.logger.rate_limited_log_count.total() >= before + 70);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches("answer").count(), 0, "of another module");
        let floods: Vec<&str> = text.lines().filter(|line| line.contains("flood")).collect();
        // A window may end in between.
        assert!((5..=20).contains(&floods.len()), "{floods:?}");
        let last = floods.iter().filter(|l| l.ends_with("(for some seconds, more of these are not logged)"));
        assert!((1..=2).contains(&last.count()), "{floods:?}");
        let thread = std::thread::current().name().unwrap().to_owned();
        let text: Vec<&str> = text.lines().filter(|line| !line.contains("flood")).collect();
        let lines: Vec<&str> = text.iter().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(
            lines,
            [
                format!("[vm-1:{thread}:WARN:f.rs:7] one"),
                format!("[vm-1:{thread}:WARN:f.rs:7] two\\nlines"),
                format!("[vm-1:{thread}:WARN] three"),
            ]
        );
    }
}
