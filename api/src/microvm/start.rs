//! The way from a [`Spec`] to a booting guest, and the way back from wherever on it one is.
//!
//! [`start`] adds to a [`Machine`] whatever it has made as soon as it is made, so that it can be dropped at
//! any await and [`Machine::bury`] still finds everything. This process may also be killed at any step: each
//! leaves the home so that [`super::MicroVm::adopt`] and [`super::sweep`] know what to do.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pulau_vmm::config::{ActionConfig, ActionType, VmConfig};
use tokio::time::{Instant, sleep, timeout};

use super::api::{Api, ApiError};
use super::console::open_log;
use super::ending::StartError;
use super::home::Home;
use super::jail::{Jail, JailError};
use super::machine::{DIES_WITHIN, Machine};
use super::request::SharedFacts;
use super::spec::{Host, Spec};
use crate::fault;

/// From the spawn to the first answer. Takes some milliseconds; on an overloaded host, seen: 15 seconds.
pub(super) const API_UP_WITHIN: Duration = Duration::from_secs(60);
/// One request. The slowest, the boot, reads the kernel and may touch all of the guest's memory.
const REQUEST_WITHIN: Duration = Duration::from_secs(60);

/// Starts a microVM. After an error or when dropped midway, `machine` holds what there is to bury.
pub(super) async fn start(
    host: &Host,
    spec: &Spec,
    machine: &mut Machine,
    facts: &SharedFacts,
) -> Result<(), StartError> {
    spec.check()?;
    let home = machine.move_in(Home::create(&host.run_dir, &spec.id, spec.jail.is_some())?);
    fault::point("vm.home");
    let mut jail = Jail::new(home);
    let mut config = jail.place(&spec.vm)?;
    if spec.console.attachable {
        config.serial.get_or_insert_default().socket_path = Some(jail.socket("console.sock"));
    }
    let names = jail.names();
    let mut command = command(host, spec, home, &jail)?;
    jail.enter(host, spec, &mut command)?;
    fault::point("vm.jail");
    let api_socket = home.socket("api.sock");
    machine.tell(config.vsock.is_some(), spec.console.attachable, facts);
    facts.lock().spawned_at = Some(std::time::Instant::now());
    machine.spawn(host, spec, command).await?;
    fault::point("vm.spawned");
    let time = |step: fn(&mut super::BootTimes) -> &mut Option<Duration>| {
        let mut facts = facts.lock();
        let elapsed = facts.spawned_at.map(|at| at.elapsed());
        *step(&mut facts.times) = elapsed;
    };

    let mut api = tokio::select! {
        biased;
        api = connect(&api_socket) => api?,
        exit = machine.exited() => return Err(StartError::Died(exit)),
    };
    time(|times| &mut times.api_ready);
    fault::point("vm.answers");
    let booted = async {
        configure(&mut api, &config, spec.metadata.as_ref()).await?;
        time(|times| &mut times.configured);
        fault::point("vm.configured");
        api.put("/actions", &ActionConfig { action_type: ActionType::InstanceStart }).await
    };
    match booted.await {
        Ok(()) => {
            time(|times| &mut times.started);
            fault::point("vm.booting");
            machine.has_started(api).map_err(|source| prepare(&api_socket, source))?;
        }
        // Most likely the VMM has died; how it did says more than that it no longer answers.
        Err(error @ ApiError::Broken { .. }) => match timeout(DIES_WITHIN, machine.exited()).await {
            Ok(exit) => return Err(StartError::Died(exit)),
            Err(_) => return Err(error.into()),
        },
        Err(ApiError::Refused { status, message }) => {
            return Err(ApiError::Refused { status, message: names.outside(&message) }.into());
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn prepare(path: &Path, source: io::Error) -> JailError {
    JailError::Prepare { path: path.to_owned(), source }
}

/// The VMM's command line, before the jail adds to it.
fn command(host: &Host, spec: &Spec, home: &Home, jail: &Jail<'_>) -> Result<Command, StartError> {
    let console = match &spec.console.log {
        Some(log) => {
            home.record_console(log).map_err(|source| prepare(home.dir(), source))?;
            log.open().map_err(|source| prepare(&log.path, source))?
        }
        None => open_log(&home.console_log()).map_err(|source| prepare(home.dir(), source))?,
    };
    let vmm_log = open_log(&home.vmm_log()).map_err(|source| prepare(home.dir(), source))?;
    let mut command = Command::new(&host.vmm);
    command
        .args(["--id", &spec.id])
        .arg("--api-sock")
        .arg(jail.socket("api.sock"))
        .arg("--pid-file")
        .arg(home.pid_file())
        .arg("--exit-file")
        .arg(home.exit_file())
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
async fn configure(
    api: &mut Api,
    config: &VmConfig,
    metadata: Option<&serde_json::Value>,
) -> Result<(), ApiError> {
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
    if let Some(metadata) = metadata {
        api.put("/mmds", metadata).await?;
    }
    Ok(())
}
