//! Updating the packages in guests: a record for each request, and a task that sees it through.
//!
//! ```text
//!   pending ──▶ running ──▶ (rebooting) ──▶ succeeded
//!      │           │             │
//!      ▼           ▼             ▼
//!   cancelled   cancelled,    failed
//!               failed
//! ```
//!
//! The work itself is the guest's, in a session of its own (`guest`): it goes on whatever becomes of the daemon. The
//! next daemon takes up every request that is not finished, and asks the guests where they are.

mod guest;
mod run;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Error;
use super::{Service, find, idempotency};
use crate::model::{InstancePatch, InstanceState, Kind, Patch, PatchState, id};
use crate::records::Tables;

/// Instances of one request.
const INSTANCES: usize = 100;
/// Requests that are kept; the oldest finished ones go.
const KEPT: usize = 100;
/// Seconds for one instance: what is allowed, and what is taken.
const TIMEOUT: std::ops::RangeInclusive<u64> = 10..=6 * 3600;
const DEFAULT_TIMEOUT: u64 = 1800;

/// A request to update instances.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PatchInstances {
    /// Ids of running instances, 1 to 100.
    pub instance_ids: Vec<String>,
    /// Boot those anew that need it for the update to take effect.
    #[serde(default)]
    pub reboot: bool,
    /// For one instance, without its reboot: 10 to 21600; 1800 if absent.
    #[serde(default)]
    pub timeout_seconds: Option<u64>,
    /// Makes the request safe to send again, with the same answer.
    #[serde(default)]
    pub client_token: Option<String>,
}

impl Service {
    /// Begins to update instances.
    ///
    /// # Errors
    ///
    /// One of them does not run, or is being updated already. Nothing was begun then.
    pub async fn patch_instances(&self, request: PatchInstances) -> Result<Arc<Patch>, Error> {
        let unique: BTreeSet<&String> = request.instance_ids.iter().collect();
        if !(1..=INSTANCES).contains(&request.instance_ids.len())
            || unique.len() != request.instance_ids.len()
        {
            let problem = format_args!("must be 1 to {INSTANCES} ids, each once");
            return Err(Error::invalid("instance_ids", problem));
        }
        let timeout_seconds = request.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT);
        if !TIMEOUT.contains(&timeout_seconds) {
            let problem = format_args!("must be {} to {}", TIMEOUT.start(), TIMEOUT.end());
            return Err(Error::invalid("timeout_seconds", problem));
        }
        let patch = Patch {
            id: id::new(id::PATCH),
            state: PatchState::Running,
            reboot: request.reboot,
            timeout_seconds,
            created: self.host.now(),
            finished: None,
            cancel: false,
            instances: request.instance_ids.iter().map(|id| InstancePatch::of(id)).collect(),
        };
        let token = request.client_token.as_deref();
        let (id, is_new) = self
            .host
            .records
            .update(|tables, changes| {
                let known = idempotency::find(tables, "patch-instances", token, &request)?;
                if let Some(id) = known.and_then(|made| made.into_iter().next()) {
                    return Ok((id, false));
                }
                for id in &request.instance_ids {
                    check(tables, id)?;
                }
                for id in outdated(tables) {
                    changes.delete::<Patch>(tables, &id);
                }
                changes.create(&patch);
                let made = vec![patch.id.clone()];
                idempotency::remember(&self.host, changes, "patch-instances", token, &request, made);
                Ok::<_, Error>((patch.id.clone(), true))
            })
            .await?;
        if is_new {
            self.see_through(&id);
        }
        self.patch(&id)
    }

    /// What came of a request so far.
    ///
    /// # Errors
    ///
    /// There is none of this id (any more).
    pub fn patch(&self, id: &str) -> Result<Arc<Patch>, Error> {
        self.host.records.get::<Patch>(id).ok_or_else(|| Error::not_found(Kind::Patch, id))
    }

    /// All requests that are kept, the last one first.
    pub fn patches(&self) -> Vec<Arc<Patch>> {
        let mut all: Vec<_> = self.host.records.read().patches.iter().cloned().collect();
        all.sort_by(|a, b| (b.created, &b.id).cmp(&(a.created, &a.id)));
        all
    }

    /// Leaves off: instances whose turn has not come are left alone, and those under way are told to stop. One that
    /// is finished stays as it is.
    ///
    /// # Errors
    ///
    /// There is none of this id (any more).
    pub async fn cancel_patch(&self, id: &str) -> Result<Arc<Patch>, Error> {
        let changed = self.host.records.modify(id, |patch: &mut Patch| {
            patch.cancel |= !patch.state.is_final();
            Ok::<_, Error>(())
        });
        changed.await?.ok_or_else(|| Error::not_found(Kind::Patch, id))
    }

    /// Takes up what a daemon before did not see through.
    pub(super) fn resume_patches(&self) {
        let open: Vec<String> = {
            let tables = self.host.records.read();
            tables
                .patches
                .iter()
                .filter(|patch| !patch.state.is_final())
                .map(|patch| patch.id.clone())
                .collect()
        };
        open.iter().for_each(|id| self.see_through(id));
    }

    fn see_through(&self, id: &str) {
        let task = tokio::spawn(run::see_through(self.clone(), id.to_owned()));
        let mut tasks = self.patching.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }
}

/// Whether an instance can be updated.
fn check(tables: &Tables, id: &str) -> Result<(), Error> {
    let refuse = |state: &str, needed| {
        let (id, state) = (id.to_owned(), state.to_owned());
        Err(Error::State { kind: Kind::Instance, id, state, needed })
    };
    let instance = find::instance(tables, id)?;
    if instance.state != InstanceState::Running {
        return refuse(instance.state.name(), "only a running instance can be updated");
    }
    let is_it = |of: &InstancePatch| of.instance_id == id && !of.state.is_final();
    if tables.patches.iter().any(|patch| patch.instances.iter().any(is_it)) {
        return refuse("being updated", "wait until that has finished: `pulau instance patches` shows it");
    }
    Ok(())
}

/// Finished requests that make way for a new one.
fn outdated(tables: &Tables) -> Vec<String> {
    let mut finished: Vec<_> = tables.patches.iter().filter(|patch| patch.state.is_final()).collect();
    finished.sort_by_key(|patch| patch.created);
    let many = (tables.patches.len() + 1).saturating_sub(KEPT);
    finished.into_iter().take(many).map(|patch| patch.id.clone()).collect()
}
