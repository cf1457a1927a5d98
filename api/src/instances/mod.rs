//! Instances: machines as EC2 knows them, with the images, disks, keys and networks they are made of.
//!
//! [`Service`] is what the API and other services call. A request reads and writes records
//! ([`crate::records`]) and returns; each instance's `driver` then makes it so. On start the service
//! adopts the microVMs that an earlier daemon left, and removes whatever belongs to nothing.

mod capacity;
mod checks;
mod copies;
mod create_image;
mod driver;
mod error;
pub mod failure;
mod find;
mod guest;
mod host;
mod idempotency;
mod images;
mod jobs;
mod keeper;
mod key_pairs;
mod launch;
mod lifecycle;
mod metadata;
mod networks;
mod patch;
pub mod ports;
mod run;
mod snapshots;
mod volumes;
mod wiring;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::fault;
use crate::microvm::MicroVm;
use crate::model::Instance;
use crate::records::AnyRecord;

pub use capacity::{DrainHost, HostReport, Resources, physical};
pub use create_image::CreateImage;
pub use error::Error;
pub use host::{Host, Limits};
pub use images::ImportImage;
pub use key_pairs::{CreateKeyPair, CreatedKeyPair};
pub use lifecycle::{ModifyInstance, StopInstance};
pub use networks::{CreateNetwork, CreateSecurityGroup, ModifyRules};
pub use patch::PatchInstances;
pub use run::{InstanceVolume, RunInstances};
pub use snapshots::CreateSnapshot;
pub use volumes::{AttachVolume, CreateVolume, ModifyVolume};
pub use wiring::{TAP_PREFIX, Wiring, plan as network_plan};

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    host: Host,
    drivers: Arc<Mutex<HashMap<String, Driven>>>,
    dispatcher: Arc<Mutex<Option<JoinHandle<()>>>>,
    /// What goes on behind requests for disks and images.
    jobs: jobs::Jobs,
    /// Tasks that see updates of guests through.
    patching: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

/// An instance with a driver.
struct Driven {
    wake: Arc<Notify>,
    machine: watch::Receiver<Option<MicroVm>>,
    /// Held by whoever has the instance's disks to itself: see `copies`.
    disks: Arc<tokio::sync::Mutex<()>>,
    task: JoinHandle<()>,
}

impl Service {
    /// Takes up whatever the records say, and what an earlier daemon left on the host.
    ///
    /// # Errors
    ///
    /// The host's directories cannot be read or cleaned, or the records not be written.
    pub async fn open(host: Host) -> Result<Self, Error> {
        let service = Service {
            host,
            drivers: Arc::default(),
            dispatcher: Arc::default(),
            jobs: Default::default(),
            patching: Arc::default(),
        };
        let changes = service.host.records.subscribe();
        service.host.images.sweep()?;
        service.host.volumes.sweep()?;
        service.make_defaults().await?;
        service.fail_interrupted_imports().await?;
        service.fail_interrupted_snapshots().await?;
        service.finish_growing().await?;
        service.adopt().await?;
        service.remove_orphans().await?;
        service.keep_volumes();
        let dispatcher = tokio::spawn(service.clone().dispatch(changes));
        *service.dispatcher.lock().unwrap_or_else(PoisonError::into_inner) = Some(dispatcher);
        service.resume_patches();
        Ok(service)
    }

    /// Gives every instance a driver, with its microVM where there is one, and removes the microVMs of nobody.
    async fn adopt(&self) -> Result<(), Error> {
        let internal = |error: std::io::Error| Error::Internal(format!("microVMs of before: {error}"));
        let left = self.host.machines.list().await.map_err(internal)?;
        let mut adopted = HashMap::new();
        for machine in left {
            let Some((instance, generation)) = launch::of_machine(&machine) else { continue };
            let known = self.host.records.get::<Instance>(instance);
            if known.is_none_or(|known| known.generation < generation) {
                continue;
            }
            match self.host.machines.adopt(&machine) {
                Ok(vm) => _ = adopted.insert(instance.to_owned(), (vm, generation)),
                Err(error) => tracing::warn!(machine, "cannot be adopted: {error}"),
            }
        }
        fault::point("daemon.adopted");
        for swept in self.host.machines.sweep().await.map_err(internal)? {
            tracing::info!(machine = swept, "belonged to no instance and was removed");
        }
        fault::point("daemon.swept");
        let ids: Vec<String> = self.host.records.read().instances.iter().map(|i| i.id.clone()).collect();
        for id in ids {
            let machine = adopted.remove(&id);
            self.drive(id, machine);
        }
        Ok(())
    }

    /// Removes disks that no record knows: those of instances and snapshots whose creation or removal was cut short.
    async fn remove_orphans(&self) -> Result<(), Error> {
        let host = self.host.clone();
        let removed = tokio::task::spawn_blocking(move || -> Result<(), Error> {
            let (known, snapshots): (BTreeSet<String>, BTreeSet<String>) = {
                let tables = host.records.read();
                let snapshots = tables.snapshots.iter().map(|snapshot| snapshot.id.clone()).collect();
                (tables.volumes.iter().map(|volume| volume.id.clone()).collect(), snapshots)
            };
            for id in host.volumes.list()? {
                if !known.contains(&id) {
                    tracing::info!(volume = id, "belonged to nothing and was removed");
                    host.volumes.delete(&id)?;
                }
            }
            for id in host.volumes.list_snapshots()? {
                if !snapshots.contains(&id) {
                    tracing::info!(snapshot = id, "belonged to nothing and was removed");
                    host.volumes.delete_snapshot(&id)?;
                }
            }
            Ok(())
        });
        removed.await?
    }

    /// Wakes drivers whose record has changed, and makes those of new instances.
    async fn dispatch(self, mut changes: tokio::sync::broadcast::Receiver<crate::records::RecordChange>) {
        use tokio::sync::broadcast::error::RecvError;
        loop {
            match changes.recv().await {
                Ok(change) => match change.record {
                    AnyRecord::Instance { .. } => self.wake_or_drive(&change.id),
                    AnyRecord::SecurityGroup { .. } => {
                        let changed = self.host.wiring.groups_changed(&self.host.records).await;
                        self.network_change(&change.id, changed);
                        // Their guests see the names of their groups.
                        self.wake_all();
                    }
                    AnyRecord::Network { new, .. } => {
                        let changed = self.host.wiring.network_changed(&change.id, new.as_deref()).await;
                        self.network_change(&change.id, changed);
                    }
                    AnyRecord::Volume { new: Some(volume), .. } => self.volume_changed(&volume),
                    _ => {}
                },
                Err(RecvError::Lagged(_)) => {
                    self.keep_volumes();
                    let ids: Vec<String> =
                        self.host.records.read().instances.iter().map(|i| i.id.clone()).collect();
                    ids.iter().for_each(|id| self.wake_or_drive(id));
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// What could not be changed of the host's network is made right when it is next started.
    fn network_change(&self, id: &str, changed: Result<(), crate::network::NetworkError>) {
        if let Err(error) = changed {
            tracing::error!(id, "the host's network could not be changed: {error}");
        }
    }

    fn wake_or_drive(&self, id: &str) {
        let known = self.lock().get(id).map(|driven| driven.wake.clone());
        match known {
            Some(wake) => wake.notify_one(),
            None if self.host.records.get::<Instance>(id).is_some() => self.drive(id.to_owned(), None),
            None => {}
        }
        // Whose record is gone have ended, or will.
        self.lock().retain(|_, driven| !driven.task.is_finished());
    }

    fn wake_all(&self) {
        self.lock().values().for_each(|driven| driven.wake.notify_one());
    }

    fn drive(&self, id: String, machine: Option<(MicroVm, u64)>) {
        let wake = Arc::new(Notify::new());
        let (sender, receiver) = watch::channel(None);
        let disks = Arc::new(tokio::sync::Mutex::new(()));
        let shared = driver::Shared { wake: wake.clone(), current: sender, disks: disks.clone() };
        let driver = driver::Driver::new(self.host.clone(), id.clone(), shared, machine);
        let task = tokio::spawn(driver.run());
        self.lock().insert(id, Driven { wake, machine: receiver, disks, task });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Driven>> {
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's parts, for those who show them.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// An instance.
    ///
    /// # Errors
    ///
    /// There is none of this id.
    pub fn get(&self, id: &str) -> Result<Arc<Instance>, Error> {
        find::instance(&self.host.records.read(), id)
    }

    /// The microVM of a running instance.
    ///
    /// # Errors
    ///
    /// There is no such instance, or it does not run.
    pub fn machine(&self, id: &str) -> Result<MicroVm, Error> {
        let instance = self.get(id)?;
        let machine = self.lock().get(id).and_then(|driven| driven.machine.borrow().clone());
        machine.ok_or_else(|| Error::State {
            kind: crate::model::Kind::Instance,
            id: id.to_owned(),
            state: instance.state.name().to_owned(),
            needed: "this takes one whose microVM is up: `pulau instance wait --agent` waits for that",
        })
    }

    /// Stops driving: machines run on, for the next daemon to adopt.
    pub async fn let_go(&self) {
        let dispatcher = self.dispatcher.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(dispatcher) = dispatcher {
            dispatcher.abort();
        }
        // Those that copy disks have their machines go on.
        self.jobs.end().await;
        // Guests go on with theirs.
        self.patching.lock().unwrap_or_else(PoisonError::into_inner).drain(..).for_each(|task| task.abort());
        let driven: Vec<Driven> = self.lock().drain().map(|(_, driven)| driven).collect();
        for driven in &driven {
            let machine = driven.machine.borrow().clone();
            if let Some(machine) = machine {
                machine.detach().await;
            }
        }
        driven.iter().for_each(|driven| driven.task.abort());
    }
}

#[cfg(test)]
pub(crate) mod tests;
