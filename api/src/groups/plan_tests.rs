//! Groups in a world that is made up: thousands of steps of chance, and what must hold after each.

use super::*;
use crate::model::Roll;

/// Numbers that differ, and are the same each time (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Debug)]
struct Machine {
    slot: u64,
    health: Health,
    /// Steps until it is healthy, drained or gone.
    left: u64,
    ending: bool,
}

struct World {
    group: Group,
    /// By their number; what was run for a slot stays known, as by its token.
    machines: BTreeMap<u64, Machine>,
    now: DateTime<Utc>,
    dice: Dice,
    /// Templates from which nothing healthy comes.
    bad: BTreeSet<u32>,
    calm: bool,
}

fn group(desired: u32) -> Group {
    serde_json::from_value(serde_json::json!({
        "id": "grp-1", "name": "web", "created": "2026-01-01T00:00:00Z", "state": "scaling",
        "state_since": "2026-01-01T00:00:00Z", "min_size": 0, "max_size": 20, "desired_capacity": desired,
        "template_version": 1, "templates": {"1": {}}, "health_check_grace_seconds": 100,
        "schedules_until": "2026-01-01T00:00:00Z", "members": [], "next_slot": 1,
    }))
    .unwrap()
}

impl World {
    fn new(desired: u32, seed: u64) -> Self {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let (group, bad) = (group(desired), BTreeSet::new());
        World { group, machines: BTreeMap::new(), now, dice: Dice(seed), bad, calm: true }
    }

    fn id(slot: u64) -> String {
        format!("i-{slot}")
    }

    fn seen(&self) -> BTreeMap<u64, Seen> {
        let seen = |member: &Member| {
            let Some(machine) = self.machines.get(&member.slot).filter(|_| member.instance_id.is_some())
            else {
                let known = member.instance_id.is_none();
                return Seen { health: if known { Health::Unknown } else { Health::Gone }, drained: true };
            };
            Seen { health: machine.health.clone(), drained: machine.left == 0 }
        };
        self.group.members.iter().map(|member| (member.slot, seen(member))).collect()
    }

    fn healthy(&self, group: &Group, seen: &BTreeMap<u64, Seen>) -> u32 {
        let healthy = |member: &&Member| {
            member.state == MemberState::InService && seen[&member.slot].health == Health::Healthy
        };
        count(group.members.iter().filter(healthy))
    }

    /// One look of a reconciler, which may be killed at any moment.
    fn look(&mut self) {
        let (before, seen) = (self.group.clone(), self.seen());
        let Some(next) = advance(&before, &seen, self.now) else { panic!("it is not deleted") };
        self.check(&before, &next, &seen);
        self.group = next;
        if self.killed() {
            return;
        }
        for member in self.group.members.clone() {
            match member.state {
                MemberState::Launching => {
                    if !self.machines.contains_key(&member.slot) && self.refuses() {
                        self.group.members.retain(|other| other.slot != member.slot);
                        launch_failed(&mut self.group, member.template_version, "no room", self.now);
                        continue;
                    }
                    let left = self.dice.below(4) + 1;
                    let fresh = Machine { slot: member.slot, health: Health::Starting, left, ending: false };
                    self.machines.entry(member.slot).or_insert(fresh);
                    if self.killed() {
                        return;
                    }
                    let now = self.now;
                    let known =
                        self.group.members.iter_mut().find(|other| other.slot == member.slot).unwrap();
                    known.instance_id = Some(Self::id(member.slot));
                    known.state = MemberState::Pending;
                    known.since = now;
                }
                MemberState::Terminating => {
                    if let Some(machine) = self.machines.get_mut(&member.slot) {
                        machine.ending = true;
                        machine.health = Health::Ended("terminated".into());
                    }
                }
                _ => {}
            }
        }
    }

    fn killed(&mut self) -> bool {
        !self.calm && self.dice.one_in(5)
    }

    fn refuses(&mut self) -> bool {
        !self.calm && self.dice.one_in(8)
    }

    /// Time passes, and machines come up, drain, break and go.
    fn pass(&mut self) {
        self.now += TimeDelta::seconds(self.dice.below(8).cast_signed() + 1);
        let versions: BTreeMap<u64, u32> =
            self.group.members.iter().map(|member| (member.slot, member.template_version)).collect();
        for machine in self.machines.values_mut() {
            machine.left = machine.left.saturating_sub(1);
            if machine.health == Health::Starting && machine.left == 0 {
                let bad = versions.get(&machine.slot).is_some_and(|version| self.bad.contains(version));
                machine.health = if bad { Health::Unhealthy("500".into()) } else { Health::Healthy };
            }
            if !self.calm && machine.health == Health::Healthy && self.dice.one_in(60) {
                machine.health = match self.dice.below(3) {
                    0 => Health::Unhealthy("500".into()),
                    1 => Health::Ended("it is stopped".into()),
                    _ => Health::Gone,
                };
            }
        }
        self.machines
            .retain(|_, machine| !(machine.ending && machine.left == 0) && machine.health != Health::Gone);
    }

    fn roll(&mut self, min_healthy_percent: u32, max_healthy_percent: u32, bad: bool) {
        let from = self.group.template_version;
        let to = self.group.templates.keys().last().unwrap().max(&from) + 1;
        let to = self
            .group
            .roll
            .as_ref()
            .map_or(to, |roll| to.max(roll.from_version + 1).max(roll.to_version + 1));
        if bad {
            self.bad.insert(to);
        }
        self.group.templates.insert(to, serde_json::json!({}));
        self.group.template_version = to;
        self.group.roll = Some(Roll {
            from_version: from,
            to_version: to,
            status: RollStatus::InProgress,
            min_healthy_percent,
            max_healthy_percent,
            replaced: 0,
            started: self.now,
            ended: None,
            reason: None,
        });
    }

    /// What must hold of one look.
    fn check(&self, before: &Group, next: &Group, seen: &BTreeMap<u64, Seen>) {
        let target = next.target();
        let active = |group: &Group| count(group.members.iter().filter(|member| member.state.counts()));
        // A roll may have begun or ended in this very look.
        let rolls = [before, next].map(|group| group.rolling().cloned());
        let surge = rolls.iter().flatten().map(|roll| roll.surge(target)).max().unwrap_or(0);
        let unresolved = count(next.members.iter().filter(|member| member.state == MemberState::Launching));
        if !before.paused {
            assert!(
                active(next) <= target + surge || unresolved > 0 && active(next) <= active(before),
                "{} of {target} and {surge}: {next:#?}",
                active(next)
            );
        }
        // No healthy one is taken away that is needed.
        let (had, has) = (self.healthy(before, seen), self.healthy(next, seen));
        let keep = rolls.iter().flatten().map(|roll| roll.min_healthy(target)).min().unwrap_or(target);
        assert!(
            has >= had || has >= keep || next.deletion.is_some(),
            "{has} healthy, {had} before, of {target}: {next:#?}"
        );
        // Whatever was run has a member that answers for it.
        for (slot, machine) in self.machines.iter().filter(|(_, machine)| !machine.ending) {
            let known = next.members.iter().any(|member| member.slot == *slot);
            assert!(known || machine.health == Health::Gone, "{slot} is nobody's: {next:#?}");
        }
    }

    fn settle(&mut self) {
        self.calm = true;
        self.group.paused = false;
        for _ in 0..2000 {
            self.look();
            self.pass();
            if self.group.state == GroupState::Active && self.group.rolling().is_none() {
                return;
            }
        }
        panic!("it does not come to rest: {:#?}", self.group);
    }
}

#[test]
fn whatever_happens_it_is_never_too_many_nor_needlessly_too_few() {
    for seed in 1..200_u64 {
        let mut world = World::new(3, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        world.settle();
        world.calm = false;
        for _ in 0..300 {
            match world.dice.below(40) {
                0 => world.group.desired_capacity = u32::try_from(1 + world.dice.below(8)).unwrap(),
                1 | 2 if world.group.rolling().is_none() => {
                    let (min, max) = (world.dice.below(101), 100 + world.dice.below(101));
                    let bad = world.dice.one_in(3);
                    world.roll(u32::try_from(min).unwrap(), u32::try_from(max).unwrap(), bad);
                }
                3 => roll_back(&mut world.group, "by request", world.now),
                4 => world.group.paused = !world.group.paused,
                _ => {}
            }
            world.look();
            world.pass();
        }
        let target = world.group.target() as usize;
        world.settle();
        assert_eq!(world.group.members.len(), target);
        let version = world.group.template_version;
        assert!(!world.bad.contains(&version), "a bad template was rolled back");
        assert_eq!(world.machines.values().filter(|machine| !machine.ending).count(), target);
    }
}

#[test]
fn a_roll_keeps_what_it_promises_and_ends() {
    for (desired, min, max, most, least) in
        [(2, 90, 100, 3, 2), (4, 50, 100, 4, 2), (1, 90, 100, 2, 1), (1, 0, 100, 1, 0), (5, 100, 200, 10, 5)]
    {
        let mut world = World::new(desired, 7);
        world.settle();
        world.roll(min, max, false);
        let (mut fewest, mut top) = (u32::MAX, 0);
        while world.group.rolling().is_some() {
            world.look();
            fewest = fewest.min(world.healthy(&world.group, &world.seen()));
            top = top.max(count(world.group.members.iter().filter(|member| member.state.counts())));
            world.pass();
        }
        assert!(fewest >= least && top <= most, "{desired}: {fewest} to {top}");
        assert_eq!(world.group.roll.as_ref().unwrap().status, RollStatus::Successful);
        assert!(world.group.members.iter().all(|m| m.template_version == 2 || !m.state.counts()));
    }
}

#[test]
fn a_bad_template_is_rolled_back_and_says_why() {
    let mut world = World::new(3, 3);
    world.settle();
    world.roll(90, 100, true);
    while world.group.rolling().is_some() {
        world.look();
        assert!(world.healthy(&world.group, &world.seen()) >= 3, "{:#?}", world.group);
        world.pass();
    }
    let roll = world.group.roll.clone().unwrap();
    assert_eq!(roll.status, RollStatus::RolledBack);
    assert!(roll.reason.as_ref().unwrap().contains("not healthy within 100 s: 500"), "{roll:?}");
    world.settle();
    assert_eq!(world.group.template_version, 1);
    assert_eq!(world.group.templates.len(), 1);
    assert_eq!(world.group.next_slot, 5, "one new member was tried");
}

#[test]
fn launches_that_fail_are_tried_ever_less_often() {
    let mut world = World::new(3, 5);
    world.bad.insert(1);
    let begun = world.now;
    let mut seen_waiting = false;
    while world.now - begun < TimeDelta::hours(4) {
        world.look();
        seen_waiting |= world.group.state == GroupState::BackingOff;
        world.pass();
    }
    assert!(seen_waiting && world.group.failures > 5, "{:#?}", world.group);
    assert!(world.group.next_slot < 30, "{} were tried", world.group.next_slot - 1);
    let why = world.group.state_reason.as_ref().unwrap();
    assert!(why.code == "Server.LaunchFailed" && why.message.contains("500"), "{why:?}");
    // Once it works it works at once.
    world.bad.clear();
    world.settle();
    for _ in 0..40 {
        world.look();
        world.pass();
    }
    assert_eq!((world.group.failures, world.group.state_reason.clone()), (0, None));
}

#[test]
fn who_goes_first() {
    let mut world = World::new(4, 9);
    world.settle();
    // Another template for new ones; one is pending, and one of the old ones is the oldest.
    world.group.templates.insert(2, serde_json::json!({}));
    world.group.template_version = 2;
    world.group.desired_capacity = 6;
    world.settle();
    world.group.desired_capacity = 4;
    world.settle();
    let slots: Vec<(u64, u32)> = world.group.members.iter().map(|m| (m.slot, m.template_version)).collect();
    assert_eq!(slots, [(3, 1), (4, 1), (5, 2), (6, 2)]);
}

#[test]
fn a_deleted_group_goes_with_its_members_or_leaves_them() {
    let mut world = World::new(2, 11);
    world.settle();
    let mut kept = world.group.clone();
    kept.deletion = Some(Deletion::Keep);
    assert_eq!(advance(&kept, &world.seen(), world.now), None);
    kept.members[0].state = MemberState::Launching;
    assert!(advance(&kept, &world.seen(), world.now).is_some(), "it is not known yet what that one has");
    world.group.deletion = Some(Deletion::Terminate);
    for _ in 0..100 {
        let Some(next) = advance(&world.group, &world.seen(), world.now) else { return };
        assert_eq!(next.state, GroupState::Deleting);
        world.look();
        world.pass();
    }
    panic!("{:#?}", world.group);
}
