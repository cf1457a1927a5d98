//! Metrics: counters that any part of the VMM increments, written as lines of JSON.
//!
//! A part declares what it counts with [`group!`](crate::metrics::group) and increments the fields;
//! that is one relaxed atomic addition. What exists once in the process is a field of [`METRICS`]; a
//! device makes an `Arc` of its group and hands it to [`register`]. A line is written every
//! [`FLUSH_INTERVAL`] and when the client asks, once a path was configured.
//!
//! As in Firecracker, a counter is written as its increase since the line before, a gauge as it is, and
//! devices that come in numbers once each (`block_rootfs`) and once summed up (`block`). Counting never
//! fails and never waits; a line that cannot be written is lost, and that is counted too.

mod process;
mod sink;

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

pub use process::{METRICS, Metrics};
pub(crate) use sink::NonBlockingFile;

use crate::config::MetricsConfig;

/// Time between two lines.
pub const FLUSH_INTERVAL: Duration = Duration::from_secs(60);

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter {
    total: AtomicU64,
    written: AtomicU64,
}

impl Counter {
    /// Starts at 0.
    pub const fn new() -> Self {
        Self { total: AtomicU64::new(0), written: AtomicU64::new(0) }
    }

    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// `count` more.
    pub fn add(&self, count: u64) {
        self.total.fetch_add(count, Ordering::Relaxed);
    }

    /// All there ever were.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }
}

/// A number that is set.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// Starts at 0.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Now it is this.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// What was set last.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One metric of a group.
pub trait Metric {
    /// What to write now. A counter begins anew.
    fn take(&self) -> u64;
    /// What there is in all; changes nothing.
    fn look(&self) -> u64;
}

impl Metric for Counter {
    fn take(&self) -> u64 {
        let total = self.total();
        total.wrapping_sub(self.written.swap(total, Ordering::Relaxed))
    }

    fn look(&self) -> u64 {
        self.total()
    }
}

impl Metric for Gauge {
    fn take(&self) -> u64 {
        self.get()
    }

    fn look(&self) -> u64 {
        self.get()
    }
}

/// Metrics that belong together. Made by [`group!`](crate::metrics::group).
pub trait Group: Send + Sync {
    /// Reads every metric by `read`, always in the same order.
    fn read_each(&self, read: fn(&dyn Metric) -> u64, each: &mut dyn FnMut(&'static str, u64));
}

/// Declares a struct of metrics: each field is a [`Counter`] or a [`Gauge`], public, and written under
/// its own name.
///
/// ```
/// pulau_vmm::metrics::group! {
///     /// What a device counts.
///     pub struct DeviceMetrics {
///         /// Requests of the guest.
///         requests: Counter,
///     }
/// }
/// let metrics = std::sync::Arc::new(DeviceMetrics::new());
/// pulau_vmm::metrics::register("device", Some("a"), metrics.clone());
/// metrics.requests.inc();
/// ```
#[macro_export]
macro_rules! metrics_group {
    ($(#[$meta:meta])* $vis:vis struct $name:ident {
        $($(#[$field_meta:meta])* $field:ident: $kind:ident,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Default)]
        $vis struct $name {
            $($(#[$field_meta])* pub $field: $crate::metrics::$kind,)*
        }

        impl $name {
            /// All 0.
            #[allow(clippy::new_without_default, reason = "Default is derived")]
            pub const fn new() -> Self {
                Self { $($field: $crate::metrics::$kind::new(),)* }
            }
        }

        impl $crate::metrics::Group for $name {
            fn read_each(
                &self,
                read: fn(&dyn $crate::metrics::Metric) -> u64,
                each: &mut dyn FnMut(&'static str, u64),
            ) {
                $(each(stringify!($field), read(&self.$field));)*
            }
        }
    };
}
pub use metrics_group as group;

/// A group of a device.
struct Registered {
    kind: &'static str,
    id: Option<String>,
    group: Arc<dyn Group>,
}

/// What has been configured: where lines go and what is in them besides metrics.
struct Output {
    file: NonBlockingFile,
    /// `"id":…,"properties":…,` or a part of it.
    fixed: String,
    due: Instant,
}

static REGISTRY: Mutex<Vec<Registered>> = Mutex::new(Vec::new());
static OUTPUT: Mutex<Option<Output>> = Mutex::new(None);

/// A panic ends the process, so no lock is ever found poisoned.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why metrics could not be configured or written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    #[error("metrics: metrics_path was already configured")]
    AlreadyConfigured,
    #[error("metrics: metrics_path {path:?}: {error}")]
    Open { path: std::path::PathBuf, error: std::io::Error },
    #[error("metrics: metrics_path: cannot write: {0}")]
    Write(std::io::Error),
}

/// Adds a device's metrics to what is written, under `kind` and, with an `id`, also under
/// `<kind>_<id>`. `id` is a valid device id. What was registered under both before is replaced.
pub fn register(kind: &'static str, id: Option<&str>, group: Arc<dyn Group>) {
    let mut registry = lock(&REGISTRY);
    registry.retain(|r| (r.kind, r.id.as_deref()) != (kind, id));
    registry.push(Registered { kind, id: id.map(str::to_owned), group });
}

/// Sets where lines go. Only once in a process.
pub fn configure(config: &MetricsConfig, instance_id: &str) -> Result<(), MetricsError> {
    let mut output = lock(&OUTPUT);
    if output.is_some() {
        return Err(MetricsError::AlreadyConfigured);
    }
    let path = &config.metrics_path;
    let file =
        NonBlockingFile::open(path).map_err(|error| MetricsError::Open { path: path.clone(), error })?;
    let mut fixed = String::new();
    if config.emit_id {
        let _ = write!(fixed, "\"id\":{},", serde_json::Value::from(instance_id));
    }
    if let Some(properties) = &config.properties {
        let json = serde_json::to_string(properties).unwrap_or_else(|_| "{}".to_owned());
        let _ = write!(fixed, "\"properties\":{json},");
    }
    *output = Some(Output { file, fixed, due: Instant::now() + FLUSH_INTERVAL });
    Ok(())
}

/// Writes a line now. Without a configured path nothing happens.
pub fn flush() -> Result<(), MetricsError> {
    let mut output = lock(&OUTPUT);
    let Some(output) = output.as_mut() else { return Ok(()) };
    output.due = Instant::now() + FLUSH_INTERVAL;
    let mut line = render(&output.fixed, |metric| metric.take());
    line.push('\n');
    output.file.write_line(line.as_bytes()).map_err(|error| {
        METRICS.logger.missed_metrics_count.inc();
        MetricsError::Write(error)
    })
}

/// Writes a last line from a panic hook, which may run while anything at all is locked.
pub fn flush_in_panic() {
    METRICS.vmm.panic_count.set(1);
    let (Ok(mut output), Ok(registry)) = (OUTPUT.try_lock(), REGISTRY.try_lock()) else { return };
    drop(registry);
    if let Some(output) = output.as_mut() {
        let line = render(&output.fixed, |metric| metric.take()) + "\n";
        let _ = output.file.write_line(line.as_bytes());
    }
}

/// Writes a line if one is due, and returns how long it is until the next; `None` if there is none.
pub fn flush_if_due() -> Option<Duration> {
    let left = |due: Instant| due.saturating_duration_since(Instant::now());
    let due = lock(&OUTPUT).as_ref()?.due;
    if !left(due).is_zero() {
        return Some(left(due));
    }
    if let Err(error) = flush() {
        METRICS.logger.metrics_fails.inc();
        log::error!("{error}");
    }
    Some(FLUSH_INTERVAL)
}

/// Every metric in all since the process started, as a line would show it. Changes nothing, and needs no path.
pub fn totals() -> String {
    render("", |metric| metric.look())
}

/// Reads all metrics, as one line.
fn render(fixed: &str, read: fn(&dyn Metric) -> u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut out = String::with_capacity(4096);
    let _ = write!(out, "{{\"utc_timestamp_ms\":{},{fixed}", now.as_millis());
    METRICS.each_group(&mut |name, group| {
        let mut fields = Vec::new();
        group.read_each(read, &mut |field, value| fields.push((field, value)));
        write_group(&mut out, name, None, &fields);
    });
    // The sums of kinds, in the order of their first device.
    let mut sums: Vec<(&'static str, Vec<(&'static str, u64)>)> = Vec::new();
    for registered in lock(&REGISTRY).iter() {
        let mut fields = Vec::new();
        registered.group.read_each(read, &mut |field, value| fields.push((field, value)));
        if let Some(id) = &registered.id {
            write_group(&mut out, registered.kind, Some(id), &fields);
        }
        match sums.iter_mut().find(|(kind, _)| *kind == registered.kind) {
            None => sums.push((registered.kind, fields)),
            Some((_, sum)) => {
                for (total, (_, value)) in sum.iter_mut().zip(fields) {
                    total.1 = total.1.saturating_add(value);
                }
            }
        }
    }
    for (kind, fields) in &sums {
        write_group(&mut out, kind, None, fields);
    }
    // Every group ends with a comma.
    out.pop();
    out.push('}');
    out
}

/// Appends `"kind_id":{"field":value,…},`. Names and ids need no escaping.
fn write_group(out: &mut String, kind: &str, id: Option<&str>, fields: &[(&'static str, u64)]) {
    let separator = if id.is_some() { "_" } else { "" };
    let _ = write!(out, "\"{kind}{separator}{}\":{{", id.unwrap_or_default());
    for (index, (field, value)) in fields.iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let _ = write!(out, "{comma}\"{field}\":{value}");
    }
    out.push_str("},");
}

#[cfg(test)]
mod tests;
