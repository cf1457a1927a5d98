//! Groups: a number of like instances is kept, healthy, at the size that is wanted, of the template that is
//! wanted.
//!
//! A reconciler looks at all groups whenever a record changes that may matter, and every second: [`plan`] says
//! what a group's record is to be, that is written down, and then done by the instances' [`Service`]'s public
//! functions. Each of these can be asked for again without harm, so a daemon that dies in between leaves nothing
//! that the next one does not finish. Load balancers are never called: they read which members are to be
//! targets from the group's record, and what they find out is read from theirs.

mod observe;
mod plan;
mod requests;
mod scale;
mod schedule;

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::fault;
use crate::instances::{Error, RunInstances, Service};
use crate::model::{Group, InstanceState, Kind, Member, MemberState};
use crate::records::{AnyRecord, RecordChange, Records};

use scale::Load;

pub use requests::{CreateGroup, DeleteGroup, ModifyGroup, RollGroup};

/// How fast a reconciler is, and what time it takes it to be. Tests move it.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Between two looks when nothing happens.
    pub tick: Duration,
    /// Between two samples of CPU usage.
    pub sample: Duration,
    /// Milliseconds that it is later than the host's clock says.
    pub ahead: Arc<AtomicI64>,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { tick: Duration::from_secs(1), sample: Duration::from_secs(10), ahead: Arc::default() }
    }
}

impl Pace {
    fn now(&self) -> DateTime<Utc> {
        Utc::now() + TimeDelta::milliseconds(self.ahead.load(Ordering::Relaxed))
    }
}

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Groups {
    instances: Service,
    pace: Pace,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Groups {
    /// Looks after all groups from now on.
    pub fn start(instances: Service, pace: Pace) -> Self {
        let groups = Groups { instances, pace, task: Arc::default() };
        let task = tokio::spawn(groups.clone().run());
        *groups.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        groups
    }

    /// Looks after them no longer; instances run on.
    pub fn let_go(&self) {
        if let Some(task) = self.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }

    fn records(&self) -> &Records {
        &self.instances.host().records
    }

    async fn run(self) {
        let mut changes = self.records().subscribe();
        let mut loads: HashMap<String, Load> = HashMap::new();
        let mut sampled = Instant::now();
        loop {
            let groups: Vec<Arc<Group>> = self.records().read().groups.iter().cloned().collect();
            for group in &groups {
                if let Err(error) = self.look_after(&group.id).await {
                    tracing::warn!(group = group.id, "will be tried again: {error}");
                }
            }
            if sampled.elapsed() >= self.pace.sample {
                sampled = Instant::now();
                loads.retain(|id, _| groups.iter().any(|group| group.id == *id && group.scaling.is_some()));
                for group in groups.iter().filter(|group| group.scaling.is_some()) {
                    let load = loads.entry(group.id.clone()).or_default();
                    if let Err(error) = self.scale(group, load).await {
                        tracing::warn!(group = group.id, "will be tried again: {error}");
                    }
                }
            }
            let tick = tokio::time::sleep(self.pace.tick);
            tokio::pin!(tick);
            loop {
                tokio::select! {
                    () = &mut tick => break,
                    change = changes.recv() => match change {
                        Ok(change) if !matters(&change) => {}
                        Ok(_) | Err(RecvError::Lagged(_)) => break,
                        Err(RecvError::Closed) => return,
                    },
                }
            }
            // What has come meanwhile is looked at together.
            while changes.try_recv().is_ok() {}
        }
    }

    /// Brings a group one step further.
    async fn look_after(&self, id: &str) -> Result<(), Error> {
        let now = self.pace.now();
        let group = self.records().update(|tables, changes| {
            let Some(group) = tables.groups.get(id) else { return Ok(None) };
            let mut scheduled = (**group).clone();
            if !group.paused && group.deletion.is_none() {
                schedule::apply(&mut scheduled, now);
            }
            let next = plan::advance(&scheduled, &observe::observe(tables, group), now);
            match &next {
                Some(next) if *next == **group => {}
                Some(next) => changes.replace(tables, next),
                None => changes.delete::<Group>(tables, id),
            }
            Ok::<_, Error>(next)
        });
        let Some(group) = group.await? else { return Ok(()) };
        fault::point("group.planned");
        for member in &group.members {
            match member.state {
                MemberState::Launching => self.launch(&group, member).await?,
                MemberState::Terminating => self.terminate(member).await,
                _ => {}
            }
        }
        Ok(())
    }

    /// Runs the instance of a slot: the one it has already, if somebody did this before.
    async fn launch(&self, group: &Group, member: &Member) -> Result<(), Error> {
        let ran = match request_for(group, member) {
            Ok(request) => self.instances.run(request).await,
            Err(error) => Err(error),
        };
        fault::point("group.launched");
        let refused = match &ran {
            Ok(_) => None,
            // Nobody knows whether it was made.
            Err(Error::Store(_) | Error::Internal(_)) => return ran.map(drop),
            // There will be, as soon as those that go have gone.
            Err(Error::NoCapacity(_)) if group.members.iter().any(|member| !member.state.counts()) => {
                return Ok(());
            }
            Err(error) => Some(error.to_string()),
        };
        let instance = ran.ok().and_then(|instances| instances.first().map(|instance| instance.id.clone()));
        let (slot, now) = (member.slot, self.pace.now());
        let written = self.records().modify(&group.id, |group: &mut Group| {
            let Some(index) = group.members.iter().position(|member| member.slot == slot) else {
                return Ok(());
            };
            match (&instance, &refused) {
                (Some(id), _) => {
                    let member = &mut group.members[index];
                    member.instance_id = Some(id.clone());
                    member.state = MemberState::Pending;
                    member.since = now;
                    let note = format!("{id} was run from template {}", member.template_version);
                    group.note(now, note);
                }
                // It has been terminated and forgotten since.
                (None, None) => _ = group.members.remove(index),
                (None, Some(why)) => {
                    let version = group.members.remove(index).template_version;
                    plan::launch_failed(group, version, why, now);
                }
            }
            Ok::<_, Error>(())
        });
        written.await.map(drop)
    }

    async fn terminate(&self, member: &Member) {
        let Some(id) = &member.instance_id else { return };
        match self.instances.get(id).map(|instance| instance.state) {
            Err(_) | Ok(InstanceState::ShuttingDown | InstanceState::Terminated) => {}
            Ok(_) => {
                if let Err(error) = self.instances.terminate(id).await {
                    tracing::warn!(instance = id, "a member cannot be terminated: {error}");
                }
            }
        }
    }

    /// Changes the desired capacity to what the members' load asks for.
    async fn scale(&self, group: &Group, load: &mut Load) -> Result<(), Error> {
        load.sample(&self.instances, group).await;
        let now = self.pace.now();
        let Some(percent) = load.percent() else { return Ok(()) };
        if scale::wanted(group, percent, now).is_none() {
            return Ok(());
        }
        load.forget();
        let scaled = self.records().modify(&group.id, |group: &mut Group| {
            if let Some(wanted) = scale::wanted(group, percent, now) {
                let before = group.desired_capacity;
                group.desired_capacity = wanted;
                group.last_scaled = Some(now);
                group.note(
                    now,
                    format!("CPU usage is {percent:.0} %: the desired capacity is {wanted}, was {before}"),
                );
            }
            Ok::<_, Error>(())
        });
        scaled.await.map(drop)
    }

    /// All groups, in order of their names.
    pub fn list(&self) -> Vec<Arc<Group>> {
        let mut all: Vec<_> = self.records().read().groups.iter().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// A group by its id or name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn get(&self, id: &str) -> Result<Arc<Group>, Error> {
        find(&self.records().read(), id)
    }
}

/// A group by its id or name.
///
/// # Errors
///
/// There is none.
pub fn find(tables: &crate::records::Tables, id: &str) -> Result<Arc<Group>, Error> {
    let found = tables.groups.get(id).or_else(|| tables.groups.iter().find(|group| group.name == id));
    found.cloned().ok_or_else(|| Error::not_found(Kind::Group, id))
}

/// Whether some group may have to do something now.
fn matters(change: &RecordChange) -> bool {
    matches!(
        change.record,
        AnyRecord::Group { .. } | AnyRecord::Instance { .. } | AnyRecord::LoadBalancer { .. }
    )
}

/// The request that runs a member: always the same for a slot.
fn request_for(group: &Group, member: &Member) -> Result<RunInstances, Error> {
    let template = group.templates.get(&member.template_version);
    let template = template.ok_or_else(|| Error::Internal(format!("{}: a template is missing", group.id)))?;
    let mut request: RunInstances = serde_json::from_value(template.clone()).map_err(|error| {
        Error::invalid("template", format_args!("cannot be understood any more: {error}"))
    })?;
    request.tags.insert("pulau:group".to_owned(), group.name.clone());
    request.client_token = Some(format!("{}-{}", group.id, member.slot));
    Ok(request)
}

#[cfg(test)]
mod tests;
