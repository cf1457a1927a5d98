//! What holds when a daemon that is left alone has come to rest.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::host::{Daemon, Failure, Host, PATIENCE};
use super::work::{Clients, Model, Want};

/// Instances that live on to the next death.
const KEPT: usize = 3;

/// Waits until the daemon has come to rest, and what it says is what was promised and what there is.
pub fn settle(daemon: &mut Daemon, host: &Host, model: &mut Model, after: &str) {
    let mut clients = Clients { daemon, model };
    assert!(clients.run_again().is_ok(), "after {after} a daemon does not answer: {}", clients.daemon.log());
    // Those that cannot boot would be tried again for a long time.
    for instance in items(clients.daemon, "instances") {
        let id = text(&instance["id"]);
        if !instance["tags"]["fails"].is_null() && clients.model.instances.contains_key(&id) {
            let done = clients.change(&id, "terminate", Want::Gone);
            assert!(done.is_ok(), "{}", clients.daemon.log());
        }
    }
    let begun = Instant::now();
    loop {
        match look(clients.daemon, host, clients.model) {
            Ok(()) => break,
            Err(problem) if begun.elapsed() > PATIENCE => {
                panic!("after {after}: {problem}\n{}", clients.daemon.log())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
        assert!(!clients.daemon.is_dead());
    }
    // Everything that was in doubt is known now.
    model.instances.retain(|id, known| match find(daemon, &format!("/v1/instances/{id}")) {
        Some(instance) => {
            known.acknowledged = state(&instance).unwrap_or(known.acknowledged);
            known.perhaps = None;
            known.acknowledged != Want::Gone
        }
        None => false,
    });
    model.things.retain(|path, known| {
        known.acknowledged = Want::There;
        known.perhaps = None;
        is_there(daemon, path)
    });
    // So that they do not become ever more. The next daemon, to die as well, has to see to it.
    for id in model.instances.keys().skip(KEPT).cloned().collect::<Vec<_>>() {
        let mut clients = Clients { daemon, model };
        assert!(clients.change(&id, "terminate", Want::Gone).is_ok(), "{}", daemon.log());
    }
}

fn find(daemon: &Daemon, path: &str) -> Option<Value> {
    match daemon.call("GET", path, None) {
        Ok(found) => Some(found),
        Err(Failure::Refused(refused)) => {
            assert_eq!(refused.status, 404, "{path}: {}", refused.message);
            None
        }
        Err(Failure::Lost) => panic!("{path}: no answer\n{}", daemon.log()),
    }
}

/// Whether there is something of this kind and name.
fn is_there(daemon: &Daemon, path: &str) -> bool {
    let (kind, name) = path.trim_start_matches("/v1/").split_once('/').unwrap();
    items(daemon, kind).iter().any(|item| item["name"] == name || item["tags"]["Name"] == name)
}

fn state(instance: &Value) -> Option<Want> {
    match instance["state"].as_str() {
        Some("running") => Some(Want::Running),
        Some("stopped") => Some(Want::Stopped),
        Some("terminated") => Some(Want::Gone),
        _ => None,
    }
}

fn items(daemon: &Daemon, kind: &str) -> Vec<Value> {
    find(daemon, &format!("/v1/{kind}")).unwrap()["items"].as_array().unwrap().clone()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn same(what: &str, there: &BTreeSet<String>, wanted: &BTreeSet<String>) -> Result<(), String> {
    if there == wanted {
        return Ok(());
    }
    let (left, lacking): (Vec<_>, Vec<_>) =
        (there.difference(wanted).collect(), wanted.difference(there).collect());
    Err(format!("{what}: left over {left:?}, lacking {lacking:?}"))
}

fn look(daemon: &Daemon, host: &Host, model: &Model) -> Result<(), String> {
    let instances = items(daemon, "instances");
    promises(daemon, model, &instances)?;
    for image in items(daemon, "images") {
        if image["state"] == "pending" {
            return Err(format!("an import never ends: {image}"));
        }
    }
    let running: Vec<&Value> = instances.iter().filter(|instance| instance["state"] == "running").collect();
    if let Some(unwell) = running.iter().find(|instance| instance["status"]["agent"] != "ok") {
        return Err(format!("it runs, and its agent does not: {unwell}"));
    }
    let machines =
        running.iter().map(|instance| format!("{}-{}", text(&instance["id"]), instance["generation"]));
    same("microVMs", &names(host, "data/simulated"), &machines.collect())?;
    files(daemon, host, &instances)?;
    network(daemon, host, &instances)
}

/// What was acknowledged has been done, and nothing that nobody asked for.
fn promises(daemon: &Daemon, model: &Model, instances: &[Value]) -> Result<(), String> {
    for instance in instances {
        let id = text(&instance["id"]);
        match (model.instances.get(&id), state(instance)) {
            (_, None) => return Err(format!("never comes to rest: {instance}")),
            (Some(known), Some(state)) if known.allows(state) => {}
            // One that could not boot was stopped in the end.
            (Some(_), Some(Want::Stopped)) if !instance["tags"]["fails"].is_null() => {}
            (None, Some(Want::Gone)) => {}
            (known, _) => return Err(format!("promised was {known:?}: {instance}")),
        }
    }
    let there: BTreeSet<String> = instances.iter().map(|instance| text(&instance["id"])).collect();
    for (id, known) in &model.instances {
        if !there.contains(id) && !known.allows(Want::Gone) {
            return Err(format!("{id} is gone; promised was {known:?}"));
        }
    }
    for (path, known) in &model.things {
        let want = if is_there(daemon, path) { Want::There } else { Want::Gone };
        if !known.allows(want) {
            return Err(format!("{path} is {want:?}; promised was {known:?}"));
        }
    }
    Ok(())
}

fn names(host: &Host, dir: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(host.path(dir)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn files(daemon: &Daemon, host: &Host, instances: &[Value]) -> Result<(), String> {
    for staging in ["volumes/tmp", "images/tmp", "snapshots/tmp"] {
        same(staging, &names(host, &format!("data/{staging}")), &BTreeSet::new())?;
    }
    let alive = instances.iter().filter(|instance| instance["state"] != "terminated");
    for (kind, state) in [("volumes", "available"), ("snapshots", "completed")] {
        let items = items(daemon, kind);
        let known: BTreeSet<String> = items.iter().map(|item| format!("{}.raw", text(&item["id"]))).collect();
        let there = names(host, &format!("data/{kind}")).into_iter().filter(|name| name.ends_with(".raw"));
        let there: BTreeSet<String> = there.collect();
        if let Some(file) = there.difference(&known).next() {
            return Err(format!("{kind}: {file} belongs to nothing"));
        }
        // A root disk is made at the first boot; one stopped before that has none yet.
        let lacks =
            |item: &&Value| item["state"] == state && !there.contains(&format!("{}.raw", text(&item["id"])));
        if let Some(item) = items.iter().find(lacks) {
            return Err(format!("it has no file: {item}"));
        }
        let unfinished =
            |item: &&Value| ["creating", "pending", "deleting"].contains(&text(&item["state"]).as_str());
        if let Some(item) = items.iter().find(unfinished) {
            return Err(format!("never comes to rest: {item}"));
        }
    }
    let ids: BTreeSet<String> = instances.iter().map(|instance| text(&instance["id"])).collect();
    let consoles = names(host, "data/logs").into_iter().filter(|name| name.contains(".console"));
    for console in consoles {
        if !ids.contains(console.split('.').next().unwrap_or_default()) {
            return Err(format!("console {console} belongs to nothing"));
        }
    }
    let addresses: Vec<_> = alive.map(|instance| text(&instance["interface"]["private_address"])).collect();
    match addresses.iter().collect::<BTreeSet<_>>().len() == addresses.len() {
        true => Ok(()),
        false => Err(format!("an address was given twice: {addresses:?}")),
    }
}

/// Taps, routes, neighbours and the packet filter's elements are those of the running instances.
fn network(daemon: &Daemon, host: &Host, instances: &[Value]) -> Result<(), String> {
    let running = || instances.iter().filter(|instance| instance["state"] == "running");
    let taps: BTreeSet<String> = running().map(|instance| text(&instance["interface"]["tap"])).collect();
    let addresses: BTreeSet<String> =
        running().map(|instance| text(&instance["interface"]["private_address"])).collect();
    let links = host.output("ip", &["-o", "link"]);
    let links =
        links.lines().filter_map(|line| line.split(": ").nth(1)).filter(|name| name.starts_with("pl-"));
    same("taps", &links.map(str::to_owned).collect(), &taps)?;
    let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let routes = host.output("ip", &["-4", "route"]);
    let to_guests = routes.lines().filter(|line| line.contains(" dev pl-")).filter_map(first);
    same("routes", &to_guests.collect(), &addresses)?;
    let subnets = routes.lines().filter_map(|line| line.strip_prefix("unreachable ")).filter_map(first);
    let networks: BTreeSet<String> =
        items(daemon, "networks").iter().map(|network| text(&network["subnet"])).collect();
    same("subnets", &subnets.collect(), &networks)?;
    let rules = host.output("nft", &["list", "ruleset"]);
    let words = || rules.split(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '-' || c == '/'));
    let named = words().filter(|word| word.len() > 3 && word.starts_with("pl-")).map(str::to_owned);
    same("taps in rules", &named.collect(), &taps)?;
    let gateways = networks.iter().filter_map(|subnet| subnet.split('/').next());
    let gateways: BTreeSet<String> =
        gateways.map(|base| format!("{}.1", base.strip_suffix(".0").unwrap_or(base))).collect();
    let inside = |word: &&str| {
        (word.starts_with("10.77.") || word.starts_with("10.200."))
            && !word.contains('/')
            && !gateways.contains(*word)
    };
    same("addresses in rules", &words().filter(inside).map(str::to_owned).collect(), &addresses)
}
