//! What users ask of groups. Each request only writes down what is wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use utoipa::ToSchema;

use super::{Groups, find, plan, schedule};
use crate::instances::{Error, RunInstances};
use crate::model::{
    Deletion, Group, GroupState, HealthCheckType, Kind, Roll, RollStatus, Schedule, TargetTracking,
    check_name, check_tags, id,
};
use crate::records::{Changes, Tables};

/// Most members of a group.
const MAX_SIZE: u32 = 1000;
const MAX_SCHEDULES: usize = 32;
/// Longest grace and cool-down, in seconds: a day.
const LONGEST: u64 = 86_400;

/// A request to make a group.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateGroup {
    pub name: String,
    /// The request that runs a member; without counts, token, address and published ports.
    pub template: RunInstances,
    /// 0 if absent.
    #[serde(default)]
    pub min_size: u32,
    /// The desired capacity if absent.
    #[serde(default)]
    pub max_size: Option<u32>,
    pub desired_capacity: u32,
    #[serde(default)]
    pub health_check_type: HealthCheckType,
    /// 300 if absent.
    #[serde(default = "grace")]
    pub health_check_grace_seconds: u64,
    #[serde(default)]
    pub scaling: Option<TargetTracking>,
    #[serde(default)]
    pub schedules: Vec<Schedule>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

fn grace() -> u64 {
    300
}

/// What of a group is to be changed; the rest stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModifyGroup {
    #[serde(default)]
    pub min_size: Option<u32>,
    #[serde(default)]
    pub max_size: Option<u32>,
    #[serde(default)]
    pub desired_capacity: Option<u32>,
    /// For members that are launched from now on; `roll` replaces those there are.
    #[serde(default)]
    pub template: Option<RunInstances>,
    #[serde(default)]
    pub health_check_type: Option<HealthCheckType>,
    #[serde(default)]
    pub health_check_grace_seconds: Option<u64>,
    /// `null` ends it.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<TargetTracking>)]
    pub scaling: Option<Option<TargetTracking>>,
    /// All of them.
    #[serde(default)]
    pub schedules: Option<Vec<Schedule>>,
    /// All of them.
    #[serde(default)]
    pub tags: Option<BTreeMap<String, String>>,
}

/// Tells `null` from what is absent.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(value: D) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

/// How to replace all members.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollGroup {
    /// Id or name of another image, all else as it is.
    #[serde(default)]
    pub image: Option<String>,
    /// Another template. Without it and `image` members are replaced by new ones of the same.
    #[serde(default)]
    pub template: Option<RunInstances>,
    /// So much of the desired capacity stays healthy: 0 to 100; 90 if absent.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 100)]
    pub min_healthy_percent: Option<u32>,
    /// No more than so much of it is there: 100 to 200; 100 if absent. One more is there all the same, where none
    /// may be missing.
    #[serde(default)]
    #[schema(minimum = 100, maximum = 200)]
    pub max_healthy_percent: Option<u32>,
}

/// How to delete a group.
#[derive(Clone, Copy, Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DeleteGroup {
    /// Its instances stay, as anybody's; else they are terminated.
    #[serde(default)]
    pub keep_instances: bool,
}

impl Groups {
    /// Makes a group; its members are launched behind this.
    ///
    /// # Errors
    ///
    /// There is one of this name, or something in the request cannot be.
    pub async fn create(&self, request: CreateGroup) -> Result<Arc<Group>, Error> {
        check_name(&request.name)?;
        let template = self.template(request.template).await?;
        let now = self.pace.now();
        let group = Group {
            id: id::new(id::GROUP),
            name: request.name,
            created: now,
            tags: request.tags,
            state: GroupState::Scaling,
            state_since: now,
            state_reason: None,
            min_size: request.min_size,
            max_size: request.max_size.unwrap_or(request.desired_capacity.max(request.min_size)),
            desired_capacity: request.desired_capacity,
            template_version: 1,
            templates: [(1, template)].into(),
            health_check_type: request.health_check_type,
            health_check_grace_seconds: request.health_check_grace_seconds,
            scaling: request.scaling,
            last_scaled: None,
            schedules: request.schedules,
            schedules_until: now,
            members: Vec::new(),
            next_slot: 1,
            roll: None,
            paused: false,
            deletion: None,
            failures: 0,
            retry_at: None,
            activities: Vec::new(),
        };
        check(&group)?;
        let create = |tables: &Tables, changes: &mut Changes| {
            if tables.groups.iter().any(|known| known.name == group.name) {
                return Err(Error::Exists { kind: Kind::Group, name: group.name.clone() });
            }
            changes.create(&group);
            Ok(())
        };
        self.records().update(create).await?;
        Ok(Arc::new(group))
    }

    /// Changes a group.
    ///
    /// # Errors
    ///
    /// There is none, a value cannot be, or its template is to change in the middle of a roll.
    pub async fn modify(&self, id: &str, request: ModifyGroup) -> Result<Arc<Group>, Error> {
        let template = match request.template.clone() {
            Some(template) => Some(self.template(template).await?),
            None => None,
        };
        self.change(id, |group| {
            group.min_size = request.min_size.unwrap_or(group.min_size);
            group.max_size = request.max_size.unwrap_or(group.max_size);
            group.desired_capacity = request.desired_capacity.unwrap_or(group.desired_capacity);
            if let Some(template) = &template {
                refuse_rolling(group)?;
                new_template(group, template.clone());
            }
            group.health_check_type = request.health_check_type.unwrap_or(group.health_check_type);
            group.health_check_grace_seconds =
                request.health_check_grace_seconds.unwrap_or(group.health_check_grace_seconds);
            group.scaling = request.scaling.unwrap_or(group.scaling);
            if let Some(schedules) = &request.schedules {
                group.schedules.clone_from(schedules);
                group.schedules_until = self.pace.now();
            }
            if let Some(tags) = &request.tags {
                group.tags.clone_from(tags);
            }
            check(group)
        })
        .await
    }

    /// Replaces all members, a few at a time. If new ones do not become healthy, all goes back.
    ///
    /// # Errors
    ///
    /// There is no such group, it is paused or rolling already, or something in the request cannot be.
    pub async fn roll(&self, id: &str, request: RollGroup) -> Result<Arc<Group>, Error> {
        let min_healthy_percent = request.min_healthy_percent.unwrap_or(90);
        let max_healthy_percent = request.max_healthy_percent.unwrap_or(100);
        if min_healthy_percent > 100 {
            return Err(Error::invalid("min_healthy_percent", "must be 0 to 100"));
        }
        if !(100..=200).contains(&max_healthy_percent) {
            return Err(Error::invalid("max_healthy_percent", "must be 100 to 200"));
        }
        let template = self.template_to_roll(id, request).await?;
        let now = self.pace.now();
        self.change(id, |group| {
            refuse_rolling(group)?;
            if group.paused {
                return Err(state(group, "paused", "`pulau group resume` goes on with it"));
            }
            let from_version = group.template_version;
            new_template(group, template.clone());
            group.failures = 0;
            group.retry_at = None;
            group.roll = Some(Roll {
                from_version,
                to_version: group.template_version,
                status: RollStatus::InProgress,
                min_healthy_percent,
                max_healthy_percent,
                replaced: 0,
                started: now,
                ended: None,
                reason: None,
            });
            let note = format!("rolling from template {from_version} to {}", group.template_version);
            group.note(now, note);
            Ok(())
        })
        .await
    }

    async fn template_to_roll(&self, id: &str, request: RollGroup) -> Result<Value, Error> {
        if let Some(template) = request.template {
            if request.image.is_some() {
                return Err(Error::invalid("image", "is for a roll without template"));
            }
            return self.template(template).await;
        }
        let group = self.get(id)?;
        let Some(current) = group.templates.get(&group.template_version) else {
            return Err(Error::Internal(format!("{}: its template is missing", group.id)));
        };
        let mut template: RunInstances = serde_json::from_value(current.clone())
            .map_err(|error| Error::invalid("template", format_args!("give another one: {error}")))?;
        template.image = request.image.unwrap_or(template.image);
        self.template(template).await
    }

    /// Takes back the roll that is under way.
    ///
    /// # Errors
    ///
    /// There is no such group, or no roll of it is under way.
    pub async fn roll_back(&self, id: &str) -> Result<Arc<Group>, Error> {
        let now = self.pace.now();
        self.change(id, |group| {
            if group.rolling().is_none_or(|roll| roll.status != RollStatus::InProgress) {
                return Err(state(
                    group,
                    group.state.name(),
                    "only a roll that is under way can be taken back",
                ));
            }
            plan::roll_back(group, "by request", now);
            Ok(())
        })
        .await
    }

    /// Launches and terminates nothing any more.
    ///
    /// # Errors
    ///
    /// There is no such group.
    pub async fn pause(&self, id: &str) -> Result<Arc<Group>, Error> {
        self.change(id, |group| {
            group.paused = true;
            Ok(())
        })
        .await
    }

    /// Goes on. What failed before is tried again at once.
    ///
    /// # Errors
    ///
    /// There is no such group.
    pub async fn resume(&self, id: &str) -> Result<Arc<Group>, Error> {
        let now = self.pace.now();
        self.change(id, |group| {
            group.paused = false;
            group.failures = 0;
            group.retry_at = None;
            group.state_reason = None;
            // What schedules asked for meanwhile was not wanted.
            group.schedules_until = now;
            Ok(())
        })
        .await
    }

    /// Deletes a group, with its instances or without.
    ///
    /// # Errors
    ///
    /// There is none, or a load balancer leads to it.
    pub async fn delete(&self, id: &str, how: DeleteGroup) -> Result<(), Error> {
        let deletion = if how.keep_instances { Deletion::Keep } else { Deletion::Terminate };
        self.records()
            .update(|tables, changes| {
                let mut group = (*find(tables, id)?).clone();
                let leads = |balancer: &&Arc<crate::model::LoadBalancer>| {
                    balancer.group_id.as_deref() == Some(group.id.as_str())
                };
                if let Some(user) = tables.load_balancers.iter().find(leads) {
                    let by = format!("load balancer {}", user.name);
                    return Err(Error::InUse { kind: Kind::Group, id: group.name, by });
                }
                if group.deletion.is_none() {
                    group.deletion = Some(deletion);
                    group.state = GroupState::Deleting;
                    group.state_since = self.pace.now();
                    changes.replace(tables, &group);
                }
                Ok(())
            })
            .await
    }

    async fn change(
        &self,
        id: &str,
        mut change: impl FnMut(&mut Group) -> Result<(), Error>,
    ) -> Result<Arc<Group>, Error> {
        self.records()
            .update(|tables, changes| {
                let known = find(tables, id)?;
                let mut group = (*known).clone();
                if group.deletion.is_some() {
                    return Err(state(&group, "being deleted", "it cannot be changed any more"));
                }
                change(&mut group)?;
                if group != *known {
                    changes.replace(tables, &group);
                }
                Ok(Arc::new(group))
            })
            .await
    }

    /// Checks a template: the request it is would be fulfilled, if there is room.
    async fn template(&self, mut request: RunInstances) -> Result<Value, Error> {
        let counts = request.min_count.is_some() || request.max_count.is_some();
        let old_volume = request.volumes.iter().any(|volume| volume.volume_id.is_some());
        for (given, field) in [
            (old_volume, "a volume that exists"),
            (counts, "min_count and max_count"),
            (request.client_token.is_some(), "client_token"),
            (request.dry_run, "dry_run"),
            (request.private_address.is_some(), "private_address"),
            (!request.published_ports.is_empty(), "published_ports"),
            (request.termination_protection, "termination_protection"),
        ] {
            if given {
                return Err(Error::invalid("template", format_args!("{field} cannot be a member's")));
            }
        }
        // A name may come to mean another image later.
        let named = self.instances.images().into_iter().find(|image| image.name == request.image);
        if let Some(image) = named {
            request.image.clone_from(&image.id);
        }
        match self.instances.run(RunInstances { dry_run: true, ..request.clone() }).await {
            Err(Error::DryRun | Error::NoCapacity(_) | Error::NoAddress { .. }) | Ok(_) => {}
            Err(error) => return Err(error),
        }
        let mut value = serde_json::to_value(&request).map_err(|error| Error::Internal(error.to_string()))?;
        if let Value::Object(fields) = &mut value {
            fields.retain(|_, value| !value.is_null());
        }
        Ok(value)
    }
}

/// Makes this the template of new members.
fn new_template(group: &mut Group, template: Value) {
    // Versions are never used again: a member's slot was run from the one it names.
    let last = group.templates.keys().next_back().copied().unwrap_or_default();
    let last = group.roll.as_ref().map_or(last, |roll| last.max(roll.from_version).max(roll.to_version));
    group.template_version = last.saturating_add(1);
    group.templates.insert(group.template_version, template);
}

fn state(group: &Group, state: &str, needed: &'static str) -> Error {
    Error::State { kind: Kind::Group, id: group.name.clone(), state: state.to_owned(), needed }
}

fn refuse_rolling(group: &Group) -> Result<(), Error> {
    match group.rolling() {
        None => Ok(()),
        Some(_) => Err(state(group, group.state.name(), "wait until its roll has ended, or take that back")),
    }
}

fn check(group: &Group) -> Result<(), Error> {
    check_tags(&group.tags)?;
    if group.max_size > MAX_SIZE {
        return Err(Error::invalid("max_size", format_args!("must be at most {MAX_SIZE}")));
    }
    if group.min_size > group.max_size {
        return Err(Error::invalid("min_size", "must be at most max_size"));
    }
    if !(group.min_size..=group.max_size).contains(&group.desired_capacity) {
        return Err(Error::invalid("desired_capacity", "must be min_size to max_size"));
    }
    if !(1..=LONGEST).contains(&group.health_check_grace_seconds) {
        return Err(Error::invalid("health_check_grace_seconds", format_args!("must be 1 to {LONGEST}")));
    }
    if let Some(scaling) = group.scaling {
        if !(1..=100).contains(&scaling.cpu_percent) {
            return Err(Error::invalid("scaling", "cpu_percent must be 1 to 100"));
        }
        if scaling.cooldown_seconds > LONGEST {
            return Err(Error::invalid(
                "scaling",
                format_args!("cooldown_seconds must be at most {LONGEST}"),
            ));
        }
    }
    if group.schedules.len() > MAX_SCHEDULES {
        return Err(Error::invalid("schedules", format_args!("at most {MAX_SCHEDULES} are possible")));
    }
    let mut names = BTreeSet::new();
    for schedule in &group.schedules {
        check_name(&schedule.name)?;
        let invalid =
            |problem: String| Err(Error::invalid("schedules", format_args!("{}: {problem}", schedule.name)));
        if !names.insert(&schedule.name) {
            return invalid("is there twice".to_owned());
        }
        if let Some(problem) = schedule::problem(&schedule.cron) {
            return invalid(format!("cron {:?} {problem}", schedule.cron));
        }
        let sizes = [schedule.min_size, schedule.max_size, schedule.desired_capacity];
        if sizes.iter().all(Option::is_none) {
            return invalid("needs min_size, max_size or desired_capacity".to_owned());
        }
        if sizes.iter().flatten().any(|size| *size > MAX_SIZE) {
            return invalid(format!("sizes must be at most {MAX_SIZE}"));
        }
        if let (Some(min), Some(max)) = (schedule.min_size, schedule.max_size)
            && min > max
        {
            return invalid("min_size must be at most max_size".to_owned());
        }
    }
    Ok(())
}
