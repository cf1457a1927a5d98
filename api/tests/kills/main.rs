//! The daemon, killed at each of its fault points and at any moment in between, hundreds of times on one data
//! directory. Its microVMs are simulated, and outlive it as real ones do; its network is real, in a namespace
//! of its own. After every death another daemon is started and has to come to what was acknowledged, with
//! nothing double and nothing left over. Now and then the host is lost with it: microVMs, taps, rules and all.
//!
//! What it takes to start and end real VMMs has fault points of its own, which a whole-system test passes:
//! `tests/tests/kills.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used)] // It is all tests.

mod host;
mod invariants;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use host::Host;
use work::{Dice, Model};

/// Passages of a point at which the daemon is killed.
const PASSAGES: [u32; 4] = [1, 2, 3, 5];
/// A host is lost every so many deaths.
const HOST_LOST: usize = 9;

/// Names of the fault points in the sources below `dir`.
fn points(dir: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            points(&path, found);
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let names = text.split("fault::point(\"").skip(1).filter_map(|rest| rest.split('"').next());
        found.extend(names.map(str::to_owned));
    }
}

/// Whether a point is passed only by real VMMs, or by what is not asked for here: a copy of a running instance's disk,
/// which `tests/tests/storage.rs` has die, and groups, which nothing has die yet.
fn is_passed_elsewhere(point: &str) -> bool {
    let of_machines = ["vm.home", "vm.booting", "vm.ended", "vm.removed"];
    point.starts_with("vm.") && !of_machines.contains(&point)
        || point == "disk.held"
        || point.starts_with("group.")
}

#[test]
fn a_daemon_killed_anywhere_is_followed_by_one_that_finishes_what_it_promised() {
    let mut all = BTreeSet::new();
    points(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
    all.retain(|point| !is_passed_elsewhere(point));
    assert!(all.len() > 20, "{all:?}");
    let mut host = Host::new();
    let mut model = Model::default();
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut deaths: BTreeMap<String, usize> = BTreeMap::new();
    let mut kills = 0;
    for passage in PASSAGES {
        for point in &all {
            let mut daemon = host.serve(Some((point, passage)));
            work::work(&mut daemon, &host, &mut model, &mut dice, passage);
            if daemon.kill() {
                *deaths.entry(point.clone()).or_default() += 1;
            }
            kills += 1;
            if kills % HOST_LOST == 0 {
                host.lose();
            }
            let mut daemon = host.serve(None);
            invariants::settle(&mut daemon, &host, &mut model, &format!("{point}:{passage}"));
            daemon.kill();
            kills += 1;
        }
    }
    let unreached: Vec<_> = all.iter().filter(|point| !deaths.contains_key(*point)).collect();
    assert!(unreached.is_empty(), "never died at {unreached:?}; deaths: {deaths:?}");
    eprintln!("{kills} daemons were killed, {} of them at fault points", deaths.values().sum::<usize>());
}
