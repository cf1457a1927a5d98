//! The controller: does what the control API asks, where the microVM's state allows it.
//!
//! ```text
//!                     Start                     Pause
//!   Not started ────────────────▶ Running ◀──────────────▶ Paused ──┐ Create snapshot
//!        │  ▲ │                      │          Resume       ▲ │ ▲  │
//!        └──┘ │ Start or Load failed └───────▶ exit ◀────────┼─┘ └──┘
//!             └──────────────────────────────────────────────┘ Load snapshot
//! ```
//!
//! *Not started*: the process is there and nothing of the microVM is. Requests put together its
//! configuration; each is taken whole or refused whole. What acts on a running machine is refused with
//! [`ControlError::NotBeforeStart`].
//!
//! *Start* checks that the configuration can boot and hands it to the [`MachineBuilder`]. If that fails
//! nothing of the machine is left, the state remains *Not started*, and the client may correct the
//! configuration and try again. If it succeeds the state is *Running*, and what configures a machine is
//! refused with [`ControlError::NotAfterStart`] from then on.
//!
//! *Load snapshot* makes the machine of a snapshot, with its configuration, where nothing was configured before.
//! It is paused, unless the request has it resumed at once. If that fails the state remains *Not started*.
//!
//! *Pause* stops every vCPU and device; *Resume* lets them go on. Asking for the state there already is
//! succeeds and does nothing. If the machine fails to pause or resume, the state is the one before.
//! Everything else a running machine does (new file behind a drive, new limits, balloon, metadata,
//! metrics) it also does while paused.
//!
//! *Exit* is not the controller's: the guest stops, resets or crashes, or a signal comes, and the main
//! loop ends the process with one of the codes in [`crate::exit`], whatever state this is in.
//!
//! The configuration is kept after the start and follows every update, so that the client reads what
//! is, not what was. The controller makes no system call but to look at files a request names, and to
//! read the CPU configuration a configuration file names; it knows neither HTTP nor KVM.

mod error;
mod files;
mod machine;
mod runtime;

use std::time::Instant;

use serde_json::Value;

pub use error::ControlError;
pub use machine::{Machine, MachineBuilder, MachineError, StartError};

use crate::api::{Action, Answer};
use crate::config::{
    CpuConfigSource, FullVmConfig, InstanceInfo, MmdsConfig, SnapshotLoadConfig, VmConfig, VmState,
};
use crate::event_loop::lock;
use crate::metrics::METRICS;
use crate::mmds::{Mmds, MmdsError, SharedMmds};
use crate::{logger, metrics};

/// The name `GET /` gives as `app_name`.
const APP_NAME: &str = "Pulau";

/// The microVM as far as there is one.
enum Stage {
    NotStarted(Box<dyn MachineBuilder>),
    Started { machine: Box<dyn Machine>, paused: bool, stop_asked_for: bool },
}

/// See the module's text.
pub struct Controller {
    instance_id: String,
    config: VmConfig,
    mmds: SharedMmds,
    stage: Stage,
}

type Outcome = Result<Answer, ControlError>;

impl Controller {
    /// A controller of a microVM that is not started and has the default configuration. `mmds` is also
    /// the builder's, where its machines are to serve it.
    pub fn new(instance_id: String, mmds: SharedMmds, builder: Box<dyn MachineBuilder>) -> Self {
        Self { instance_id, config: VmConfig::default(), mmds, stage: Stage::NotStarted(builder) }
    }

    /// Where the microVM is in its life.
    pub fn state(&self) -> VmState {
        match &self.stage {
            Stage::NotStarted(_) => VmState::NotStarted,
            Stage::Started { paused: false, .. } => VmState::Running,
            Stage::Started { paused: true, .. } => VmState::Paused,
        }
    }

    /// Whether the guest has been asked to stop. To clients of Firecracker a reset is then what they wanted:
    /// it is how guests without ACPI stop.
    pub fn stop_asked_for(&self) -> bool {
        matches!(self.stage, Stage::Started { stop_asked_for: true, .. })
    }

    /// The configuration as it is now.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Takes a whole configuration, as from `--config-file`. With an error the microVM's configuration
    /// is as before.
    pub fn load(&mut self, mut full: FullVmConfig) -> Result<(), ControlError> {
        if let Some(config) = &full.logger {
            logger::configure(config)?;
        }
        if let Some(config) = &full.metrics {
            metrics::configure(config, &self.instance_id)?;
        }
        if let Some(CpuConfigSource::File(path)) = &full.cpu_config {
            full.cpu_config = Some(CpuConfigSource::Inline(files::read_cpu_config(path)?));
        }
        let config = VmConfig::try_from(full)?;
        if let Some(boot_source) = &config.boot_source {
            files::check_boot_source(boot_source)?;
        }
        config.drives.iter().try_for_each(files::check_drive)?;
        config.pmem.iter().try_for_each(files::check_pmem)?;
        if let Some(mmds) = &config.mmds {
            self.mmds().configure(mmds.version, mmds.imds_compat);
        }
        self.config = config;
        Ok(())
    }

    /// Takes the metadata, as from `--metadata`.
    pub fn put_metadata(&mut self, document: Value) -> Result<(), MmdsError> {
        self.mmds().put(document)
    }

    /// Does what a request asks for.
    pub fn handle(&mut self, action: Action) -> Outcome {
        match action {
            Action::GetInstanceInfo => Ok(Answer::InstanceInfo(self.instance_info())),
            Action::GetVersion => Ok(Answer::Version(env!("CARGO_PKG_VERSION").to_owned())),
            Action::GetFullConfig => Ok(Answer::FullConfig(Box::new(FullVmConfig::from(&self.config)))),
            Action::GetMachineConfig => Ok(Answer::MachineConfig(self.config.machine.clone())),
            Action::GetBalloon => {
                let balloon = self.config.balloon.clone();
                balloon.map(Answer::Balloon).ok_or(ControlError::NoBalloon)
            }
            Action::GetMetrics => Ok(Answer::Metrics(metrics::totals())),
            Action::GetMmds => Ok(Answer::Mmds(self.mmds().json())),
            Action::PutMmds(document) => {
                self.put_metadata(document)?;
                Ok(Answer::Done)
            }
            Action::PatchMmds(patch) => {
                self.mmds().patch(&patch)?;
                Ok(Answer::Done)
            }
            Action::Unsupported(what) => Err(ControlError::Unsupported(what)),
            action => match &mut self.stage {
                Stage::NotStarted(_) => self.handle_before_start(action),
                Stage::Started { machine, paused, stop_asked_for } => {
                    let asks_to_stop = action == Action::SendCtrlAltDel;
                    let outcome = runtime::handle(machine.as_mut(), paused, &mut self.config, action);
                    *stop_asked_for |= asks_to_stop && outcome.is_ok();
                    outcome
                }
            },
        }
    }

    fn handle_before_start(&mut self, action: Action) -> Outcome {
        let config = &mut self.config;
        match action {
            Action::SetMachineConfig(machine) => config.set_machine(machine)?,
            Action::UpdateMachineConfig(update) => {
                config.set_machine(config.machine.updated(&update))?;
            }
            Action::SetCpuConfig(cpu) => config.set_cpu(cpu)?,
            Action::SetBootSource(boot_source) => {
                boot_source.check()?;
                files::check_boot_source(&boot_source)?;
                config.set_boot_source(boot_source)?;
            }
            Action::SetDrive(drive) => {
                drive.check()?;
                files::check_drive(&drive)?;
                config.set_drive(drive)?;
            }
            Action::SetPmem(pmem) => {
                pmem.check()?;
                files::check_pmem(&pmem)?;
                config.set_pmem(pmem)?;
            }
            Action::SetNetworkInterface(interface) => config.set_network_interface(interface)?,
            Action::SetVsock(vsock) => config.set_vsock(vsock)?,
            Action::SetEntropy(entropy) => config.set_entropy(entropy),
            Action::SetSerial(serial) => config.set_serial(serial),
            Action::SetBalloon(balloon) => config.set_balloon(balloon)?,
            Action::SetMmdsConfig(mmds) => self.set_mmds_config(mmds)?,
            Action::SetLogger(logger) => logger::configure(&logger)?,
            Action::SetMetrics(metrics) => metrics::configure(&metrics, &self.instance_id)?,
            Action::Start => self.start()?,
            Action::LoadSnapshot(request) => self.load_snapshot(&request)?,
            _ => return Err(ControlError::NotBeforeStart),
        }
        Ok(Answer::Done)
    }

    fn start(&mut self) -> Result<(), ControlError> {
        let Stage::NotStarted(builder) = &mut self.stage else {
            return Err(ControlError::NotAfterStart);
        };
        self.config.check_bootable()?;
        let machine = builder.start(&self.config)?;
        self.stage = Stage::Started { machine, paused: false, stop_asked_for: false };
        log::info!("The microVM was started.");
        Ok(())
    }

    fn load_snapshot(&mut self, request: &SnapshotLoadConfig) -> Result<(), ControlError> {
        let Stage::NotStarted(builder) = &mut self.stage else {
            return Err(ControlError::NotAfterStart);
        };
        if self.config != VmConfig::default() {
            return Err(ControlError::Configured);
        }
        let begun = Instant::now();
        let (mut machine, config) = builder.load(request).map_err(ControlError::Load)?;
        if let Some(mmds) = &config.mmds {
            self.mmds().configure(mmds.version, mmds.imds_compat);
        }
        self.config = config;
        let resumed = if request.resume_vm { machine.resume() } else { Ok(()) };
        let paused = !request.resume_vm || resumed.is_err();
        self.stage = Stage::Started { machine, paused, stop_asked_for: false };
        METRICS.latencies_us.load_snapshot.set(runtime::micros(begun));
        log::info!("The microVM was made from a snapshot.");
        Ok(resumed?)
    }

    fn instance_info(&self) -> InstanceInfo {
        InstanceInfo {
            id: self.instance_id.clone(),
            state: self.state(),
            vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
            app_name: APP_NAME.to_owned(),
        }
    }

    fn set_mmds_config(&mut self, config: MmdsConfig) -> Result<(), ControlError> {
        let (version, imds_compat) = (config.version, config.imds_compat);
        self.config.set_mmds(config)?;
        self.mmds().configure(version, imds_compat);
        Ok(())
    }

    fn mmds(&self) -> std::sync::MutexGuard<'_, Mmds> {
        lock(&self.mmds)
    }
}

#[cfg(test)]
mod tests;
