//! What the jail costs: `jail cost [RUNS]` prints the time from spawning a process to its end, without a
//! jail and in several. Medians of alternating runs.

use std::time::{Duration, Instant};

use crate::cell::{Cgroups, Place, Prisoner};

/// A way to run: its name, how, and how long each run took.
type Kind<'a> = (&'static str, Box<dyn Fn() -> Prisoner + 'a>, Vec<Duration>);

pub fn main(runs: usize) {
    let place = Place::new();
    let tree = place.tree("vm");
    let cgroups = Cgroups::new().ok();
    let jailed = || Prisoner::jailed(&tree);
    let mut kinds: Vec<Kind> = vec![
        ("no jail", Box::new(Prisoner::free), Vec::new()),
        ("jail", Box::new(jailed), Vec::new()),
        ("jail, first process", Box::new(move || jailed().first()), Vec::new()),
        ("jail, new network namespace", Box::new(move || jailed().with("net", "new")), Vec::new()),
    ];
    if let Some(cgroups) = &cgroups {
        let cgroup = cgroups.path("vm").display().to_string();
        let other = cgroup.clone();
        kinds.push(("jail, cgroup", Box::new(move || jailed().with("cgroup", &cgroup)), Vec::new()));
        let first = move || jailed().with("cgroup", &other).first();
        kinds.push(("jail, cgroup, first process", Box::new(first), Vec::new()));
    }
    for _ in 0..runs {
        for (_, prisoner, times) in &mut kinds {
            let prisoner = prisoner().attempt(&["nothing"]);
            let start = Instant::now();
            let ended = prisoner.run();
            times.push(start.elapsed());
            ended.expect_through();
        }
    }
    for (name, _, times) in &mut kinds {
        times.sort();
        let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
        println!("{name:<30} median {:>10?}  10 % {:>10?}  90 % {:>10?}", at(50), at(10), at(90));
    }
}
