//! Groups of like instances, as EC2 Auto Scaling knows them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::StateReason;

/// A group: keeps a number of instances of one template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Group {
    /// `grp-` and 17 hexadecimal digits.
    pub id: String,
    /// Unique.
    pub name: String,
    pub created: DateTime<Utc>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    pub state: GroupState,
    pub state_since: DateTime<Utc>,
    /// Why it is in this state, where that is not as it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<StateReason>,
    pub min_size: u32,
    pub max_size: u32,
    /// `min_size` to `max_size`.
    pub desired_capacity: u32,
    /// The template of new members.
    pub template_version: u32,
    /// Requests to run an instance, by version: the current one, and those that are still needed.
    #[schema(value_type = BTreeMap<u32, Object>)]
    pub templates: BTreeMap<u32, Value>,
    #[serde(default)]
    pub health_check_type: HealthCheckType,
    /// How long a new member may take until it is healthy.
    pub health_check_grace_seconds: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaling: Option<TargetTracking>,
    /// When `desired_capacity` was last changed by `scaling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scaled: Option<DateTime<Utc>>,
    #[serde(default)]
    pub schedules: Vec<Schedule>,
    /// Times of schedules up to here have been seen to.
    pub schedules_until: DateTime<Utc>,
    pub members: Vec<Member>,
    /// Number of the next member.
    pub next_slot: u64,
    /// The last roll.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roll: Option<Roll>,
    /// Nothing is launched or terminated.
    #[serde(default)]
    pub paused: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion: Option<Deletion>,
    /// Launches that failed in a row.
    #[serde(default)]
    pub failures: u32,
    /// Until then nothing is launched, since launches failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<DateTime<Utc>>,
    /// What was done last, and why; the newest is the last.
    #[serde(default)]
    pub activities: Vec<Activity>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GroupState {
    /// It is what it should be.
    Active,
    /// Members come or go.
    Scaling,
    /// Members are being replaced by those of another template.
    Rolling,
    /// A roll has failed, and its members are being replaced by those of the template before.
    RollingBack,
    /// Launches failed; it waits before it tries again.
    BackingOff,
    /// Nothing is launched or terminated.
    Paused,
    Deleting,
}

impl GroupState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Scaling => "scaling",
            Self::Rolling => "rolling",
            Self::RollingBack => "rolling-back",
            Self::BackingOff => "backing-off",
            Self::Paused => "paused",
            Self::Deleting => "deleting",
        }
    }
}

/// Who says whether a member is healthy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HealthCheckType {
    /// The instance's status checks.
    #[default]
    Instance,
    /// They, and the health checks of the load balancers that lead to the group.
    LoadBalancer,
}

/// A place in the group, and the instance that fills it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    /// Counts up; no two members ever have the same.
    pub slot: u64,
    /// Absent until it has been run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
    pub template_version: u32,
    pub state: MemberState,
    /// When `state` became what it is.
    pub since: DateTime<Utc>,
    /// Why it is terminated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MemberState {
    /// Its instance is yet to be run.
    Launching,
    /// It is not healthy yet.
    Pending,
    InService,
    /// Load balancers let its connections come to an end.
    Draining,
    Terminating,
}

impl MemberState {
    /// Whether it is one of those that there are to be.
    pub fn counts(self) -> bool {
        matches!(self, Self::Launching | Self::Pending | Self::InService)
    }
}

/// Keeps the members' mean CPU usage at a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TargetTracking {
    /// Percent of the members' vCPUs: 1 to 100.
    #[schema(minimum = 1, maximum = 100)]
    pub cpu_percent: u32,
    /// Least time between two changes.
    #[serde(default = "cooldown")]
    pub cooldown_seconds: u64,
}

fn cooldown() -> u64 {
    300
}

/// Sizes from certain times on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Unique in its group.
    pub name: String,
    /// When, in UTC: minute, hour, day of the month, month, day of the week, as `0 8 * * MON-FRI`.
    pub cron: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_size: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_size: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_capacity: Option<u32>,
}

/// The replacement of all members by those of another template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Roll {
    pub from_version: u32,
    pub to_version: u32,
    pub status: RollStatus,
    /// So much of `desired_capacity` stays healthy.
    pub min_healthy_percent: u32,
    /// No more than so much of it is there.
    pub max_healthy_percent: u32,
    /// Members in service that are as they are to be.
    pub replaced: u32,
    pub started: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<DateTime<Utc>>,
    /// Why it was rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RollStatus {
    InProgress,
    Successful,
    RollbackInProgress,
    RolledBack,
}

/// How a group is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Deletion {
    /// With its instances.
    Terminate,
    /// Its instances stay, as anybody's.
    Keep,
}

/// Something that was done, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Activity {
    pub at: DateTime<Utc>,
    pub description: String,
}

/// Activities that are kept.
const ACTIVITIES: usize = 32;

impl Group {
    /// Instances there are to be.
    pub fn target(&self) -> u32 {
        self.desired_capacity.clamp(self.min_size, self.max_size)
    }

    /// The roll that is under way.
    pub fn rolling(&self) -> Option<&Roll> {
        let under_way =
            |roll: &&Roll| matches!(roll.status, RollStatus::InProgress | RollStatus::RollbackInProgress);
        self.roll.as_ref().filter(under_way)
    }

    /// Notes what was done.
    pub fn note(&mut self, at: DateTime<Utc>, description: String) {
        if self.activities.len() >= ACTIVITIES {
            self.activities.remove(0);
        }
        self.activities.push(Activity { at, description });
    }
}

impl Roll {
    /// Members that must stay healthy, of `target`.
    pub fn min_healthy(&self, target: u32) -> u32 {
        let percent = u64::from(target) * u64::from(self.min_healthy_percent);
        u32::try_from(percent.div_ceil(100)).unwrap_or(target).min(target)
    }

    /// Members that may be there besides `target`. One at least, where none may be missing.
    pub fn surge(&self, target: u32) -> u32 {
        let above = u64::from(target) * u64::from(self.max_healthy_percent.saturating_sub(100)) / 100;
        let least = u32::from(self.min_healthy(target) >= target);
        u32::try_from(above).unwrap_or(u32::MAX).max(least)
    }
}
