//! The driver of one instance: it alone acts on the instance's microVM, disks and interface, until what is
//! there is what its record asks for, and writes down what is.
//!
//! ```text
//!            ┌───────────────── record changed, machine ended, time passed ◀──────────────┐
//!            ▼                                                                            │
//!   look at record and machine ─▶ Running wanted, no machine ──▶ disks, interface, boot ──┤
//!                              ─▶ another boot wanted ─────────▶ stop the machine ────────┤
//!                              ─▶ Stopped wanted ──────────────▶ stop, unplug ────────────┤
//!                              ─▶ Terminated wanted ───────────▶ stop, unplug, remove ────┘
//! ```
//!
//! Every step can be done again: a daemon killed between any two of them starts over from what the record says
//! and what it finds. A machine that ends by itself is told apart by how: a guest that powered off stays
//! stopped, one that rebooted boots again, and one that failed is started anew, after a pause that grows.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, OwnedMutexGuard};
use tokio::time::{Instant as Moment, sleep};

use super::checks::{HEALTHY_AFTER, IN_A_ROW, Looks, Recoveries};
use super::error::Error;
use super::host::Host;
use super::lifecycle::{boot_anew, enter};
use super::{copies, launch, volumes};
use crate::fault;
use crate::microvm::{Ending, MicroVm, Reason, Stop};
use crate::model::{
    BootReport, Check, Desired, Instance, InstanceState, PublishedPort, ShutdownBehavior, StateReason,
    StatusChecks, VolumeState, reason,
};

/// Before a failed machine is started again.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Failures in a row after which the instance is stopped.
const FAILURES: u32 = 5;
/// After an error that is the host's, such as a full disk.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// A machine and the boot it is.
struct Booted {
    vm: MicroVm,
    generation: u64,
    since: Moment,
    /// What its guest was told last; None if that is not known.
    told: Option<Told>,
    /// Telling it failed the last time.
    behind: bool,
}

/// What changes of a record reach a running guest by.
#[derive(PartialEq)]
struct Told {
    groups: Vec<String>,
    ports: Vec<PublishedPort>,
    metadata: serde_json::Value,
}

/// What a driver shares with the service.
pub(super) struct Shared {
    pub wake: Arc<Notify>,
    /// Told what machine there is, for those who want to talk to it.
    pub current: tokio::sync::watch::Sender<Option<MicroVm>>,
    /// Held while a machine is booted or ended: see `copies`.
    pub disks: Arc<tokio::sync::Mutex<()>>,
}

pub(super) struct Driver {
    host: Host,
    id: String,
    wake: Arc<Notify>,
    machine: Option<Booted>,
    current: tokio::sync::watch::Sender<Option<MicroVm>>,
    disks: Arc<tokio::sync::Mutex<()>>,
    failures: u32,
    recoveries: Recoveries,
}

impl Driver {
    pub fn new(host: Host, id: String, shared: Shared, adopted: Option<(MicroVm, u64)>) -> Self {
        let Shared { wake, current, disks } = shared;
        current.send_replace(adopted.as_ref().map(|(vm, _)| vm.clone()));
        let machine = adopted.map(|(vm, generation)| Booted {
            vm,
            generation,
            since: Moment::now(),
            told: None,
            behind: false,
        });
        Driver { host, id, wake, machine, current, disks, failures: 0, recoveries: Recoveries::default() }
    }

    /// Drives until the instance's record is gone.
    pub async fn run(mut self) {
        self.go_on().await;
        while let Some(instance) = self.host.records.get::<Instance>(&self.id) {
            let done = self.step(&instance).await;
            if let Err(error) = done {
                tracing::warn!(instance = self.id, "will be tried again: {error}");
                tokio::select! {
                    () = sleep(RETRY_AFTER) => {}
                    () = self.wake.notified() => {}
                }
            }
        }
    }

    /// Has an adopted machine go on that the daemon before had paused to copy its disk.
    async fn go_on(&self) {
        let Some(vm) = self.machine.as_ref().map(|machine| machine.vm.clone()) else { return };
        let disks = self.disks.lock().await;
        if vm.started().await.is_ok() && matches!(vm.state(), crate::microvm::State::Paused) {
            tracing::info!(instance = self.id, "goes on: its disk is not copied any more");
            copies::resume(&vm).await;
        }
        drop(disks);
    }

    /// One round: does what is next, or waits until there is something to do.
    async fn step(&mut self, instance: &Instance) -> Result<(), Error> {
        match (instance.desired, &self.machine) {
            (Desired::Running, None) => self.boot(instance).await,
            (Desired::Running, Some(machine)) if machine.generation != instance.generation => {
                let stop = Stop::Reboot { grace: self.host.limits.stop_within };
                self.end_machine(stop).await;
                Ok(())
            }
            (Desired::Running, Some(_)) => self.watch(instance).await,
            (Desired::Stopped, _) if instance.state == InstanceState::Stopped && self.machine.is_none() => {
                self.wake.notified().await;
                Ok(())
            }
            (Desired::Stopped, _) => self.stop(instance).await,
            (Desired::Terminated, None) if instance.state == InstanceState::Terminated => {
                self.forget(instance).await
            }
            (Desired::Terminated, _) => self.terminate(instance).await,
        }
    }

    async fn boot(&mut self, instance: &Instance) -> Result<(), Error> {
        if instance.state != InstanceState::Pending && instance.state != InstanceState::Running {
            self.set_state(InstanceState::Pending, instance.state_reason.clone()).await?;
        }
        // A copy of its disks that is under way comes first.
        let Some(_disks) = self.disks_to_itself(instance).await else { return Ok(()) };
        let begun = Moment::now();
        let mut report = BootReport::default();
        match self.try_boot(instance, begun, &mut report).await {
            Ok((vm, told)) => {
                fault::point("instance.booted");
                self.current.send_replace(Some(vm.clone()));
                let (generation, since) = (instance.generation, Moment::now());
                self.machine = Some(Booted { vm, generation, since, told, behind: false });
                let (id, now) = (&self.id, self.host.now());
                let modified = self.host.records.modify(id, |instance: &mut Instance| {
                    if instance.desired == Desired::Running {
                        enter(instance, InstanceState::Running, None, now);
                        instance.boot = Some(report);
                        instance.status = StatusChecks {
                            vmm: Check::Ok,
                            agent: Check::Initializing,
                            network: Check::Initializing,
                        };
                    }
                    Ok::<_, Error>(())
                });
                modified.await.map(drop)
            }
            Err(Failed::Superseded) => Ok(()),
            Err(Failed::Because(why)) => self.failed(why).await,
        }
    }

    /// Disks, interface, microVM. What was begun is undone by whoever comes next: `failed`, `stop`, or a next try.
    async fn try_boot(
        &self,
        instance: &Instance,
        begun: Moment,
        report: &mut BootReport,
    ) -> Result<(MicroVm, Option<Told>), Failed> {
        let elapsed = || micros(begun.elapsed());
        self.volumes_made(instance).await?;
        let (host, of) = (self.host.clone(), instance.clone());
        let disks = tokio::task::spawn_blocking(move || launch::make_disks(&host, &of));
        disks.await.map_err(|error| Failed::because(&error))?.map_err(|error| Failed::because(&error))?;
        report.disks_us = Some(elapsed());
        fault::point("instance.disks");
        let attached = self.host.wiring.attach(&self.host.records, &self.id).await;
        attached.map_err(|error| Failed::because(&error))?;
        report.network_us = Some(elapsed());
        fault::point("instance.network");
        let spec = launch::spec(&self.host, instance).map_err(|error| Failed::because(&error))?;
        let (groups, ports) = (instance.security_groups.clone(), instance.published_ports.clone());
        let told = spec.metadata.clone().map(|metadata| Told { groups, ports, metadata });
        let vm = self.host.machines.create(spec);
        let starting = vm.clone();
        let mut started = std::pin::pin!(starting.started());
        loop {
            tokio::select! {
                result = &mut started => match result {
                    Ok(()) => break,
                    Err(ending) => return Err(Failed::because(&ending.reason)),
                },
                () = self.wake.notified() => {
                    if !self.still_wanted(instance) {
                        vm.stop(Stop::Force).await;
                        return Err(Failed::Superseded);
                    }
                }
            }
        }
        let times = vm.times();
        let network_us = report.network_us.unwrap_or(0);
        report.vmm_us = times.api_ready.map(|time| micros(time).saturating_add(network_us));
        report.started_us = Some(elapsed());
        Ok((vm, told))
    }

    /// Whether the boot that is under way is the one that is wanted.
    fn still_wanted(&self, instance: &Instance) -> bool {
        let wanted = self.host.records.get::<Instance>(&self.id);
        wanted.is_some_and(|now| now.desired == Desired::Running && now.generation == instance.generation)
    }

    /// Waits until nobody else works on the instance's disks. None if it is not to boot any more.
    async fn disks_to_itself(&self, instance: &Instance) -> Option<OwnedMutexGuard<()>> {
        let mut free = std::pin::pin!(self.disks.clone().lock_owned());
        loop {
            tokio::select! {
                disks = &mut free => return Some(disks),
                () = self.wake.notified() => if !self.still_wanted(instance) { return None; },
            }
        }
    }

    /// Waits until the volumes are there that were asked for with the instance.
    async fn volumes_made(&self, instance: &Instance) -> Result<(), Failed> {
        let mut changes = self.host.records.subscribe();
        loop {
            let volumes = volumes::data_volumes(&self.host.records.read(), instance);
            if let Some(failed) = volumes.iter().find(|volume| volume.state == VolumeState::Error) {
                let why = failed.state_reason.as_ref().map(|why| why.message.clone()).unwrap_or_default();
                return Err(Failed::because(&format!("volume {} could not be made: {why}", failed.id)));
            }
            if !volumes.iter().any(|volume| volume.state == VolumeState::Creating) {
                return Ok(());
            }
            tokio::select! {
                // Others' changes wake us, too; looking again costs little.
                _ = changes.recv() => {}
                () = self.wake.notified() => if !self.still_wanted(instance) {
                    return Err(Failed::Superseded);
                },
            }
        }
    }

    /// Looks after a running machine until the record changes or the machine ends.
    async fn watch(&mut self, instance: &Instance) -> Result<(), Error> {
        let Some(machine) = &self.machine else { return Ok(()) };
        let (vm, since, generation) = (machine.vm.clone(), machine.since, machine.generation);
        if instance.state != InstanceState::Running {
            // Adopted: it was booted, but that was not written down.
            self.set_state(InstanceState::Running, None).await?;
        }
        // Only an agent that is there can be missed: what was found to answer by the daemon before counts, too.
        let mut looks = Looks::of(instance.status.agent == Check::Ok);
        loop {
            tokio::select! {
                ending = vm.ended() => return self.ended(&ending, since).await,
                () = self.wake.notified() => {
                    let now = self.host.records.get::<Instance>(&self.id);
                    let same = |now: Arc<Instance>| {
                        now.desired == instance.desired && now.generation == instance.generation
                    };
                    if !now.is_some_and(same) {
                        return Ok(());
                    }
                    self.update_guest().await;
                }
                look = looks.look(&vm, since, self.host.limits.check_every) => {
                    if let Some(status) = looks.take(&look, self.host.wiring.is_connected()) {
                        self.write_status(status, &vm, since, generation).await?;
                    }
                    if self.is_behind() {
                        self.update_guest().await;
                    }
                    if let Some(why) = looks.wedged()
                        && self.recover(why, since, generation).await?
                    {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Whether a change did not reach the guest or its network, and is to be tried again.
    fn is_behind(&self) -> bool {
        self.machine.as_ref().is_some_and(|machine| machine.behind)
    }

    /// Tells a running guest's metadata and network what has changed of its record.
    async fn update_guest(&mut self) {
        if !self.host.wiring.is_connected() {
            return;
        }
        let (Some(instance), Some(machine)) =
            (self.host.records.get::<Instance>(&self.id), &mut self.machine)
        else {
            return;
        };
        let metadata = super::metadata::document(&self.host.records.read(), &instance);
        let (groups, ports) = (instance.security_groups.clone(), instance.published_ports.clone());
        let wanted = Told { groups, ports, metadata };
        // Most changes are of what the driver itself writes down.
        if machine.told.as_ref() == Some(&wanted) {
            return;
        }
        let attached = self.host.wiring.attach(&self.host.records, &self.id).await;
        if let Err(error) = &attached {
            tracing::warn!(instance = self.id, "its network could not be changed: {error}");
        }
        let put = machine.vm.put_metadata(wanted.metadata.clone()).await;
        if let Err(error) = &put {
            tracing::warn!(instance = self.id, "its metadata could not be changed: {error}");
        }
        machine.behind = attached.is_err() || put.is_err();
        machine.told = (!machine.behind).then_some(wanted);
    }

    /// Boots a guest anew that does not answer, if that is wanted and has not been tried too often. Whether it did.
    async fn recover(&mut self, why: &str, since: Moment, generation: u64) -> Result<bool, Error> {
        if !self.recoveries.may(since.elapsed()) {
            return Ok(false);
        }
        let message = format!("{why} ({IN_A_ROW} times in a row): it was booted anew");
        let mut recovers = false;
        let modified = self.host.records.modify(&self.id, |instance: &mut Instance| {
            let same = instance.desired == Desired::Running && instance.generation == generation;
            recovers = same && instance.auto_recovery;
            if recovers {
                boot_anew(instance);
                instance.state_reason = Some(reason::new(reason::UNRESPONSIVE, &message));
            }
            Ok::<_, Error>(())
        });
        modified.await?;
        if recovers {
            tracing::warn!(instance = self.id, "{message}");
            self.recoveries.count();
            // It would not hear that it is asked to.
            self.end_machine(Stop::Force).await;
        }
        Ok(recovers)
    }

    async fn write_status(
        &self,
        status: StatusChecks,
        vm: &MicroVm,
        since: Moment,
        generation: u64,
    ) -> Result<(), Error> {
        let times = vm.times();
        let agent_us = micros(since.elapsed());
        let modified = self.host.records.modify(&self.id, |instance: &mut Instance| {
            // Another boot may have been asked for meanwhile.
            if instance.state != InstanceState::Running || instance.generation != generation {
                return Ok(());
            }
            instance.status = status;
            if let Some(boot) = &mut instance.boot
                && boot.agent_us.is_none()
                && status.agent == Check::Ok
            {
                boot.guest_init_us = times.guest_init.map(micros);
                boot.agent_us = boot.started_us.map(|started| started.saturating_add(agent_us));
            }
            Ok::<_, Error>(())
        });
        modified.await.map(drop)
    }

    /// The machine has ended by itself.
    async fn ended(&mut self, ending: &Ending, since: Moment) -> Result<(), Error> {
        self.machine = None;
        self.current.send_replace(None);
        if since.elapsed() >= HEALTHY_AFTER {
            self.failures = 0;
        }
        tracing::info!(instance = self.id, "its machine ended: {}", ending.reason);
        let now = self.host.now();
        match ending.reason {
            Reason::PoweredOff => {
                let modified = self.host.records.modify(&self.id, |instance: &mut Instance| {
                    if instance.desired == Desired::Running {
                        let (desired, state) = match instance.shutdown_behavior {
                            ShutdownBehavior::Stop => (Desired::Stopped, InstanceState::Stopping),
                            ShutdownBehavior::Terminate => (Desired::Terminated, InstanceState::ShuttingDown),
                        };
                        instance.desired = desired;
                        enter(
                            instance,
                            state,
                            Some(reason::guest_initiated("the guest powered itself off")),
                            now,
                        );
                    }
                    Ok::<_, Error>(())
                });
                modified.await.map(drop)
            }
            Reason::Rebooted => {
                let modified = self.host.records.modify(&self.id, |instance: &mut Instance| {
                    boot_anew(instance);
                    Ok::<_, Error>(())
                });
                modified.await.map(drop)
            }
            Reason::Detached => std::future::pending().await,
            ref other => self.failed(reason::internal(other.to_string())).await,
        }
    }

    /// Starts again after a pause, or gives up.
    async fn failed(&mut self, why: StateReason) -> Result<(), Error> {
        self.failures = self.failures.saturating_add(1);
        tracing::warn!(instance = self.id, failures = self.failures, "it failed: {}", why.message);
        self.host.wiring.detach(&self.tap()).await?;
        fault::point("instance.failed");
        let give_up = self.failures >= FAILURES;
        let now = self.host.now();
        let modified = self.host.records.modify(&self.id, |instance: &mut Instance| {
            if instance.desired != Desired::Running {
                return Ok(());
            }
            if give_up {
                instance.desired = Desired::Stopped;
                enter(instance, InstanceState::Stopping, Some(why.clone()), now);
            } else {
                instance.generation = instance.generation.saturating_add(1);
                instance.state_reason = Some(why.clone());
                instance.status =
                    StatusChecks { vmm: Check::Impaired, agent: Check::Unknown, network: Check::Unknown };
            }
            Ok::<_, Error>(())
        });
        modified.await?;
        if give_up {
            self.failures = 0;
            return Ok(());
        }
        let pause =
            self.host.limits.retry_after.saturating_mul(1 << self.failures.min(16)).min(LONGEST_PAUSE);
        let until = Moment::now() + pause;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Ok(()),
                () = self.wake.notified() => {
                    let instance = self.host.records.get::<Instance>(&self.id);
                    if instance.is_none_or(|instance| instance.desired != Desired::Running) {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn stop(&mut self, instance: &Instance) -> Result<(), Error> {
        if instance.state != InstanceState::Stopping {
            self.set_state(InstanceState::Stopping, instance.state_reason.clone()).await?;
        }
        self.take_down(instance).await?;
        let now = self.host.now();
        let modified = self.host.records.modify(&self.id, |instance: &mut Instance| {
            if instance.desired == Desired::Stopped {
                let why = instance.state_reason.take();
                enter(instance, InstanceState::Stopped, why, now);
                instance.status = StatusChecks::default();
                instance.force_stop = false;
            }
            Ok::<_, Error>(())
        });
        modified.await.map(drop)
    }

    async fn terminate(&mut self, instance: &Instance) -> Result<(), Error> {
        self.take_down(instance).await?;
        // What copies a disk is not surprised by its end.
        let disks = self.disks.clone().lock_owned().await;
        let now = self.host.now();
        self.host
            .records
            .update(|tables, changes| {
                let Some(current) = tables.instances.get(&self.id) else { return Ok::<_, Error>(()) };
                let mut instance = (**current).clone();
                let why = instance.state_reason.take();
                enter(&mut instance, InstanceState::Terminated, why, now);
                instance.status = StatusChecks::default();
                changes.replace(tables, &instance);
                let own = tables.volumes.iter().filter(|volume| {
                    volume.attachment.as_ref().is_some_and(|attachment| attachment.instance_id == self.id)
                });
                for volume in own {
                    let mut volume = (**volume).clone();
                    let goes =
                        volume.attachment.take().is_some_and(|attachment| attachment.delete_on_termination);
                    volume.state = match volume.state {
                        _ if goes => VolumeState::Deleting,
                        VolumeState::InUse => VolumeState::Available,
                        state => state,
                    };
                    changes.replace(tables, &volume);
                }
                Ok(())
            })
            .await?;
        drop(disks);
        fault::point("instance.terminated");
        Ok(())
    }

    /// Removes, after a while, what is left of a terminated instance.
    async fn forget(&mut self, instance: &Instance) -> Result<(), Error> {
        let visible = (self.host.now() - instance.state_since).to_std().unwrap_or_default();
        let rest = self.host.limits.terminated_visible.saturating_sub(visible);
        sleep(rest).await;
        let console = launch::console_log(&self.host, &self.id);
        let _ = tokio::fs::remove_file(&console.path).await;
        let _ = tokio::fs::remove_file(console.rotated()).await;
        fault::point("instance.console-removed");
        self.host
            .records
            .update(|tables, changes| {
                if tables.instances.get(&self.id).is_some() {
                    changes.delete::<Instance>(tables, &self.id);
                }
                Ok::<_, Error>(())
            })
            .await
    }

    /// Ends the machine and removes its interface. Each is done already where it is not there.
    async fn take_down(&mut self, instance: &Instance) -> Result<(), Error> {
        let grace = self.host.limits.stop_within;
        self.end_machine(if instance.force_stop { Stop::Force } else { Stop::Orderly { grace } }).await;
        fault::point("instance.stopped-machine");
        self.host.wiring.detach(&instance.interface.tap).await?;
        fault::point("instance.unplugged");
        Ok(())
    }

    /// Ends the machine, if there is one; sooner if the record is changed to say so. A copy of its disks that is under
    /// way comes first, unless it is to be ended by force.
    async fn end_machine(&mut self, how: Stop) {
        let Some(machine) = self.machine.take() else { return };
        let disks = if how == Stop::Force { None } else { self.disks_for_the_end().await };
        // A guest that is paused for a copy is not to go on under it.
        let how = if disks.is_none() { Stop::Force } else { how };
        let mut stopping = std::pin::pin!(machine.vm.stop(how));
        loop {
            tokio::select! {
                ending = &mut stopping => {
                    if matches!(ending.reason, Reason::Detached) {
                        // It was let go and runs on: whoever adopts it ends it, and writes that down.
                        return std::future::pending().await;
                    }
                    if let Some(error) = &ending.left_behind {
                        tracing::warn!(instance = self.id, "not all of its machine could be removed: {error}");
                    }
                    break;
                }
                () = self.wake.notified() => {
                    let instance = self.host.records.get::<Instance>(&self.id);
                    if instance.is_some_and(|instance| instance.force_stop) {
                        machine.vm.stop(Stop::Force).await;
                    }
                }
            }
        }
        self.current.send_replace(None);
    }

    /// Waits until nobody else works on the instance's disks. None if it is to be ended by force meanwhile.
    async fn disks_for_the_end(&self) -> Option<OwnedMutexGuard<()>> {
        let mut free = std::pin::pin!(self.disks.clone().lock_owned());
        loop {
            tokio::select! {
                disks = &mut free => return Some(disks),
                () = self.wake.notified() => {
                    let instance = self.host.records.get::<Instance>(&self.id);
                    if instance.is_none_or(|instance| instance.force_stop) {
                        return None;
                    }
                }
            }
        }
    }

    fn tap(&self) -> String {
        self.host.wiring.tap_name(&self.id)
    }

    async fn set_state(&self, state: InstanceState, why: Option<StateReason>) -> Result<(), Error> {
        let now = self.host.now();
        let modified = self.host.records.modify(&self.id, |instance: &mut Instance| {
            enter(instance, state, why.clone(), now);
            Ok::<_, Error>(())
        });
        modified.await.map(drop)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Why a boot came to nothing.
enum Failed {
    /// Something else is wanted meanwhile.
    Superseded,
    Because(StateReason),
}

impl Failed {
    fn because(why: &impl ToString) -> Self {
        Failed::Because(reason::internal(why.to_string()))
    }
}
