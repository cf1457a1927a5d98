//! What the host has, what instances take of it, and whether more may come.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Error, Service};
use crate::model::{Cordon, InstanceState};
use crate::records::Tables;

/// vCPUs and memory, of the host or of instances together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// vCPUs, of which a host may have more than processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// A host as its operator sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct HostReport {
    /// Of the daemon.
    pub version: String,
    /// What all instances may have together.
    pub capacity: Resources,
    /// What those that run, or are about to, have.
    pub used: Resources,
    /// How many instances are in each state.
    pub instances: std::collections::BTreeMap<InstanceState, usize>,
    /// Since when no instance is run any more; absent if instances are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cordoned_since: Option<chrono::DateTime<chrono::Utc>>,
    pub cordoned: bool,
}

impl Service {
    /// The host as it is now.
    pub fn host_report(&self) -> HostReport {
        let tables = self.host.records.read();
        let mut instances: std::collections::BTreeMap<_, _> =
            InstanceState::ALL.iter().map(|&state| (state, 0)).collect();
        tables.instances.iter().for_each(|instance| *instances.entry(instance.state).or_default() += 1);
        let cordon = tables.cordons.get(Cordon::THIS_HOST);
        let limits = &self.host.limits;
        HostReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            capacity: Resources { vcpus: limits.vcpus, memory_mib: limits.memory_mib },
            used: used(&tables),
            instances,
            cordoned_since: cordon.map(|cordon| cordon.since),
            cordoned: cordon.is_some(),
        }
    }

    /// Runs no instances from now on, until it is taken back. Those that exist stay, and may be started.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn cordon(&self) -> Result<HostReport, Error> {
        let cordon = Cordon { id: Cordon::THIS_HOST.to_owned(), since: self.host.now() };
        let cordoned = self.host.records.update(|tables, changes| {
            if tables.cordons.get(Cordon::THIS_HOST).is_none() {
                changes.create(&cordon);
            }
            Ok::<_, Error>(())
        });
        cordoned.await?;
        Ok(self.host_report())
    }

    /// Runs instances again.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn uncordon(&self) -> Result<HostReport, Error> {
        let uncordoned = self.host.records.update(|tables, changes| {
            if tables.cordons.get(Cordon::THIS_HOST).is_some() {
                changes.delete::<Cordon>(tables, Cordon::THIS_HOST);
            }
            Ok::<_, Error>(())
        });
        uncordoned.await?;
        Ok(self.host_report())
    }
}

/// What instances take of the host.
pub(super) fn used(tables: &Tables) -> Resources {
    let taking = tables.instances.iter().filter(|instance| instance.state.takes_capacity());
    taking.fold(Resources::default(), |used, instance| Resources {
        vcpus: used.vcpus.saturating_add(instance.size.vcpus.into()),
        memory_mib: used.memory_mib.saturating_add(instance.size.memory_mib),
    })
}

/// Refuses to run instances on a cordoned host.
pub(super) fn refuse_if_cordoned(tables: &Tables) -> Result<(), Error> {
    match tables.cordons.get(Cordon::THIS_HOST) {
        None => Ok(()),
        Some(cordon) => Err(Error::NoCapacity(format!(
            "the host has been cordoned since {}: `pulau host uncordon` takes that back",
            cordon.since.format("%FT%TZ")
        ))),
    }
}
