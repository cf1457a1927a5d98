//! What the host has, what instances take of it, and whether more may come.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Error, Service, StopInstance};
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

/// How to drain a host.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainHost {
    /// Terminate instances instead of stopping them, but for protected ones.
    #[serde(default)]
    pub terminate: bool,
    /// Do not ask the guests that are stopped, and do not wait for them.
    #[serde(default)]
    pub force: bool,
}

/// A host as its operator sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct HostReport {
    /// Of the daemon.
    pub version: String,
    /// What the host itself has.
    pub physical: Resources,
    /// What all instances may have together, which may be more.
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
            physical: physical(),
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

    /// Cordons the host, and has all its instances stop, or end for good where that is asked for and they are not
    /// protected. That takes as long as their guests do: the report tells how many still run.
    ///
    /// # Errors
    ///
    /// Those of the store.
    pub async fn drain(&self, how: DrainHost) -> Result<HostReport, Error> {
        self.cordon().await?;
        let ids: Vec<String> = {
            let tables = self.host.records.read();
            let taking = tables.instances.iter().filter(|instance| instance.state.takes_capacity());
            taking.map(|instance| instance.id.clone()).collect()
        };
        for id in ids {
            let ended =
                if how.terminate { self.terminate(&id).await } else { Err(Error::Protected(id.clone())) };
            let done = match ended {
                Err(Error::Protected(_)) => self.stop(&id, StopInstance { force: how.force }).await,
                other => other,
            };
            match done {
                // It may have gone its way meanwhile.
                Ok(_) | Err(Error::NotFound { .. } | Error::State { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.host_report())
    }

    /// Runs instances again. Those that a drain stopped stay stopped.
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

/// What this machine has. What cannot be told is 0.
pub fn physical() -> Resources {
    let processors = std::thread::available_parallelism().map_or(0, |count| count.get());
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let kib: u64 = line.and_then(|kib| kib.trim().parse().ok()).unwrap_or(0);
    Resources { vcpus: u32::try_from(processors).unwrap_or(u32::MAX), memory_mib: kib / 1024 }
}
