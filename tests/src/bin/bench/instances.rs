//! What the manager costs: from a request for an instance to a guest that answers, beside a bare VMM with the same
//! kernel and image; and the API itself with a thousand instances, which are simulated.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pulau_tests::daemon::Daemon;
use pulau_tests::network::in_empty_network;
use pulau_tests::{api, artifact};
use serde_json::{Value, json};

use crate::report::{Report, quantile};
use crate::vmm::{Contender, Vmm};

const MEMORY_MIB: u32 = 128;
/// Instances asked for at once.
const BATCH: usize = 8;
/// Instances that the API is measured with.
const STORED: usize = 1000;
/// Clients at once, and requests of each.
const CLIENTS: usize = 8;
const REQUESTS: usize = 200;

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let columns = vec!["pulau serve".to_owned(), "VMM alone".to_owned()];
    let title = format!("instances, 1 vCPU, {MEMORY_MIB} MiB, {runs} runs; {STORED} simulated");
    let mut report = Report::new(title, columns);
    let bare = contenders.first().context("no VMM")?.clone();
    // The daemon's network is one of its own.
    let (sender, done) = mpsc::channel();
    in_empty_network(move || {
        let result = real(&mut report, &bare, runs).and_then(|()| simulated(&mut report));
        let _ = sender.send(result.map(|()| report));
    });
    done.recv()?
}

fn call(daemon: &Daemon, method: &str, path: &str, body: &Value) -> Result<Value> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let answer = api::request(&daemon.path("api.sock"), method, path, &body)?;
    if !(200..300).contains(&answer.status) {
        bail!("{method} {path}: {answer:?}");
    }
    Ok(answer.body)
}

/// Runs instances and waits until their agents answer; their ids, and how long that took.
fn launch(daemon: &Daemon, count: usize) -> Result<(Vec<String>, Duration)> {
    let begun = Instant::now();
    let body = json!({"image": "minimal", "instance_type": "custom", "vcpus": 1, "memory_mib": MEMORY_MIB,
        "root_size_gib": 1, "min_count": count});
    let ran = call(daemon, "POST", "/v1/instances", &body)?;
    let ran = ran["instances"].as_array().context("instances")?;
    let ids: Vec<String> = ran.iter().filter_map(|one| one["id"].as_str().map(str::to_owned)).collect();
    for id in &ids {
        let path = format!("/v1/instances/{id}/wait?state=running&agent=true&timeout_seconds=300");
        call(daemon, "GET", &path, &Value::Null)?;
    }
    Ok((ids, begun.elapsed()))
}

fn terminate(daemon: &Daemon, ids: &[String]) -> Result<()> {
    for id in ids {
        call(daemon, "POST", &format!("/v1/instances/{id}/stop"), &json!({"force": true}))?;
        call(daemon, "DELETE", &format!("/v1/instances/{id}"), &Value::Null)?;
    }
    for id in ids {
        let path = format!("/v1/instances/{id}/wait?state=terminated&timeout_seconds=300");
        call(daemon, "GET", &path, &Value::Null)?;
    }
    Ok(())
}

fn real(report: &mut Report, bare: &Contender, runs: usize) -> Result<()> {
    let daemon = Daemon::start();
    let root = artifact("PULAU_TEST_ROOTFS_MINIMAL");
    let mut totals = [Vec::new(), Vec::new()];
    for run in 0..runs {
        let (ids, took) = launch(&daemon, 1)?;
        let id = ids.first().context("an instance")?;
        let shown = call(&daemon, "GET", &format!("/v1/instances/{id}"), &Value::Null)?;
        terminate(&daemon, &ids)?;
        let begun = Instant::now();
        let vmm = Vmm::start(bare)?;
        vmm.configure(1, MEMORY_MIB, &root)?;
        vmm.boot()?;
        vmm.agent()?;
        let alone = begun.elapsed();
        drop(vmm);
        for (column, time) in [took, alone].into_iter().enumerate() {
            let ms = time.as_secs_f64() * 1e3;
            totals[column].push(ms);
            report.add("request to agent", "ms", run, column, ms);
        }
        let mut before = 0.0;
        for (phase, name) in [
            ("disks_us", "  disks"),
            ("network_us", "  network"),
            ("vmm_us", "  VMM answers"),
            ("started_us", "  guest boots"),
            ("agent_us", "  agent answers"),
        ] {
            let at = shown["boot"][phase].as_f64().with_context(|| format!("no {phase}: {shown}"))? / 1e3;
            report.add(name, "ms", run, 0, at - before);
            before = at;
        }
    }
    for (column, totals) in totals.iter().enumerate() {
        report.add("request to agent, the first", "ms", 0, column, totals[0]);
        report.add("request to agent, p99", "ms", 0, column, quantile(totals, 0.99));
    }
    let (ids, took) = launch(&daemon, BATCH)?;
    report.add("instances per second, 8 at once", "1/s", 0, 0, BATCH as f64 / took.as_secs_f64());
    terminate(&daemon, &ids)
}

fn simulated(report: &mut Report) -> Result<()> {
    let mut daemon = Daemon::simulated();
    let empty = resident_kib(daemon.pid())?;
    let (ids, took) = launch(&daemon, STORED)?;
    report.add("simulated instances run per second", "1/s", 0, 0, STORED as f64 / took.as_secs_f64());
    let full = resident_kib(daemon.pid())?;
    report.add("daemon's memory, no instances", "MiB", 0, 0, empty / 1024.0);
    report.add("daemon's memory, 1000 instances", "MiB", 0, 0, full / 1024.0);
    let one = |index: usize| format!("/v1/instances/{}", ids[index % ids.len()]);
    reads(report, &daemon, "show one of 1000", one)?;
    reads(report, &daemon, "list 100 of 1000", |_| "/v1/instances?max_results=100".to_owned())?;
    daemon.kill();
    let begun = Instant::now();
    daemon.restart(&[]);
    let path = format!("/v1/instances/{}/exec", ids.last().context("an instance")?);
    call(&daemon, "POST", &path, &json!({"argv": ["true"]}))?;
    report.add("restart and adopt 1000", "ms", 0, 0, begun.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

/// Reads by several clients at once, each request on a connection of its own.
fn reads(
    report: &mut Report,
    daemon: &Daemon,
    name: &str,
    path: impl Fn(usize) -> String + Sync,
) -> Result<()> {
    let socket = daemon.path("api.sock");
    let client = |client: usize| -> Result<Vec<f64>> {
        (0..REQUESTS)
            .map(|request| {
                let begun = Instant::now();
                read(&socket, &path(client * REQUESTS + request))?;
                Ok(begun.elapsed().as_secs_f64() * 1e3)
            })
            .collect()
    };
    let begun = Instant::now();
    let times: Vec<f64> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|number| scope.spawn(move || client(number))).collect();
        let times = clients.into_iter().map(|client| client.join().expect("no panic"));
        times.collect::<Result<Vec<_>>>()
    })?
    .concat();
    let rate = times.len() as f64 / begun.elapsed().as_secs_f64();
    report.add(&format!("{name}, requests per second"), "1/s", 0, 0, rate);
    report.add(&format!("{name}, p50"), "ms", 0, 0, quantile(&times, 0.5));
    report.add(&format!("{name}, p99"), "ms", 0, 0, quantile(&times, 0.99));
    Ok(())
}

fn read(socket: &Path, path: &str) -> Result<()> {
    let answer = api::request(socket, "GET", path, "")?;
    if answer.status != 200 {
        bail!("{path}: {answer:?}");
    }
    Ok(())
}

fn resident_kib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    Ok(line.context("VmRSS")?.trim().parse()?)
}
