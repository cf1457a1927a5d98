//! What exists of a microVM on this host, as whoever drives it holds it.

use std::io;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::timeout;

use super::api::{Api, ApiError};
use super::console::ConsoleLog;
use super::ending::{Ending, Reason, StartError};
use super::guest::Sockets;
use super::home::Home;
use super::process::{Exit, Process};
use super::request::{RequestError, SharedFacts};
use super::spec::{Host, Spec};
use super::start::API_UP_WITHIN;
use super::usage::Usage;
use crate::fault;

/// From SIGKILL to the end.
pub(super) const DIES_WITHIN: Duration = Duration::from_secs(10);
/// One request to a VMM whose guest runs. None of them takes long, and a stop waits its turn behind it.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// What exists of a microVM. Dropping it leaves all of it as it is, and frees it for another to adopt.
#[derive(Debug, Default)]
pub(super) struct Machine {
    home: Option<Home>,
    /// The process spawned where that is not the VMM itself: it makes the jail, starts the VMM in it and ends.
    jailer: Option<Process>,
    vmm: Option<Process>,
    api: Option<Api>,
}

impl Machine {
    /// What has a home, and perhaps more.
    pub fn of(home: Home) -> Self {
        Machine { home: Some(home), ..Default::default() }
    }

    pub fn move_in(&mut self, home: Home) -> &Home {
        self.home.insert(home)
    }

    pub fn home(&self) -> Option<&Home> {
        self.home.as_ref()
    }

    /// Takes hold of the VMM that was found.
    pub fn take(&mut self, vmm: Process) {
        self.vmm = Some(vmm);
    }

    /// Tells where the guest can be reached, by a vsock device and a console socket if it has them.
    pub fn tell(&self, vsock: bool, console: bool, facts: &SharedFacts) {
        let Some(home) = &self.home else { return };
        let mut facts = facts.lock();
        facts.reach = Some(Arc::new(Sockets {
            vsock: vsock.then(|| home.socket("vsock.sock")),
            console: console.then(|| home.socket("console.sock")),
        }));
        facts.console_log = Some(home.console_log());
        facts.vmm_log = Some(home.vmm_log());
    }

    /// Spawns the VMM and gets hold of its process.
    pub async fn spawn(&mut self, host: &Host, spec: &Spec, mut command: Command) -> Result<(), StartError> {
        let failed = |source| StartError::Spawn { vmm: host.vmm.clone(), source };
        let child = command.spawn().map_err(failed)?;
        fault::point("vm.forked");
        let pid = i32::try_from(child.id()).map_err(|e| failed(io::Error::other(e)))?;
        let process = Process::open(pid).map_err(failed)?;
        if spec.jail.is_none() {
            self.vmm = Some(process);
            return Ok(());
        }
        let jailer = self.jailer.insert(process);
        match timeout(API_UP_WITHIN, jailer.exited()).await {
            Ok(Exit::Code(0)) => {}
            Ok(exit) => return Err(StartError::Died(exit)),
            Err(_) => return Err(StartError::Silent(API_UP_WITHIN)),
        }
        self.find_jailed().map_err(failed)
    }

    /// Gets hold of the VMM the jailer has started. It is our child, too, so its number is still its own.
    fn find_jailed(&mut self) -> io::Result<()> {
        let Some(home) = &self.home else { return Ok(()) };
        let pid = std::fs::read_to_string(home.pid_file())?;
        self.vmm = Some(Process::open(pid.trim().parse().map_err(io::Error::other)?)?);
        Ok(())
    }

    /// Notes that the guest was told to boot, and keeps the connection over which it was.
    pub fn has_started(&mut self, mut api: Api) -> io::Result<()> {
        api.set_limit(ANSWERS_WITHIN);
        self.api = Some(api);
        self.home.as_ref().map_or(Ok(()), Home::record_started)
    }

    /// The connection to the VMM, made anew after one that failed.
    pub async fn api(&mut self) -> Result<&mut Api, ApiError> {
        let api = match self.api.take() {
            Some(api) => api,
            None => {
                let home =
                    self.home.as_ref().ok_or_else(|| ApiError::Connect(io::ErrorKind::NotFound.into()))?;
                Api::connect(&home.socket("api.sock"), ANSWERS_WITHIN).await?
            }
        };
        Ok(self.api.insert(api))
    }

    /// Gives up a connection on which an answer may still come, or none can any more.
    pub fn noted<T>(&mut self, result: Result<T, ApiError>) -> Result<T, RequestError> {
        if matches!(
            result,
            Err(ApiError::TimedOut { .. } | ApiError::Broken { .. } | ApiError::Answer { .. })
        ) {
            self.api = None;
        }
        Ok(result?)
    }

    /// What it has used of the host.
    pub async fn usage(&mut self) -> Result<Usage, RequestError> {
        let pid = self.vmm.as_ref().ok_or(RequestError::NotRunning)?.pid();
        let cgroup = self.home.as_ref().and_then(Home::cgroup);
        let metrics = self.api().await?.get::<serde_json::Value>("/metrics").await;
        let metrics = self.noted(metrics)?;
        Ok(Usage::of_host(pid, cgroup.as_deref()).with_metrics(&metrics))
    }

    /// The console's log, where it is to be kept within bounds.
    pub fn console(&self) -> Option<ConsoleLog> {
        self.home.as_ref()?.console()
    }

    /// Waits until the VMM has ended.
    pub async fn exited(&mut self) -> Exit {
        let exit = match &mut self.vmm {
            Some(vmm) => vmm.exited().await,
            None => Exit::Unknown,
        };
        match (exit, &self.home) {
            // Somebody else's child, but it wrote down why it ended.
            (Exit::Unknown, Some(home)) => home.recorded_exit(),
            _ => exit,
        }
    }

    /// Kills what runs and removes what there is. Takes some milliseconds, and is bounded.
    pub async fn bury(mut self, reason: Reason) -> Ending {
        drop(self.api.take());
        if let Some(jailer) = &mut self.jailer {
            // Left to finish, since it alone knows the VMM's number until it has written it down.
            if timeout(API_UP_WITHIN, jailer.exited()).await.is_err() {
                let _ = jailer.signal(Signal::SIGKILL);
                let _ = timeout(DIES_WITHIN, jailer.exited()).await;
            }
            if self.vmm.is_none() {
                // Fails if the jailer did: then there is no VMM.
                let _ = self.find_jailed();
            }
        }
        if let Some(vmm) = &mut self.vmm {
            let _ = vmm.signal(Signal::SIGKILL);
            let _ = timeout(DIES_WITHIN, vmm.exited()).await;
        }
        fault::point("vm.ended");
        let mut ending = Ending::new(reason, self.home.as_ref());
        if let Some(home) = self.home.take() {
            // May wait for the kernel: not on a thread that drives others.
            let removed = tokio::task::spawn_blocking(move || home.remove()).await;
            ending.left_behind = removed.unwrap_or_else(|e| Err(io::Error::other(e))).err();
        }
        ending
    }
}
