//! Load balancers: ports of the host behind which many instances are.
//!
//! Each is a record, a listener in the daemon, and a watch over the health of its targets. A reconciler keeps
//! the three in line: it reads from the records which instances are to be targets - the members of a group, or
//! those that were named -, and writes down which are, and how they are; so others see that, and the next daemon
//! begins with it. A target that is no longer wanted gets nothing new; it goes when nothing is under way to it
//! any more, or when its time is up.
//!
//! Requests are understood by hyper, on both sides; nothing here speaks HTTP itself.

mod health;
mod http;
mod listener;
mod requests;
mod targets;
mod tcp;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::instances::{Error, Service};
use crate::model::{
    InstanceState, Kind, LoadBalancer, LoadBalancerState, MemberState, StateReason, Target, TargetState,
};
use crate::records::{AnyRecord, RecordChange, Records, Tables};
use listener::Settings;
use targets::Targets;

pub use requests::{CreateLoadBalancer, ModifyLoadBalancer};

/// Between two looks when nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// While a target drains: its last connection's end is no change of a record.
const DRAIN_TICK: Duration = Duration::from_millis(100);

/// What a load balancer has done and has to do, for metrics.
#[derive(Clone, Debug, Default)]
pub struct Activity {
    pub name: String,
    pub connections: u64,
    pub requests: u64,
    pub refused: u64,
    pub retries: u64,
    pub open: u64,
    pub targets: HashMap<TargetState, u64>,
}

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Balancers {
    instances: Service,
    running: Arc<Mutex<HashMap<String, Running>>>,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// One load balancer of this daemon.
struct Running {
    targets: Arc<Targets>,
    settings: watch::Sender<Settings>,
    limit: Arc<Semaphore>,
    max_connections: u32,
    ended: watch::Sender<bool>,
    /// None as long as it cannot listen.
    listener: Option<JoinHandle<()>>,
    health: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ended.send_replace(true);
        self.health.abort();
    }
}

impl Balancers {
    /// Serves all load balancers from now on.
    pub fn start(instances: Service) -> Self {
        let balancers = Balancers { instances, running: Arc::default(), task: Arc::default() };
        let task = tokio::spawn(balancers.clone().run());
        *balancers.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        balancers
    }

    /// Takes no connections any more; what is under way ends with the daemon.
    pub fn let_go(&self) {
        if let Some(task) = self.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
        self.lock().clear();
    }

    fn records(&self) -> &Records {
        &self.instances.host().records
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self) {
        let mut changes = self.records().subscribe();
        loop {
            let ids: Vec<String> =
                self.records().read().load_balancers.iter().map(|b| b.id.clone()).collect();
            self.end_others(&ids);
            let mut drains = false;
            for id in &ids {
                match self.look_after(id).await {
                    Ok(still) => drains |= still,
                    Err(error) => tracing::warn!(balancer = id, "will be tried again: {error}"),
                }
            }
            let tick = tokio::time::sleep(if drains { DRAIN_TICK } else { TICK });
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
            while changes.try_recv().is_ok() {}
        }
    }

    /// Ends those that were deleted.
    fn end_others(&self, ids: &[String]) {
        self.lock().retain(|id, running| {
            let stays = ids.contains(id);
            if !stays {
                running.targets.clear();
            }
            stays
        });
    }

    /// Brings a load balancer in line with its record, and its record with what is. Whether a target drains.
    async fn look_after(&self, id: &str) -> Result<bool, Error> {
        let Some(balancer) = self.records().get::<LoadBalancer>(id) else { return Ok(false) };
        let targets = self.keep_running(&balancer).await?;
        let now = Utc::now();
        let updated = self.records().update(|tables, changes| {
            let Some(known) = tables.load_balancers.get(id) else { return Ok(None) };
            // First nothing new goes to those who drain; then it is seen whether anything is under way.
            targets.set(known);
            let mut balancer = (**known).clone();
            balancer.targets = wanted_targets(tables, known, now, |instance| targets.active(instance));
            if balancer != **known {
                changes.replace(tables, &balancer);
            }
            Ok::<_, Error>(Some(balancer))
        });
        let Some(balancer) = updated.await? else { return Ok(false) };
        targets.set(&balancer);
        Ok(balancer.targets.iter().any(|target| target.state == TargetState::Draining))
    }

    /// Has it listen and watch, and take over what was changed.
    async fn keep_running(&self, balancer: &LoadBalancer) -> Result<Arc<Targets>, Error> {
        let settings = Settings { protocol: balancer.protocol, algorithm: balancer.algorithm };
        let (targets, listens) = {
            let mut all = self.lock();
            let running = all.entry(balancer.id.clone()).or_insert_with(|| Running {
                targets: Arc::default(),
                settings: watch::Sender::new(settings),
                limit: Arc::new(Semaphore::new(balancer.max_connections as usize)),
                max_connections: balancer.max_connections,
                ended: watch::Sender::new(false),
                listener: None,
                health: tokio::spawn(health::watch(self.records().clone(), balancer.id.clone())),
            });
            running.settings.send_if_modified(|known| std::mem::replace(known, settings) != settings);
            running.limit_connections(balancer.max_connections);
            (running.targets.clone(), running.listener.as_ref().is_some_and(|task| !task.is_finished()))
        };
        if listens {
            return Ok(targets);
        }
        // Those that the last daemon knew to be healthy are served from the first connection on.
        targets.set(balancer);
        let (state, reason) = match listener::bind(balancer.listen).await {
            Ok(listener) => {
                if let Some(running) = self.lock().get_mut(&balancer.id) {
                    running.listener = Some(tokio::spawn(listener::serve(
                        listener,
                        targets.clone(),
                        running.settings.subscribe(),
                        running.limit.clone(),
                        running.ended.subscribe(),
                    )));
                }
                (LoadBalancerState::Active, None)
            }
            Err(error) => {
                let message = format!("cannot listen on {}: {error}", balancer.listen);
                (LoadBalancerState::Failed, Some(StateReason { code: "Server.ListenFailed".into(), message }))
            }
        };
        let written = self.records().modify(&balancer.id, |balancer: &mut LoadBalancer| {
            balancer.state = state;
            balancer.state_reason.clone_from(&reason);
            Ok::<_, Error>(())
        });
        written.await?;
        Ok(targets)
    }

    /// All load balancers, in order of their names.
    pub fn list(&self) -> Vec<Arc<LoadBalancer>> {
        let mut all: Vec<_> = self.records().read().load_balancers.iter().cloned().collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// A load balancer by its id or name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn get(&self, id: &str) -> Result<Arc<LoadBalancer>, Error> {
        find(&self.records().read(), id)
    }

    /// What each has done since the daemon runs.
    pub fn activities(&self) -> Vec<Activity> {
        use std::sync::atomic::Ordering::Relaxed;
        let running = self.lock();
        let of = |balancer: Arc<LoadBalancer>| {
            let mut activity = Activity { name: balancer.name.clone(), ..Activity::default() };
            for target in &balancer.targets {
                *activity.targets.entry(target.state).or_default() += 1;
            }
            if let Some(running) = running.get(&balancer.id) {
                let counts = &running.targets.counts;
                activity.connections = counts.connections.load(Relaxed);
                activity.requests = counts.requests.load(Relaxed);
                activity.refused = counts.refused.load(Relaxed);
                activity.retries = counts.retries.load(Relaxed);
                activity.open = counts.open.load(Relaxed);
            }
            activity
        };
        self.list().into_iter().map(of).collect()
    }
}

impl Running {
    fn limit_connections(&mut self, wanted: u32) {
        let (old, new) = (self.max_connections as usize, wanted as usize);
        if new >= old {
            self.limit.add_permits(new - old);
        } else {
            // Those in use are taken back as they become free.
            let (limit, surplus) = (self.limit.clone(), wanted.abs_diff(self.max_connections));
            tokio::spawn(async move {
                if let Ok(permits) = limit.acquire_many_owned(surplus).await {
                    permits.forget();
                }
            });
        }
        self.max_connections = wanted;
    }
}

/// A load balancer by its id or name.
///
/// # Errors
///
/// There is none.
fn find(tables: &Tables, id: &str) -> Result<Arc<LoadBalancer>, Error> {
    let found = tables.load_balancers.get(id);
    let found = found.or_else(|| tables.load_balancers.iter().find(|balancer| balancer.name == id));
    found.cloned().ok_or_else(|| Error::not_found(Kind::LoadBalancer, id))
}

/// Whether some load balancer may have to do something now.
fn matters(change: &RecordChange) -> bool {
    matches!(
        change.record,
        AnyRecord::Group { .. } | AnyRecord::Instance { .. } | AnyRecord::LoadBalancer { .. }
    )
}

/// The targets there are to be: those that are wanted and run, and those that drain.
fn wanted_targets(
    tables: &Tables,
    balancer: &LoadBalancer,
    now: DateTime<Utc>,
    active: impl Fn(&str) -> usize,
) -> Vec<Target> {
    let running = |id: &str| tables.instances.get(id).filter(|i| i.state == InstanceState::Running);
    let wanted: Vec<String> = match &balancer.group_id {
        None => balancer.instance_ids.clone(),
        Some(group) => {
            let members = tables.groups.get(group).map(|group| group.members.as_slice()).unwrap_or_default();
            let serving = |state| matches!(state, MemberState::Pending | MemberState::InService);
            let serving = members.iter().filter(|member| serving(member.state));
            serving.filter_map(|member| member.instance_id.clone()).collect()
        }
    };
    let delay = TimeDelta::try_seconds(balancer.deregistration_delay_seconds.min(1 << 31).cast_signed());
    let time_is_up = |target: &Target| now - target.since >= delay.unwrap_or(TimeDelta::zero());
    let mut targets = Vec::new();
    for target in &balancer.targets {
        let id = &target.instance_id;
        let Some(instance) = running(id) else { continue };
        let moved = instance.interface.private_address != target.address;
        match target.state {
            _ if moved => {}
            TargetState::Draining if wanted.contains(id) => {
                targets.push(Target { state: TargetState::Initial, since: now, ..target.clone() });
            }
            TargetState::Draining if active(id) == 0 || time_is_up(target) => {}
            TargetState::Draining => targets.push(target.clone()),
            _ if wanted.contains(id) => targets.push(target.clone()),
            _ => targets.push(Target { state: TargetState::Draining, since: now, ..target.clone() }),
        }
    }
    for id in wanted {
        let Some(instance) = running(&id) else { continue };
        if !targets.iter().any(|target| target.instance_id == id) {
            targets.push(Target {
                instance_id: id,
                address: instance.interface.private_address,
                state: TargetState::Initial,
                since: now,
                reason: None,
            });
        }
    }
    targets
}

#[cfg(test)]
mod tests;
