//! A simulated host: microVMs that are nothing but a state and a few timers, behind the same handles and with
//! the same states, requests and endings as real ones.
//!
//! Time is tokio's, so tests can pause and move it; thousands of microVMs cost a task each and little memory.
//! [`Simulation`] is the host: it outlives the tasks that drive its microVMs, as real VMMs outlive the daemon.
//! What a test wants to go wrong it says by [`Simulation::inject`]; what guests do, by [`Simulation::end`] and
//! the like. An agent answers in each guest (see `agent`). Files, networks and images are not looked at.

mod agent;
mod driver;
mod fault;
mod kept;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pulau_vmm::config::BalloonStats;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use super::handle::MicroVm;
use super::home::HomeError;
use super::process::Exit;
use super::request::State;
use super::spec::Spec;
use super::usage::Usage;

pub use fault::{At, Fault, How};

/// How long things take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// From the request to start until the guest boots.
    pub start: Duration,
    /// From there until the agent answers.
    pub agent: Duration,
    /// For a guest that was asked to end.
    pub stop: Duration,
}

/// A simulated host. Clones are the same host.
#[derive(Clone, Debug, Default)]
pub struct Simulation(Arc<Mutex<World>>);

#[derive(Debug, Default)]
struct World {
    times: Times,
    guests: BTreeMap<String, Guest>,
    faults: Vec<Fault>,
    commands: Option<Commands>,
    /// Where its microVMs are kept, if they are to outlive this process.
    kept: Option<kept::Directory>,
}

impl World {
    /// Writes down a microVM that is new, or has changed.
    fn keep(&self, id: &str) -> std::io::Result<()> {
        match (&self.kept, self.guests.get(id)) {
            (Some(kept), Some(guest)) => kept.keep(id, guest),
            _ => Ok(()),
        }
    }

    fn remove(&mut self, id: &str) {
        self.guests.remove(id);
        if let Some(kept) = &self.kept {
            kept.forget(id);
        }
    }
}

/// What commands in guests do: from a microVM's name and the words of a command to its output and exit code. None
/// leaves it at what they do anyway.
type Answer = dyn Fn(&str, &[String]) -> Option<(String, i32)> + Send + Sync;

#[derive(Clone)]
struct Commands(Arc<Answer>);

impl std::fmt::Debug for Commands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Commands")
    }
}

/// One microVM.
#[derive(Debug)]
struct Guest {
    spec: Spec,
    /// Whether a driver has it.
    driven: bool,
    /// Since when it runs.
    started: Option<Instant>,
    paused: bool,
    ended: watch::Sender<Option<Exit>>,
    metadata: Value,
    balloon_mib: u32,
    files: BTreeMap<String, Vec<u8>>,
    usage: Usage,
    cpu: Cpu,
}

/// CPU time at a load that can be changed.
#[derive(Debug)]
struct Cpu {
    /// CPUs in use.
    load: f64,
    since: Instant,
    /// Used until then, in microseconds.
    used_us: f64,
}

impl Cpu {
    fn used_us(&self) -> f64 {
        self.used_us + self.since.elapsed().as_secs_f64() * 1e6 * self.load
    }
}

impl Simulation {
    /// A host on which everything takes no time.
    pub fn new() -> Self {
        Self::default()
    }

    /// A host on which things take so long.
    pub fn with_times(times: Times) -> Self {
        Simulation(Arc::new(Mutex::new(World { times, ..Default::default() })))
    }

    /// A host whose microVMs are kept in a directory, with those that are there already.
    ///
    /// # Errors
    ///
    /// The directory cannot be made or read.
    pub fn kept_in(dir: PathBuf) -> std::io::Result<Self> {
        let (kept, guests) = kept::Directory::open(dir)?;
        let world = World { kept: Some(kept), guests: guests.into_iter().collect(), ..Default::default() };
        Ok(Simulation(Arc::new(Mutex::new(world))))
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`MicroVm::create`].
    pub fn create(&self, spec: Spec) -> MicroVm {
        let (vm, reins) = MicroVm::new(&spec.id);
        tokio::spawn(driver::create(self.clone(), spec, reins));
        vm
    }

    /// As [`MicroVm::adopt`].
    ///
    /// # Errors
    ///
    /// There is none of this name, or somebody drives it.
    pub fn adopt(&self, id: &str) -> Result<MicroVm, HomeError> {
        let driving = driver::Driving::take(self, id)?;
        let (vm, reins) = MicroVm::new(id);
        tokio::spawn(driver::adopt(driving, reins));
        Ok(vm)
    }

    /// The names of all microVMs there are.
    pub fn list(&self) -> Vec<String> {
        self.lock().guests.keys().cloned().collect()
    }

    /// Removes those that nobody drives, and returns their names.
    pub fn sweep(&self) -> Vec<String> {
        let mut world = self.lock();
        let undriven = world.guests.iter().filter(|(_, guest)| !guest.driven);
        let swept: Vec<String> = undriven.map(|(id, _)| id.clone()).collect();
        swept.iter().for_each(|id| world.remove(id));
        swept
    }

    /// Has something go wrong.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// From now on commands in guests do what this says.
    pub fn on_command(
        &self,
        answer: impl Fn(&str, &[String]) -> Option<(String, i32)> + Send + Sync + 'static,
    ) {
        self.lock().commands = Some(Commands(Arc::new(answer)));
    }

    /// The next fault for `id` at `at`, used up.
    fn fault(&self, at: At, id: &str) -> Option<How> {
        let mut world = self.lock();
        let index = world.faults.iter().position(|fault| fault.fits(at, id))?;
        let fault = world.faults.get_mut(index)?;
        let how = fault.how.clone();
        fault.times = fault.times.saturating_sub(1);
        if fault.times == 0 {
            world.faults.remove(index);
        }
        Some(how)
    }

    /// Ends a microVM as its guest or somebody else on the host would: [`POWER_OFF`], [`REBOOT`], [`PANIC`], a
    /// signal. Returns whether it ran.
    pub fn end(&self, id: &str, exit: Exit) -> bool {
        let world = self.lock();
        let Some(guest) = world.guests.get(id).filter(|guest| guest.started.is_some()) else { return false };
        guest.ended.send_if_modified(|ended| {
            let runs = ended.is_none();
            ended.get_or_insert(exit);
            runs
        })
    }

    /// The metadata a guest sees.
    pub fn metadata(&self, id: &str) -> Option<Value> {
        self.of(id, |guest| guest.metadata.clone())
    }

    /// Whether a microVM that was started runs or is paused.
    pub fn state(&self, id: &str) -> Option<State> {
        let look = self.of(id, |guest| (guest.started.is_some(), guest.paused));
        look.filter(|(started, _)| *started)
            .map(|(_, paused)| if paused { State::Paused } else { State::Running })
    }

    /// What a microVM was made of.
    pub fn spec(&self, id: &str) -> Option<Spec> {
        self.of(id, |guest| guest.spec.clone())
    }

    /// From now on a guest uses so many CPUs.
    pub fn set_cpu_load(&self, id: &str, load: f64) {
        self.of(id, |guest| {
            guest.cpu.used_us = guest.cpu.used_us();
            guest.cpu.since = Instant::now();
            guest.cpu.load = load;
        });
    }

    /// What a microVM uses, but for its CPU time.
    pub fn set_usage(&self, id: &str, usage: Usage) {
        self.of(id, |guest| guest.usage = usage);
    }

    fn of<T>(&self, id: &str, look: impl FnOnce(&mut Guest) -> T) -> Option<T> {
        self.lock().guests.get_mut(id).map(look)
    }
}

/// The guest powers itself off.
pub const POWER_OFF: Exit = Exit::Code(pulau_vmm::exit::ExitCode::Ok as i32);
/// The guest reboots itself.
pub const REBOOT: Exit = Exit::Code(pulau_vmm::exit::ExitCode::GuestReboot as i32);
/// The guest's kernel panics.
pub const PANIC: Exit = Exit::Code(pulau_vmm::exit::ExitCode::GuestPanic as i32);

impl Guest {
    fn new(spec: Spec) -> Self {
        let cpu = Cpu { load: 0.01, since: Instant::now(), used_us: 0.0 };
        let balloon_mib = spec.vm.balloon.as_ref().map_or(0, |balloon| balloon.amount_mib);
        let memory = spec.vm.machine.mem_size_mib.saturating_mul(1 << 19);
        Guest {
            driven: true,
            started: None,
            paused: false,
            ended: watch::Sender::new(None),
            metadata: spec.metadata.clone().unwrap_or_else(|| Value::Object(serde_json::Map::new())),
            balloon_mib,
            files: BTreeMap::new(),
            usage: Usage { memory_bytes: memory, resident_bytes: memory, ..Default::default() },
            cpu,
            spec,
        }
    }

    fn usage(&self) -> Usage {
        // A float's conversion to an integer saturates.
        Usage { cpu_time_us: self.cpu.used_us() as u64, ..self.usage }
    }

    fn balloon_statistics(&self) -> BalloonStats {
        let (mib, total) = (self.balloon_mib, self.spec.vm.machine.mem_size_mib.saturating_mul(1 << 20));
        BalloonStats {
            target_mib: mib,
            actual_mib: mib,
            target_pages: mib.saturating_mul(256),
            actual_pages: mib.saturating_mul(256),
            total_memory: Some(total),
            free_memory: Some(total / 2),
            available_memory: Some(total / 2),
            ..Default::default()
        }
    }
}

fn home() -> PathBuf {
    "(simulated)".into()
}
