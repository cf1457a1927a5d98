//! The way from a [`Spec`] to a booting guest, and the way back from wherever on it one is.
//!
//! [`start`] adds to a [`Machine`] whatever it has made as soon as it is made, so that it can be dropped at
//! any await and [`Machine::bury`] still finds everything.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use pulau_vmm::config::{ActionConfig, ActionType, VmConfig};
use tokio::time::{Instant, sleep, timeout};

use super::api::{Api, ApiError};
use super::driver::SharedFacts;
use super::ending::{Ending, Reason, StartError};
use super::home::Home;
use super::jail::{Jail, JailError};
use super::process::{Exit, Process};
use super::spec::{Host, Spec};

/// From the spawn to the first answer. Takes some milliseconds; on an overloaded host, seen: 15 seconds.
const API_UP_WITHIN: Duration = Duration::from_secs(60);
/// One request. The slowest, the boot, reads the kernel and may touch all of the guest's memory.
const REQUEST_WITHIN: Duration = Duration::from_secs(60);
/// From SIGKILL to the end.
const DIES_WITHIN: Duration = Duration::from_secs(10);

/// What exists of a microVM on the host.
#[derive(Debug, Default)]
pub(super) struct Machine {
    home: Option<Home>,
    /// The process spawned where that is not the VMM itself: it makes the jail, starts the VMM in it and ends.
    jailer: Option<Process>,
    vmm: Option<Process>,
    pub api: Option<Api>,
}

/// Starts a microVM. After an error or when dropped midway, `machine` holds what there is to bury.
pub(super) async fn start(
    host: &Host,
    spec: &Spec,
    machine: &mut Machine,
    facts: &SharedFacts,
) -> Result<(), StartError> {
    spec.check()?;
    let home = machine.home.insert(Home::create(&host.run_dir, &spec.id, spec.jail.is_some())?);
    let mut jail = Jail::new(home);
    let config = jail.place(&spec.vm)?;
    let mut command = command(host, spec, home, &jail)?;
    jail.enter(host, spec, &mut command)?;
    {
        let mut facts = facts.lock();
        facts.vsock = config.vsock.as_ref().map(|_| home.socket("vsock.sock"));
        facts.console_log = Some(home.console_log());
        facts.vmm_log = Some(home.vmm_log());
        facts.spawned_at = Some(std::time::Instant::now());
    }
    let api_socket = home.socket("api.sock");
    machine.spawn(host, spec, command).await?;
    let time = |step: fn(&mut super::BootTimes) -> &mut Option<Duration>| {
        let mut facts = facts.lock();
        let elapsed = facts.spawned_at.map(|at| at.elapsed());
        *step(&mut facts.times) = elapsed;
    };

    let vmm = machine.vmm.as_mut().ok_or(StartError::Abandoned)?;
    let api = tokio::select! {
        biased;
        api = connect(&api_socket) => machine.api.insert(api?),
        exit = vmm.exited() => return Err(StartError::Died(exit)),
    };
    time(|times| &mut times.api_ready);
    let booted = async {
        configure(api, &config).await?;
        time(|times| &mut times.configured);
        api.put("/actions", &ActionConfig { action_type: ActionType::InstanceStart }).await
    };
    match booted.await {
        Ok(()) => time(|times| &mut times.started),
        // Most likely the VMM has died; how it did says more than that it no longer answers.
        Err(error @ ApiError::Broken { .. }) => match timeout(DIES_WITHIN, vmm.exited()).await {
            Ok(exit) => return Err(StartError::Died(exit)),
            Err(_) => return Err(error.into()),
        },
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// The VMM's command line, before the jail adds to it.
fn command(host: &Host, spec: &Spec, home: &Home, jail: &Jail<'_>) -> Result<Command, StartError> {
    let log = |path: &Path| {
        let open = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        open.map_err(|source| JailError::Prepare { path: path.to_owned(), source })
    };
    let (console, vmm_log): (File, File) = (log(&home.console_log())?, log(&home.vmm_log())?);
    let mut command = Command::new(&host.vmm);
    command
        .args(["--id", &spec.id])
        .arg("--api-sock")
        .arg(jail.socket("api.sock"))
        .stdin(Stdio::null())
        .stdout(console)
        .stderr(vmm_log)
        .env_clear()
        .current_dir("/")
        // Ctrl-C on our terminal is for us.
        .process_group(0);
    if spec.boot_timer {
        command.arg("--boot-timer");
    }
    Ok(command)
}

impl Machine {
    /// Spawns the VMM and gets hold of its process.
    async fn spawn(&mut self, host: &Host, spec: &Spec, mut command: Command) -> Result<(), StartError> {
        let failed = |source| StartError::Spawn { vmm: host.vmm.clone(), source };
        let child = command.spawn().map_err(failed)?;
        let pid = i32::try_from(child.id()).map_err(|e| failed(io::Error::other(e)))?;
        let process = Process::open(pid).map_err(failed)?;
        if spec.jail.is_none() {
            self.vmm = Some(process);
            let Some(home) = &self.home else { return Ok(()) };
            return std::fs::write(home.pid_file(), pid.to_string()).map_err(failed);
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

    /// Waits until the VMM has ended.
    pub async fn exited(&mut self) -> Exit {
        match &mut self.vmm {
            Some(vmm) => vmm.exited().await,
            None => Exit::Unknown,
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
        let mut ending = Ending::new(reason, self.home.as_ref());
        if let Some(home) = self.home.take() {
            // May wait for the kernel: not on a thread that drives others.
            let removed = tokio::task::spawn_blocking(move || home.remove()).await;
            ending.left_behind = removed.unwrap_or_else(|e| Err(io::Error::other(e))).err();
        }
        ending
    }
}

/// Waits for the VMM's control API.
async fn connect(socket: &Path) -> Result<Api, StartError> {
    let deadline = Instant::now() + API_UP_WITHIN;
    loop {
        match Api::connect(socket, REQUEST_WITHIN).await {
            Ok(api) => return Ok(api),
            Err(ApiError::Connect(e))
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
            Err(e) => return Err(e.into()),
        }
        if Instant::now() >= deadline {
            return Err(StartError::Silent(API_UP_WITHIN));
        }
        sleep(Duration::from_millis(1)).await;
    }
}

/// Tells the VMM what the microVM is to be. Devices in the order the guest is to find them.
async fn configure(api: &mut Api, config: &VmConfig) -> Result<(), ApiError> {
    api.put("/machine-config", &config.machine).await?;
    if let Some(cpu) = &config.cpu {
        api.put("/cpu-config", cpu).await?;
    }
    if let Some(boot) = &config.boot_source {
        api.put("/boot-source", boot).await?;
    }
    if let Some(serial) = &config.serial {
        api.put("/serial", serial).await?;
    }
    for drive in &config.drives {
        api.put(&format!("/drives/{}", drive.drive_id), drive).await?;
    }
    for pmem in &config.pmem {
        api.put(&format!("/pmem/{}", pmem.id), pmem).await?;
    }
    for interface in &config.network_interfaces {
        api.put(&format!("/network-interfaces/{}", interface.iface_id), interface).await?;
    }
    if let Some(vsock) = &config.vsock {
        api.put("/vsock", vsock).await?;
    }
    if let Some(entropy) = &config.entropy {
        api.put("/entropy", entropy).await?;
    }
    if let Some(balloon) = &config.balloon {
        api.put("/balloon", balloon).await?;
    }
    if let Some(mmds) = &config.mmds {
        api.put("/mmds/config", mmds).await?;
    }
    Ok(())
}
