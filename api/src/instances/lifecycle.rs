//! What users ask of instances that exist. Each request only writes down what is wanted, and the state that
//! says so; the instance's driver does it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use utoipa::ToSchema;

use super::error::Error;
use super::{Service, find, run};
use crate::model::{
    Check, Desired, Instance, InstanceState, Kind, ShutdownBehavior, Size, StateReason, StatusChecks,
    check_tags, reason,
};

/// How to stop an instance.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopInstance {
    /// Do not ask the guest, and do not wait for it: as a power cut.
    #[serde(default)]
    pub force: bool,
}

/// What of an instance is to be changed; the rest stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModifyInstance {
    /// Of a stopped instance; with `vcpus` and `memory_mib` if it is `custom`.
    #[serde(default)]
    pub instance_type: Option<String>,
    #[serde(default)]
    pub vcpus: Option<u8>,
    #[serde(default)]
    pub memory_mib: Option<u64>,
    /// Of a stopped instance. Base64.
    #[serde(default)]
    pub user_data: Option<String>,
    #[serde(default)]
    pub security_groups: Option<Vec<String>>,
    #[serde(default)]
    pub termination_protection: Option<bool>,
    #[serde(default)]
    pub auto_recovery: Option<bool>,
    #[serde(default)]
    pub shutdown_behavior: Option<ShutdownBehavior>,
    /// All of them.
    #[serde(default)]
    pub tags: Option<BTreeMap<String, String>>,
}

impl Service {
    /// Starts a stopped instance. One that runs, or is about to, stays as it is.
    ///
    /// # Errors
    ///
    /// It is in another state, or the host has no room.
    pub async fn start(&self, id: &str) -> Result<Arc<Instance>, Error> {
        let host = &self.host;
        host.records
            .update(|tables, changes| {
                let mut instance = (*find::instance(tables, id)?).clone();
                match instance.state {
                    InstanceState::Pending | InstanceState::Running => return Ok(()),
                    InstanceState::Stopped => {}
                    state => return Err(wrong_state(id, state, "only a stopped instance can be started")),
                }
                let (vcpus, memory_mib) = run::free(host, tables);
                if vcpus < u32::from(instance.size.vcpus) || memory_mib < instance.size.memory_mib {
                    return Err(Error::NoCapacity(format!(
                        "the host has {vcpus} vCPUs and {memory_mib} MiB left, and instance {id} needs {} and {}: \
                         stop others, or change its type",
                        instance.size.vcpus, instance.size.memory_mib
                    )));
                }
                instance.desired = Desired::Running;
                instance.generation = instance.generation.saturating_add(1);
                instance.force_stop = false;
                instance.launch_time = host.now();
                enter(&mut instance, InstanceState::Pending, None, host.now());
                changes.replace(tables, &instance);
                Ok(())
            })
            .await?;
        self.get(id)
    }

    /// Stops an instance. It keeps its id, disks and address.
    ///
    /// # Errors
    ///
    /// It is neither running nor on its way to, nor stopped.
    pub async fn stop(&self, id: &str, how: StopInstance) -> Result<Arc<Instance>, Error> {
        let now = self.host.now();
        self.modify_record(id, |instance| {
            match instance.state {
                InstanceState::Pending | InstanceState::Running | InstanceState::Stopping => {}
                InstanceState::Stopped => return Ok(()),
                state => return Err(wrong_state(id, state, "only a running instance can be stopped")),
            }
            instance.desired = Desired::Stopped;
            instance.force_stop |= how.force;
            let why = reason::user_initiated("stopped by request");
            enter(instance, InstanceState::Stopping, Some(why), now);
            Ok(())
        })
        .await
    }

    /// Boots a running instance anew: its guest is asked to end, and killed if it does not.
    ///
    /// # Errors
    ///
    /// It does not run.
    pub async fn reboot(&self, id: &str) -> Result<Arc<Instance>, Error> {
        self.modify_record(id, |instance| {
            if instance.state != InstanceState::Running {
                return Err(wrong_state(id, instance.state, "only a running instance can be rebooted"));
            }
            boot_anew(instance);
            Ok(())
        })
        .await
    }

    /// Ends an instance for good, with its root disk.
    ///
    /// # Errors
    ///
    /// It is protected.
    pub async fn terminate(&self, id: &str) -> Result<Arc<Instance>, Error> {
        let now = self.host.now();
        self.modify_record(id, |instance| {
            if instance.desired == Desired::Terminated {
                return Ok(());
            }
            if instance.termination_protection {
                return Err(Error::Protected(id.to_owned()));
            }
            instance.desired = Desired::Terminated;
            let why = reason::user_initiated("terminated by request");
            enter(instance, InstanceState::ShuttingDown, Some(why), now);
            Ok(())
        })
        .await
    }

    /// Changes an instance.
    ///
    /// # Errors
    ///
    /// A value cannot be, or cannot be changed in this state.
    pub async fn modify(&self, id: &str, request: &ModifyInstance) -> Result<Arc<Instance>, Error> {
        if let Some(tags) = &request.tags {
            check_tags(tags)?;
        }
        if let Some(data) = &request.user_data {
            run::check_user_data(data)?;
        }
        let size = wanted_size(request)?;
        let tables = || self.host.records.read();
        let groups = match &request.security_groups {
            Some(names) => {
                let network = find::instance(&tables(), id)?.interface.network_id.clone();
                let network = find::network(&tables(), Some(&network))?;
                Some(run::groups(&tables(), &network, names)?)
            }
            None => None,
        };
        self.modify_record(id, |instance| {
            let needs_stop = size.is_some() || request.user_data.is_some();
            if needs_stop && instance.state != InstanceState::Stopped {
                let needed = "its type and user data can be changed only while it is stopped";
                return Err(wrong_state(id, instance.state, needed));
            }
            if matches!(instance.state, InstanceState::ShuttingDown | InstanceState::Terminated) {
                return Err(wrong_state(id, instance.state, "it cannot be changed any more"));
            }
            if let Some((name, size)) = &size {
                instance.instance_type.clone_from(name);
                instance.size = *size;
            }
            if let Some(data) = &request.user_data {
                instance.user_data = Some(data.clone()).filter(|data| !data.is_empty());
            }
            if let Some(groups) = &groups {
                instance.security_groups.clone_from(groups);
            }
            if let Some(tags) = &request.tags {
                instance.tags.clone_from(tags);
            }
            instance.termination_protection =
                request.termination_protection.unwrap_or(instance.termination_protection);
            instance.auto_recovery = request.auto_recovery.unwrap_or(instance.auto_recovery);
            instance.shutdown_behavior = request.shutdown_behavior.unwrap_or(instance.shutdown_behavior);
            Ok(())
        })
        .await
    }

    async fn modify_record(
        &self,
        id: &str,
        change: impl FnMut(&mut Instance) -> Result<(), Error>,
    ) -> Result<Arc<Instance>, Error> {
        let changed = self.host.records.modify(id, change).await?;
        changed.ok_or_else(|| Error::not_found(Kind::Instance, id))
    }
}

fn wanted_size(request: &ModifyInstance) -> Result<Option<(String, Size)>, Error> {
    let name = match (&request.instance_type, request.vcpus, request.memory_mib) {
        (None, None, None) => return Ok(None),
        (Some(name), ..) => name,
        (None, ..) => return Err(Error::invalid("vcpus", "needs instance_type \"custom\"")),
    };
    Ok(Some((name.clone(), run::size(name, request.vcpus, request.memory_mib)?)))
}

fn wrong_state(id: &str, state: InstanceState, needed: &'static str) -> Error {
    Error::State { kind: Kind::Instance, id: id.to_owned(), state: state.name().to_owned(), needed }
}

/// Asks for another boot. What was known of the one before holds no longer.
pub(super) fn boot_anew(instance: &mut Instance) {
    instance.generation = instance.generation.saturating_add(1);
    instance.status =
        StatusChecks { vmm: Check::Initializing, agent: Check::Initializing, network: Check::Initializing };
}

/// Puts an instance into a state.
pub(super) fn enter(
    instance: &mut Instance,
    state: InstanceState,
    why: Option<StateReason>,
    now: chrono::DateTime<chrono::Utc>,
) {
    if instance.state != state {
        instance.state = state;
        instance.state_since = now;
    }
    instance.state_reason = why;
}
