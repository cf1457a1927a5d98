//! Groups over a simulated host: real records, real instances of the service, pretended microVMs.

use std::collections::BTreeSet;
use std::path::Path;

use crate::instances::StopInstance;
use crate::instances::tests::daemon;
use crate::microvm::sim::{At, Fault, How, Simulation};
use crate::model::{GroupState, RollStatus};

use super::*;

/// Longer than anything in here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon, as far as groups go.
struct Rig {
    service: Service,
    groups: Groups,
    pace: Pace,
}

impl Rig {
    async fn new(dir: &Path, simulation: &Simulation) -> Self {
        let service = daemon(dir, simulation).await;
        let (tick, sample) = (Duration::from_millis(5), Duration::from_millis(30));
        let pace = Pace { tick, sample, ahead: Arc::default() };
        let groups = Groups::start(service.clone(), pace.clone());
        Rig { service, groups, pace }
    }

    fn pass(&self, seconds: i64) {
        self.pace.ahead.fetch_add(seconds * 1000, Ordering::Relaxed);
    }

    async fn until(&self, mut holds: impl FnMut(&Group) -> bool) -> Arc<Group> {
        let waiting = async {
            loop {
                let group = self.groups.get("web").unwrap();
                if holds(&group) {
                    return group;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(group) => group,
            Err(_) => panic!("never came to it: {:#?}", self.groups.get("web")),
        }
    }

    async fn active(&self, members: usize) -> Arc<Group> {
        self.until(|group| group.state == GroupState::Active && group.members.len() == members).await
    }
}

fn create(more: serde_json::Value) -> CreateGroup {
    let mut request = serde_json::json!({
        "name": "web", "desired_capacity": 2, "max_size": 4,
        "template": {"image": "tiny", "instance_type": "nano", "root_size_gib": 1},
    });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(request).unwrap()
}

fn modify(json: serde_json::Value) -> ModifyGroup {
    serde_json::from_value(json).unwrap()
}

fn ids(group: &Group) -> BTreeSet<String> {
    group.members.iter().filter_map(|member| member.instance_id.clone()).collect()
}

#[tokio::test]
async fn a_group_is_kept_at_its_size() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let rig = Rig::new(dir.path(), &simulation).await;
    rig.groups.create(create(serde_json::json!({}))).await.unwrap();
    assert!(matches!(rig.groups.create(create(serde_json::json!({}))).await, Err(Error::Exists { .. })));
    let group = rig.active(2).await;
    let first = ids(&group);
    for id in &first {
        assert_eq!(rig.service.get(id).unwrap().tags["pulau:group"], "web");
    }
    // More, and fewer: the oldest go.
    rig.groups.modify("web", modify(serde_json::json!({"desired_capacity": 4}))).await.unwrap();
    let group = rig.active(4).await;
    assert!(first.is_subset(&ids(&group)));
    rig.groups.modify("web", modify(serde_json::json!({"desired_capacity": 2}))).await.unwrap();
    let group = rig.active(2).await;
    assert!(first.is_disjoint(&ids(&group)));
    assert!(rig.groups.modify("web", modify(serde_json::json!({"desired_capacity": 5}))).await.is_err());

    // One that is stopped, and one that is terminated by somebody, are replaced.
    let lost: Vec<String> = ids(&group).into_iter().collect();
    rig.pass(61);
    rig.service.stop(&lost[0], StopInstance { force: true }).await.unwrap();
    rig.service.terminate(&lost[1]).await.unwrap();
    rig.until(|group| ids(group).is_disjoint(&lost.iter().cloned().collect())).await;
    let group = rig.active(2).await;
    assert_eq!(group.failures, 0, "they had been in service long enough");
    rig.until(|_| rig.service.get(&lost[0]).unwrap().state == InstanceState::Terminated).await;

    // It is left alone while it is paused.
    rig.groups.pause("web").await.unwrap();
    let one = ids(&group).into_iter().next().unwrap();
    rig.service.terminate(&one).await.unwrap();
    rig.until(|group| group.state == GroupState::Paused && group.members.len() == 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(rig.groups.get("web").unwrap().members.len(), 1);
    rig.groups.resume("web").await.unwrap();
    rig.active(2).await;

    rig.groups.delete("web", DeleteGroup::default()).await.unwrap();
    let gone = async {
        while !(rig.groups.list().is_empty() && simulation.list().is_empty()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
}

#[tokio::test]
async fn a_group_may_leave_its_instances_behind() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let rig = Rig::new(dir.path(), &simulation).await;
    rig.groups.create(create(serde_json::json!({}))).await.unwrap();
    let group = rig.active(2).await;
    rig.groups.delete("web", DeleteGroup { keep_instances: true }).await.unwrap();
    let gone = async {
        while !rig.groups.list().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
    for id in ids(&group) {
        assert_eq!(rig.service.get(&id).unwrap().state, InstanceState::Running);
    }
}

#[tokio::test]
async fn launches_that_are_refused_are_told_and_tried_again_later() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let rig = Rig::new(dir.path(), &simulation).await;
    // There is room for 8 vCPUs.
    let request = serde_json::json!({"desired_capacity": 9, "max_size": 9});
    rig.groups.create(create(request)).await.unwrap();
    let group = rig.until(|group| group.state == GroupState::BackingOff).await;
    let why = group.state_reason.clone().unwrap();
    assert!(why.code == "Server.LaunchFailed" && why.message.contains("vCPUs"), "{why:?}");
    assert!(group.members.len() <= 8 && group.retry_at.is_some());
    rig.groups.modify("web", modify(serde_json::json!({"desired_capacity": 1}))).await.unwrap();
    rig.active(1).await;

    // A host on which nothing starts.
    simulation.inject(Fault {
        at: At::Start,
        how: How::Fail("no memory".into()),
        id: None,
        times: usize::MAX,
    });
    rig.groups.modify("web", modify(serde_json::json!({"desired_capacity": 2}))).await.unwrap();
    rig.pass(3600);
    let group = rig.until(|group| group.failures >= 2).await;
    assert!(group.state_reason.clone().unwrap().message.contains("no memory"), "{group:?}");
    assert!(group.members.len() < 5, "{group:?}");
}

#[tokio::test]
async fn a_roll_replaces_all_and_goes_back_if_it_fails() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let rig = Rig::new(dir.path(), &simulation).await;
    rig.groups.create(create(serde_json::json!({}))).await.unwrap();
    let before = ids(&*rig.active(2).await);
    let small =
        serde_json::json!({"template": {"image": "tiny", "instance_type": "micro", "root_size_gib": 1}});
    let roll = |json: serde_json::Value| serde_json::from_value::<RollGroup>(json).unwrap();
    rig.groups.roll("web", roll(small.clone())).await.unwrap();
    assert!(matches!(rig.groups.roll("web", roll(small)).await, Err(Error::State { .. })), "one at a time");
    rig.until(|group| group.roll.as_ref().is_some_and(|roll| roll.status == RollStatus::Successful)).await;
    let group = rig.active(2).await;
    assert!(before.is_disjoint(&ids(&group)) && group.template_version == 2 && group.templates.len() == 1);
    for id in ids(&group) {
        assert_eq!(rig.service.get(&id).unwrap().instance_type, "micro");
    }

    // New ones do not start: all stays as it was, and it is said why.
    simulation.inject(Fault {
        at: At::Start,
        how: How::Fail("bad image".into()),
        id: None,
        times: usize::MAX,
    });
    let kept = ids(&group);
    rig.groups.roll("web", RollGroup::default()).await.unwrap();
    let group = rig.until(|group| group.rolling().is_none()).await;
    let roll = group.roll.clone().unwrap();
    assert_eq!(roll.status, RollStatus::RolledBack);
    assert!(roll.reason.unwrap().contains("bad image"));
    let group = rig.active(2).await;
    assert_eq!((ids(&group), group.template_version), (kept, 2));
}

#[tokio::test]
async fn load_and_the_clock_change_the_size() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let rig = Rig::new(dir.path(), &simulation).await;
    rig.groups.create(create(serde_json::json!({"min_size": 1}))).await.unwrap();
    let group = rig.active(2).await;
    let load = |group: &Group, load: f64| {
        ids(group).iter().for_each(|id| simulation.set_cpu_load(&format!("{id}-1"), load));
    };
    load(&group, 0.9);
    let scaling = serde_json::json!({"scaling": {"cpu_percent": 50, "cooldown_seconds": 300}});
    rig.groups.modify("web", modify(scaling)).await.unwrap();
    let group = rig.active(4).await;
    load(&group, 0.02);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(rig.groups.get("web").unwrap().desired_capacity, 4, "it was changed shortly ago");
    rig.pass(301);
    rig.until(|group| group.desired_capacity < 4).await;
    // What was measured at first may have been of the time before.
    rig.pass(301);
    rig.active(1).await;

    // In UTC, and of what was missed the last.
    let schedules = serde_json::json!({"scaling": null, "schedules": [
        {"name": "day", "cron": "0 8 * * *", "desired_capacity": 3},
        {"name": "night", "cron": "0 20 * * *", "desired_capacity": 2}]});
    let group = rig.groups.modify("web", modify(schedules)).await.unwrap();
    assert_eq!(group.scaling, None);
    let now = rig.pace.now();
    let evening = now.date_naive().succ_opt().unwrap().and_hms_opt(20, 0, 30).unwrap().and_utc();
    rig.pass((evening - now).num_seconds());
    rig.active(2).await;
    rig.pass(12 * 3600);
    rig.active(3).await;
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name() {
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let rig = Rig::new(dir.path(), &simulation).await;
    let template = |more: serde_json::Value| {
        let mut template = serde_json::json!({"image": "tiny"});
        template.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::json!({"template": template})
    };
    let cron = |cron: &str| serde_json::json!({"schedules": [{"name": "s", "cron": cron, "min_size": 1}]});
    for (more, named) in [
        (serde_json::json!({"name": "a b"}), "name"),
        (template(serde_json::json!({"image": "nope"})), "image \"nope\""),
        (template(serde_json::json!({"min_count": 2})), "min_count"),
        (template(serde_json::json!({"private_address": "10.77.0.9"})), "private_address"),
        (template(serde_json::json!({"termination_protection": true})), "termination_protection"),
        (template(serde_json::json!({"client_token": "x"})), "client_token"),
        (
            template(serde_json::json!({"published_ports": [{"host_port": 80, "port": 80}]})),
            "published_ports",
        ),
        (serde_json::json!({"desired_capacity": 5}), "desired_capacity"),
        (serde_json::json!({"min_size": 5}), "min_size"),
        (serde_json::json!({"max_size": 1001}), "max_size"),
        (serde_json::json!({"health_check_grace_seconds": 0}), "health_check_grace_seconds"),
        (serde_json::json!({"scaling": {"cpu_percent": 0}}), "cpu_percent"),
        (cron("* * *"), "five fields"),
        (cron("61 * * * *"), "s: cron"),
        (serde_json::json!({"schedules": [{"name": "s", "cron": "* * * * *"}]}), "needs min_size"),
    ] {
        let refused = rig.groups.create(create(more.clone())).await.unwrap_err().to_string();
        assert!(refused.contains(named), "{more}: {refused}");
    }
    assert!(rig.groups.list().is_empty());
    assert!(matches!(rig.groups.roll_back("web").await, Err(Error::NotFound { .. })));
}

/// Daemons that are killed at any moment of a roll: no slot ever has two instances, and it comes to its end.
#[test]
fn whatever_a_daemon_is_doing_when_it_is_killed() {
    const KILLS: u64 = 40;
    let (dir, simulation) = (tempfile::tempdir().unwrap(), Simulation::new());
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |n: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % n
    };
    for round in 0..KILLS {
        let life = Duration::from_micros(below(60_000));
        let (desired, runtime) = (1 + below(3), runtime());
        runtime.block_on(async {
            let rig = Rig::new(dir.path(), &simulation).await;
            if round == 0 {
                rig.groups.create(create(serde_json::json!({}))).await.unwrap();
            }
            let resize = modify(serde_json::json!({"desired_capacity": desired}));
            rig.groups.modify("web", resize).await.unwrap();
            if rig.groups.get("web").unwrap().rolling().is_none() {
                rig.groups.roll("web", RollGroup::default()).await.unwrap();
            }
            let watch = async {
                loop {
                    check(&rig);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            let _ = tokio::time::timeout(life, watch).await;
        });
        runtime.shutdown_timeout(PATIENCE);
    }
    let runtime = runtime();
    runtime.block_on(async {
        let rig = Rig::new(dir.path(), &simulation).await;
        let group = rig.until(|group| group.state == GroupState::Active && group.rolling().is_none()).await;
        let alive = || {
            let tables = rig.service.host().records.read();
            let alive =
                tables.instances.iter().filter(|instance| instance.state != InstanceState::Terminated);
            alive.map(|instance| instance.id.clone()).collect::<BTreeSet<_>>()
        };
        rig.until(|group| alive() == ids(group)).await;
        assert_eq!(group.members.len(), group.desired_capacity as usize);
        assert!(group.next_slot > 10, "{group:?}");
    });
    runtime.shutdown_timeout(PATIENCE);
}

/// What holds whenever somebody looks.
fn check(rig: &Rig) {
    let tables = rig.service.host().records.read().clone();
    let Some(group) = tables.groups.iter().next() else { return };
    let surge = group.rolling().map_or(0, |roll| roll.surge(group.target()));
    let counted = group.members.iter().filter(|member| member.state.counts()).count();
    // A smaller size that was asked for just now has not been looked at.
    assert!(counted <= (3 + surge) as usize, "{group:#?}");
    let mine = |id: &String| group.members.iter().any(|member| member.instance_id.as_ref() == Some(id));
    // At most those whose number is yet to be written down are nobody's.
    let launching = group.members.iter().filter(|member| member.state == MemberState::Launching).count();
    let alive =
        tables.instances.iter().filter(|instance| instance.desired != crate::model::Desired::Terminated);
    let strange = alive.filter(|instance| !mine(&instance.id)).count();
    assert!(strange <= launching, "{strange} instances are nobody's: {group:#?}");
}
