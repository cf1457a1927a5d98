//! What a group does next: from its record, and what is seen of its members, to the record as it is to be. Pure;
//! whoever calls this writes the new record down first, and then does what it says:
//!
//! ```text
//!            run                 healthy              taken away, or unhealthy
//! launching ─────▶ pending ────────────▶ in-service ──────────────────────▶ draining ─▶ terminating ─▶ gone
//!     │               └── not healthy in time, or ended: a failed launch ──────▲             ▲
//!     └── refused: a failed launch                            (no load balancer leads to it) ─┘
//! ```
//!
//! A member in `launching` has its number from the record, and the request that runs it has a token made of that
//! number: whoever finds the record after a crash sends the same request, and gets the same instance. So a slot
//! never has two instances, and a slot in `launching` is never dropped before it is known whether it has one.
//!
//! Failed launches in a row make the group wait before the next one, longer each time, and try one at a time.
//! A failed launch of a roll's new template ends the roll, and all goes back to the template before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::model::{
    Deletion, Group, GroupState, Member, MemberState, RollStatus, StateReason, reason as state_reason,
};

/// First pause after a failed launch; it doubles with each in a row.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(900);
/// Members that have been in service this long show that launches succeed.
const STABLE: TimeDelta = TimeDelta::seconds(60);
/// A load balancer that never lets go of a member does not keep it for ever: beyond the longest delay there is.
const LONGEST_DRAIN: TimeDelta = TimeDelta::seconds(3600 + 60);

/// What is seen of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub health: Health,
    /// No load balancer leads to it any more.
    pub drained: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has no instance that is known.
    Unknown,
    Starting,
    Healthy,
    /// A check says so.
    Unhealthy(String),
    /// It does not run, and will not by itself.
    Ended(String),
    /// Its instance is no more.
    Gone,
}

/// The record as it is to be; None if it is to be removed.
pub fn advance(group: &Group, seen: &BTreeMap<u64, Seen>, now: DateTime<Utc>) -> Option<Group> {
    let mut next = Planning { group: group.clone(), seen, now };
    next.take_note();
    if next.group.deletion.is_some() {
        if next.delete() {
            return None;
        }
    } else if !next.group.paused {
        next.replace_unhealthy();
        next.size();
    }
    next.let_go();
    next.finish_roll();
    next.name_state();
    Some(next.group)
}

/// A launch has failed: refused, or never healthy.
pub fn launch_failed(group: &mut Group, version: u32, why: &str, now: DateTime<Utc>) {
    group.failures = group.failures.saturating_add(1);
    let pause = FIRST_PAUSE.saturating_mul(1 << group.failures.saturating_sub(1).min(16)).min(LONGEST_PAUSE);
    group.retry_at = TimeDelta::from_std(pause).ok().and_then(|pause| now.checked_add_signed(pause));
    group.state_reason = Some(state_reason::new("Server.LaunchFailed", why));
    group.note(now, format!("a launch of template {version} failed: {why}"));
    let to_blame = group
        .roll
        .as_ref()
        .is_some_and(|roll| roll.status == RollStatus::InProgress && roll.to_version == version);
    if to_blame {
        roll_back(group, why, now);
    }
}

/// Has the roll that is under way replaced by its contrary.
pub fn roll_back(group: &mut Group, why: &str, now: DateTime<Utc>) {
    let Some(roll) = group.roll.as_mut().filter(|roll| roll.status == RollStatus::InProgress) else { return };
    std::mem::swap(&mut roll.from_version, &mut roll.to_version);
    roll.status = RollStatus::RollbackInProgress;
    roll.reason = Some(why.to_owned());
    let (from, to) = (roll.from_version, roll.to_version);
    group.template_version = to;
    // The template that is gone back to is not the one that failed.
    group.failures = 0;
    group.retry_at = None;
    group.note(now, format!("rolling back from template {from} to {to}: {why}"));
}

struct Planning<'a> {
    group: Group,
    seen: &'a BTreeMap<u64, Seen>,
    now: DateTime<Utc>,
}

impl Planning<'_> {
    fn health(&self, slot: u64) -> &Health {
        self.seen.get(&slot).map_or(&Health::Unknown, |seen| &seen.health)
    }

    fn is_healthy(&self, member: &Member) -> bool {
        member.state == MemberState::InService && *self.health(member.slot) == Health::Healthy
    }

    fn backs_off(&self) -> bool {
        self.group.retry_at.is_some_and(|until| until > self.now)
    }

    fn age(&self, member: &Member) -> TimeDelta {
        self.now - member.since
    }

    fn active(&self) -> impl Iterator<Item = &Member> {
        self.group.members.iter().filter(|member| member.state.counts())
    }

    fn change(&mut self, slot: u64, state: MemberState, why: Option<String>) {
        let now = self.now;
        let Some(member) = self.group.members.iter_mut().find(|member| member.slot == slot) else { return };
        member.state = state;
        member.since = now;
        if why.is_some() {
            member.reason = why;
        }
    }

    /// Members that are gone, that have become healthy, or never did.
    fn take_note(&mut self) {
        let grace = TimeDelta::try_seconds(self.group.health_check_grace_seconds.min(1 << 31).cast_signed())
            .unwrap_or(TimeDelta::MAX);
        for member in self.group.members.clone() {
            let Member { slot, state, template_version, .. } = member;
            let health = self.health(slot).clone();
            let failed = match (state, health) {
                (MemberState::Launching, _) | (_, Health::Unknown) => continue,
                (state, Health::Gone) => {
                    self.group.members.retain(|member| member.slot != slot);
                    if !state.counts() {
                        continue;
                    }
                    "its instance was terminated by somebody else".to_owned()
                }
                (MemberState::Pending, Health::Healthy) => {
                    self.change(slot, MemberState::InService, None);
                    continue;
                }
                (MemberState::Pending, Health::Ended(why)) => {
                    self.drain(slot, &why);
                    why
                }
                (MemberState::Pending, Health::Starting | Health::Unhealthy(_))
                    if self.age(&member) > grace =>
                {
                    let seconds = self.group.health_check_grace_seconds;
                    let why = match self.health(slot) {
                        Health::Unhealthy(why) => format!("it was not healthy within {seconds} s: {why}"),
                        _ => format!("it was not healthy within {seconds} s"),
                    };
                    self.drain(slot, &why);
                    why
                }
                _ => continue,
            };
            match state {
                MemberState::Pending => launch_failed(&mut self.group, template_version, &failed, self.now),
                _ => self.lost(&member, &failed),
            }
        }
        let stable = self.group.failures > 0
            && self.active().count() >= self.group.target() as usize
            && self.active().all(|member| self.is_healthy(member) && self.age(member) >= STABLE);
        if stable {
            self.group.failures = 0;
            self.group.retry_at = None;
            self.group.state_reason = None;
        }
    }

    /// A member that was in service is no longer. If it was so shortly only, its launch has failed after all.
    fn lost(&mut self, member: &Member, why: &str) {
        let of = member.instance_id.as_deref().unwrap_or("an instance");
        self.group.note(self.now, format!("{of} is replaced: {why}"));
        let new_of_roll = self.group.roll.as_ref().is_some_and(|roll| {
            roll.status == RollStatus::InProgress && roll.to_version == member.template_version
        });
        if new_of_roll || self.age(member) < STABLE {
            launch_failed(&mut self.group, member.template_version, why, self.now);
        }
    }

    fn replace_unhealthy(&mut self) {
        let in_service = |member: &&Member| member.state == MemberState::InService;
        for member in self.active().filter(in_service).cloned().collect::<Vec<_>>() {
            let why = match self.health(member.slot) {
                Health::Ended(why) => why.clone(),
                // As long as there is none to put in its place it may be of some use.
                Health::Unhealthy(why) if !self.backs_off() => why.clone(),
                _ => continue,
            };
            self.drain(member.slot, &why);
            self.lost(&member, &why);
        }
    }

    /// Launches what lacks, and takes away what is too much.
    fn size(&mut self) {
        let target = self.group.target();
        let Some(roll) = self.group.rolling().cloned() else {
            let active = count(self.active());
            self.take_away(active.saturating_sub(target), target, "there were more than wanted");
            self.launch(target.saturating_sub(active));
            return;
        };
        let most = target.saturating_add(roll.surge(target));
        let (active, new) =
            (count(self.active()), count(self.active().filter(|m| m.template_version == roll.to_version)));
        self.take_away(active.saturating_sub(most), roll.min_healthy(target), "there were more than wanted");
        // Those of the other template go as new ones stand in for them.
        let healthy = count(self.active().filter(|member| self.is_healthy(member)));
        let mut spare = healthy.saturating_sub(roll.min_healthy(target));
        let mut old: Vec<Member> = self
            .active()
            .filter(|m| m.template_version != roll.to_version && m.state != MemberState::Launching)
            .cloned()
            .collect();
        old.sort_by_key(|member| (self.is_healthy(member), member.slot));
        for member in old {
            if self.is_healthy(&member) {
                if spare == 0 {
                    break;
                }
                spare -= 1;
            }
            self.drain(member.slot, &format!("replaced by template {}", roll.to_version));
        }
        let active = count(self.active());
        self.launch(target.saturating_sub(new).min(most.saturating_sub(active)));
    }

    fn launch(&mut self, lacking: u32) {
        if lacking == 0 || self.backs_off() {
            return;
        }
        let under_way = self.active().any(|member| member.state != MemberState::InService);
        let number = match (self.group.failures, under_way) {
            (0, _) => lacking,
            (_, false) => 1,
            (_, true) => 0,
        };
        for _ in 0..number {
            let slot = self.group.next_slot;
            self.group.next_slot = slot.saturating_add(1);
            self.group.members.push(Member {
                slot,
                instance_id: None,
                template_version: self.group.template_version,
                state: MemberState::Launching,
                since: self.now,
                reason: None,
            });
        }
    }

    /// Those that are not healthy go first, then those of the oldest template, and of these the oldest. What is
    /// launching cannot be taken back yet; no healthy one that is needed goes in its place.
    fn take_away(&mut self, number: u32, keep: u32, why: &str) {
        let wanted = self.group.template_version;
        let mut active: Vec<Member> =
            self.active().filter(|member| member.state != MemberState::Launching).cloned().collect();
        active.sort_by_key(|member| {
            let current = member.template_version == wanted;
            (self.is_healthy(member), current, member.template_version, member.slot)
        });
        let mut spare = count(active.iter().filter(|member| self.is_healthy(member))).saturating_sub(keep);
        for member in active.into_iter().take(number as usize) {
            if self.is_healthy(&member) {
                if spare == 0 {
                    return;
                }
                spare -= 1;
            }
            self.drain(member.slot, why);
        }
    }

    fn drain(&mut self, slot: u64, why: &str) {
        let member = self.group.members.iter().find(|member| member.slot == slot);
        let Some(instance) = member.and_then(|member| member.instance_id.clone()) else { return };
        self.change(slot, MemberState::Draining, Some(why.to_owned()));
        self.group.note(self.now, format!("{instance} is taken away: {why}"));
    }

    /// Terminates those that nobody is connected to any more.
    fn let_go(&mut self) {
        let draining = |member: &&Member| member.state == MemberState::Draining;
        for member in self.group.members.iter().filter(draining).cloned().collect::<Vec<_>>() {
            let drained = self.seen.get(&member.slot).is_some_and(|seen| seen.drained);
            let ended = matches!(self.health(member.slot), Health::Ended(_) | Health::Gone);
            if drained || ended || self.age(&member) > LONGEST_DRAIN {
                self.change(member.slot, MemberState::Terminating, None);
            }
        }
    }

    /// Whether nothing is left to do before the record goes.
    fn delete(&mut self) -> bool {
        match self.group.deletion {
            // What is being launched is known first, so that it does not come to be anybody's later.
            Some(Deletion::Keep) => {
                self.group.members.iter().all(|member| member.state != MemberState::Launching)
            }
            Some(Deletion::Terminate) => {
                let slots: Vec<u64> = self.active().map(|member| member.slot).collect();
                for slot in slots {
                    self.drain(slot, "the group is deleted");
                }
                self.group.members.is_empty()
            }
            None => false,
        }
    }

    fn finish_roll(&mut self) {
        let target = self.group.target();
        let Some(under_way) = self.group.rolling() else { return };
        let to = under_way.to_version;
        let new = self.active().filter(|member| member.template_version == to);
        let replaced = count(new.filter(|member| self.is_healthy(member)));
        let old = self.active().any(|member| member.template_version != to);
        let now = self.now;
        let Some(roll) = &mut self.group.roll else { return };
        roll.replaced = replaced;
        if old || replaced < target || self.group.deletion.is_some() || self.group.paused {
            return;
        }
        let back = roll.status == RollStatus::RollbackInProgress;
        roll.status = if back { RollStatus::RolledBack } else { RollStatus::Successful };
        roll.ended = Some(now);
        self.group.note(now, format!("all members are of template {to}"));
    }

    fn name_state(&mut self) {
        let needed: BTreeSet<u32> = self.group.members.iter().map(|member| member.template_version).collect();
        let roll = self.group.rolling().map(|roll| [roll.from_version, roll.to_version]).unwrap_or_default();
        let current = self.group.template_version;
        self.group
            .templates
            .retain(|version, _| *version == current || needed.contains(version) || roll.contains(version));
        let target = self.group.target() as usize;
        let all_there = self.group.members.len() == target
            && self.group.members.iter().all(|member| member.state == MemberState::InService);
        let state = match self.group.rolling().map(|roll| roll.status) {
            _ if self.group.deletion.is_some() => GroupState::Deleting,
            _ if self.group.paused => GroupState::Paused,
            _ if self.backs_off() && !all_there => GroupState::BackingOff,
            Some(RollStatus::RollbackInProgress) => GroupState::RollingBack,
            Some(_) => GroupState::Rolling,
            None if all_there => GroupState::Active,
            None => GroupState::Scaling,
        };
        if state == GroupState::Active && self.group.failures == 0 {
            self.group.state_reason = None;
        }
        if state == GroupState::RollingBack
            && let Some(why) = self.group.roll.as_ref().and_then(|roll| roll.reason.clone())
        {
            self.group.state_reason =
                Some(StateReason { code: "Server.RollFailed".to_owned(), message: why });
        }
        if self.group.state != state {
            self.group.state = state;
            self.group.state_since = self.now;
        }
    }
}

fn count<'a>(members: impl Iterator<Item = &'a Member>) -> u32 {
    u32::try_from(members.count()).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
