//! Metrics for Prometheus, in its text form (OpenMetrics 1.0).
//!
//! What happens is counted as it happens: requests, and how long boots took. What is, is looked at when somebody
//! asks. Asking every running VMM what it uses is the dear part: it is done for several at once, within a bounded
//! time, and what came of it serves all who ask within the next seconds. A VMM that did not answer is left out.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::Api;
use super::error::Refusal;
use crate::instances::{Error, Service};
use crate::microvm::Usage;
use crate::model::{BootReport, InstanceState, MemberState};

/// VMMs that are asked at once.
const AT_ONCE: usize = 16;
/// For all of them.
const ASK_WITHIN: Duration = Duration::from_secs(2);
/// How long answers are good for.
const FRESH: Duration = Duration::from_secs(5);
/// Upper bounds of what requests take, in seconds.
const REQUEST_SECONDS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0];
/// Upper bounds of what phases of a boot take, in seconds.
const BOOT_SECONDS: [f64; 12] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0, 30.0];

type Labels = Vec<(&'static str, String)>;
type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// What is counted as it happens.
pub struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    latencies: Histograms,
    boots: Histograms,
    usage: Mutex<Option<(Instant, Usages)>>,
}

/// Per instance.
type Usages = Arc<BTreeMap<String, Usage>>;

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("pulau");
        let requests = Family::default();
        registry.register(
            "http_requests",
            "Requests answered, by route, method and status",
            Family::clone(&requests),
        );
        let latencies: Histograms = Family::new_with_constructor(|| Histogram::new(REQUEST_SECONDS));
        registry.register(
            "http_request_seconds",
            "Time until requests were answered, by route and method",
            latencies.clone(),
        );
        let boots: Histograms = Family::new_with_constructor(|| Histogram::new(BOOT_SECONDS));
        registry.register(
            "boot_seconds",
            "Time from the request to the end of each phase of boots that succeeded",
            boots.clone(),
        );
        Metrics { registry, requests, latencies, boots, usage: Mutex::default() }
    }

    /// Counts an answer.
    pub fn answered(&self, route: &str, method: &str, status: u16, took: Duration) {
        let of = vec![("route", route.to_owned()), ("method", method.to_owned())];
        self.latencies.get_or_create(&of).observe(took.as_secs_f64());
        let mut of = of;
        of.push(("status", status.to_string()));
        self.requests.get_or_create(&of).inc();
    }

    /// Counts a boot after which the agent answered.
    pub fn booted(&self, report: &BootReport) {
        let phases = [
            ("disks", report.disks_us),
            ("network", report.network_us),
            ("vmm", report.vmm_us),
            ("started", report.started_us),
            ("agent", report.agent_us),
        ];
        for (phase, micros) in phases {
            let Some(micros) = micros else { continue };
            let seconds = Duration::from_micros(micros).as_secs_f64();
            self.boots.get_or_create(&vec![("phase", phase.to_owned())]).observe(seconds);
        }
    }

    /// What running instances use, not older than [`FRESH`].
    async fn usages(&self, service: &Service) -> Usages {
        // Who comes while it is found out waits for it, rather than ask again.
        let mut known = self.usage.lock().await;
        if let Some((at, usages)) = &*known
            && at.elapsed() < FRESH
        {
            return usages.clone();
        }
        let usages = Arc::new(ask(service).await);
        *known = Some((Instant::now(), usages.clone()));
        usages
    }
}

/// Asks the VMMs of all running instances.
async fn ask(service: &Service) -> BTreeMap<String, Usage> {
    let running: Vec<String> = {
        let tables = service.host().records.read();
        let running = tables.instances.iter().filter(|instance| instance.state == InstanceState::Running);
        running.map(|instance| instance.id.clone()).collect()
    };
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut asked = JoinSet::new();
    for id in running {
        let Ok(machine) = service.machine(&id) else { continue };
        let turns = turns.clone();
        asked.spawn(async move {
            let _turn = turns.acquire_owned().await.ok()?;
            Some((id, machine.usage().await.ok()?))
        });
    }
    let mut usages = BTreeMap::new();
    let collect = async {
        while let Some(answer) = asked.join_next().await {
            usages.extend(answer.ok().flatten());
        }
    };
    // What has come by then is what there is; the rest is not waited for.
    let _ = timeout(ASK_WITHIN, collect).await;
    usages
}

/// Show metrics, for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "host",
    responses((status = 200, description = "Metrics in the text form of OpenMetrics.",
        content_type = "application/openmetrics-text", body = String),
        (status = "default", description = "Refused.", body = super::error::ErrorBody)))]
pub async fn show(State(api): State<Arc<Api>>) -> Result<impl IntoResponse, Refusal> {
    let usages = api.metrics.usages(&api.instances).await;
    let text = text(&api, &usages);
    let text = text.map_err(|_| Error::Internal("metrics cannot be written".to_owned()))?;
    Ok(([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}

fn text(api: &Api, usages: &BTreeMap<String, Usage>) -> Result<String, fmt::Error> {
    let mut text = String::new();
    encode_registry(&mut text, &api.metrics.registry)?;
    encode_registry(&mut text, &now(&api.instances, usages))?;
    encode_registry(&mut text, &fleet(api))?;
    encode_eof(&mut text)?;
    Ok(text)
}

/// Groups and load balancers, at this moment.
fn fleet(api: &Api) -> Registry {
    let mut registry = Registry::with_prefix("pulau");
    let (desired, members) = (Family::<Labels, Gauge>::default(), Family::<Labels, Gauge>::default());
    for group in api.groups.list() {
        let name = ("group", group.name.clone());
        desired.get_or_create(&vec![name.clone()]).set(group.target().into());
        let counts = [
            ("in-service", MemberState::InService),
            ("pending", MemberState::Pending),
            ("draining", MemberState::Draining),
        ];
        for (label, state) in counts {
            let count = group.members.iter().filter(|member| member.state == state).count();
            let of = vec![name.clone(), ("state", label.to_owned())];
            members.get_or_create(&of).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
    registry.register("group_desired_capacity", "Members a group is to have", desired);
    registry.register("group_members", "Members a group has, by state", members);
    let activities = api.balancers.activities();
    let (open, targets) = (Family::<Labels, Gauge>::default(), Family::<Labels, Gauge>::default());
    for activity in &activities {
        let name = ("load_balancer", activity.name.clone());
        let gauge = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        open.get_or_create(&vec![name.clone()]).set(gauge(activity.open));
        for (state, count) in &activity.targets {
            let of = vec![name.clone(), ("state", state.name().to_owned())];
            targets.get_or_create(&of).set(gauge(*count));
        }
    }
    registry.register("load_balancer_open_connections", "Clients' connections that are open", open);
    registry.register("load_balancer_targets", "Targets by state", targets);
    let mut counter = |name: &str, help: &str, value: fn(&crate::balancer::Activity) -> u64| {
        let family = Family::<Labels, Counter>::default();
        for activity in &activities {
            let of = vec![("load_balancer", activity.name.clone())];
            family.get_or_create(&of).inc_by(value(activity));
        }
        registry.register(name, help, family);
    };
    counter("load_balancer_connections", "Connections of clients", |a| a.connections);
    counter("load_balancer_requests", "Requests of clients, by HTTP", |a| a.requests);
    counter("load_balancer_refused", "Requests and connections that no target took", |a| a.refused);
    counter("load_balancer_retries", "Tries at another target", |a| a.retries);
    registry
}

/// What is, at this moment.
fn now(service: &Service, usages: &BTreeMap<String, Usage>) -> Registry {
    let mut registry = Registry::with_prefix("pulau");
    let mut gauge = |name: &str, help: &str, values: Vec<(Labels, u64)>| {
        let family = Family::<Labels, Gauge>::default();
        for (labels, value) in values {
            family.get_or_create(&labels).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        registry.register(name, help, family);
    };
    let report = service.host_report();
    let states = report.instances.iter();
    let by_state =
        states.map(|(state, &count)| (vec![("state", state.name().to_owned())], count as u64)).collect();
    gauge("instances", "Instances by state", by_state);
    let one = |value: u64| vec![(Vec::new(), value)];
    gauge("capacity_vcpus", "vCPUs all instances may have together", one(report.capacity.vcpus.into()));
    gauge("used_vcpus", "vCPUs instances have", one(report.used.vcpus.into()));
    let mib = |mib: u64| one(mib.saturating_mul(1 << 20));
    gauge("capacity_memory_bytes", "Memory all instances may have together", mib(report.capacity.memory_mib));
    gauge("used_memory_bytes", "Memory instances have", mib(report.used.memory_mib));
    gauge("cordoned", "1 if no instances are run on the host", one(report.cordoned.into()));
    let of_each = |value: fn(&Usage) -> u64| {
        usages.iter().map(|(id, usage)| (vec![("instance", id.clone())], value(usage))).collect()
    };
    gauge(
        "instance_memory_bytes",
        "Memory charged to an instance's control group",
        of_each(|u| u.memory_bytes),
    );
    gauge("instance_resident_bytes", "Memory of an instance in RAM", of_each(|u| u.resident_bytes));
    let mut counter = |name: &str, help: &str, value: fn(&Usage) -> u64| {
        let family = Family::<Labels, Counter>::default();
        for (id, usage) in usages {
            family.get_or_create(&vec![("instance", id.clone())]).inc_by(value(usage));
        }
        registry.register(name, help, family);
    };
    counter("instance_cpu_microseconds", "CPU time an instance has used since it was started", |u| {
        u.cpu_time_us
    });
    counter("instance_disk_read_bytes", "Bytes an instance has read from its disks", |u| u.disk.read_bytes);
    counter("instance_disk_written_bytes", "Bytes an instance has written to its disks", |u| {
        u.disk.write_bytes
    });
    counter("instance_disk_reads", "Reads of an instance from its disks", |u| u.disk.read_operations);
    counter("instance_disk_writes", "Writes of an instance to its disks", |u| u.disk.write_operations);
    counter("instance_network_received_bytes", "Bytes an instance has received", |u| {
        u.network.received_bytes
    });
    counter("instance_network_sent_bytes", "Bytes an instance has sent", |u| u.network.sent_bytes);
    counter("instance_network_received_packets", "Packets an instance has received", |u| {
        u.network.received_packets
    });
    counter("instance_network_sent_packets", "Packets an instance has sent", |u| u.network.sent_packets);
    registry
}
