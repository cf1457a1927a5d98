//! Whether targets are healthy: each is asked again and again, and what has changed is written down.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::instances::Error;
use crate::model::{HealthCheck, LoadBalancer, Target, TargetState};
use crate::records::Records;

/// What came of the last checks of a target: good or bad ones in a row.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    good: u32,
    bad: u32,
}

/// Checks the targets of a load balancer until it is deleted.
pub async fn watch(records: Records, id: String) {
    let mut rows: HashMap<(String, SocketAddr), Row> = HashMap::new();
    while let Some(balancer) = records.get::<LoadBalancer>(&id) {
        let interval = Duration::from_secs(balancer.health_check.interval_seconds);
        let (begun, results) = (tokio::time::Instant::now(), check_all(&balancer).await);
        rows.retain(|key, _| results.iter().any(|(known, _)| known == key));
        let mut changed = Vec::new();
        for (key, result) in results {
            let row = rows.entry(key.clone()).or_default();
            *row = match &result {
                Ok(()) => Row { good: row.good.saturating_add(1), bad: 0 },
                Err(_) => Row { good: 0, bad: row.bad.saturating_add(1) },
            };
            let state = if row.good >= balancer.health_check.healthy_threshold {
                TargetState::Healthy
            } else if row.bad >= balancer.health_check.unhealthy_threshold {
                TargetState::Unhealthy
            } else {
                continue;
            };
            changed.push((key, state, result.err()));
        }
        if let Err(error) = write(&records, &id, &changed).await {
            tracing::warn!(balancer = id, "the health of its targets cannot be written down: {error}");
        }
        // A new target is not kept waiting for a whole interval.
        let fresh = |balancer: &LoadBalancer| {
            let mut targets = balancer.targets.iter();
            targets.any(|target| {
                target.state == TargetState::Initial && !rows.contains_key(&key(balancer, target))
            })
        };
        let rest = interval.saturating_sub(begun.elapsed()).max(Duration::from_millis(10));
        let mut changes = records.subscribe();
        let sleep = tokio::time::sleep(rest);
        tokio::pin!(sleep);
        loop {
            if records.get::<LoadBalancer>(&id).is_none_or(|balancer| fresh(&balancer)) {
                break;
            }
            tokio::select! {
                () = &mut sleep => break,
                _ = changes.recv() => {}
            }
        }
    }
}

fn key(balancer: &LoadBalancer, target: &Target) -> (String, SocketAddr) {
    (target.instance_id.clone(), SocketAddr::new(target.address.into(), balancer.target_port))
}

type Checked = ((String, SocketAddr), Result<(), String>);

async fn check_all(balancer: &LoadBalancer) -> Vec<Checked> {
    let mut checks = JoinSet::new();
    // What is taken away is not brought back by being healthy.
    for target in balancer.targets.iter().filter(|target| target.state != TargetState::Draining) {
        let (key, how) = (key(balancer, target), balancer.health_check.clone());
        checks.spawn(async move {
            let within = Duration::from_secs(how.timeout_seconds);
            let result = match timeout(within, check(key.1, &how)).await {
                Ok(result) => result,
                Err(_) => Err(format!("no answer within {} s", how.timeout_seconds)),
            };
            (key, result)
        });
    }
    checks.join_all().await
}

/// One check.
async fn check(at: SocketAddr, how: &HealthCheck) -> Result<(), String> {
    let stream = TcpStream::connect(at).await.map_err(|error| format!("cannot connect to {at}: {error}"))?;
    let Some(path) = &how.path else { return Ok(()) };
    let failed = |error: hyper::Error| format!("GET {path} of {at}: {error}");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let request = Request::get(path.as_str())
        .header(header::HOST, at.to_string())
        .header(header::USER_AGENT, "pulau-health-check")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("GET {path}: {error}"))?;
    // Driven as long as this is waited for.
    let mut driving = JoinSet::new();
    driving.spawn(connection);
    let response = sender.send_request(request).await.map_err(failed)?;
    let status = response.status().as_u16();
    if (200..400).contains(&status) { Ok(()) } else { Err(format!("GET {path} of {at}: status {status}")) }
}

async fn write(
    records: &Records,
    id: &str,
    changed: &[((String, SocketAddr), TargetState, Option<String>)],
) -> Result<(), Error> {
    let written = records.modify(id, |balancer: &mut LoadBalancer| {
        let port = balancer.target_port;
        for ((instance, address), state, reason) in changed {
            let known = balancer.targets.iter_mut().find(|target| {
                target.instance_id == *instance && SocketAddr::new(target.address.into(), port) == *address
            });
            let Some(target) = known else { continue };
            if target.state != TargetState::Draining && target.state != *state {
                target.state = *state;
                target.since = chrono::Utc::now();
                target.reason.clone_from(reason);
            }
        }
        Ok::<_, Error>(())
    });
    written.await.map(drop)
}
