//! Actions on a machine that was started.

use std::time::Instant;

use super::{ControlError, Machine, MachineError, Outcome, files};
use crate::api::{Action, Answer};
use crate::config::{
    BalloonConfig, BalloonStatsUpdate, BalloonUpdate, DriveUpdate, NetworkInterfaceUpdate, PmemUpdate,
    RateLimiterConfig, VmConfig,
};
use crate::metrics::{self, METRICS};

/// Does an action that needs, or must not have, a started machine.
pub(super) fn handle(
    machine: &mut dyn Machine,
    paused: &mut bool,
    config: &mut VmConfig,
    action: Action,
) -> Outcome {
    match action {
        Action::Pause if *paused => {}
        Action::Pause => {
            let begun = Instant::now();
            machine.pause()?;
            *paused = true;
            METRICS.latencies_us.pause_vm.set(micros(begun));
        }
        Action::Resume if !*paused => {}
        Action::Resume => {
            let begun = Instant::now();
            machine.resume()?;
            *paused = false;
            METRICS.latencies_us.resume_vm.set(micros(begun));
        }
        Action::SendCtrlAltDel => machine.send_ctrl_alt_del()?,
        Action::FlushMetrics => metrics::flush()?,
        Action::UpdateDrive(update) => update_drive(machine, config, update)?,
        Action::UpdatePmem(update) => update_pmem(machine, config, &update)?,
        Action::UpdateNetworkInterface(update) => update_interface(machine, config, &update)?,
        Action::UpdateBalloon(BalloonUpdate { amount_mib }) => {
            balloon(config)?;
            config.check_balloon_amount(amount_mib)?;
            machine.set_balloon_target(amount_mib)?;
            balloon(config)?.amount_mib = amount_mib;
        }
        Action::UpdateBalloonStats(update) => update_balloon_stats(machine, config, &update)?,
        Action::GetBalloonStats => {
            if balloon(config)?.stats_polling_interval_s == 0 {
                return Err(ControlError::NoBalloonStats);
            }
            return Ok(Answer::BalloonStats(Box::new(machine.balloon_stats()?)));
        }
        Action::StartBalloonHinting(start) => {
            check_hinting(config)?;
            machine.start_balloon_hinting(&start)?;
        }
        Action::GetBalloonHinting => {
            check_hinting(config)?;
            return Ok(Answer::BalloonHinting(machine.balloon_hinting_status()?));
        }
        Action::StopBalloonHinting => {
            check_hinting(config)?;
            machine.stop_balloon_hinting()?;
        }
        Action::CreateSnapshot(_) if !*paused => return Err(ControlError::NotPaused),
        Action::CreateSnapshot(request) => {
            let begun = Instant::now();
            machine.save(&request, config)?;
            METRICS.latencies_us.full_create_snapshot.set(micros(begun));
        }
        _ => return Err(ControlError::NotAfterStart),
    }
    Ok(Answer::Done)
}

pub(super) fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn no_such(kind: &'static str, id: &str) -> ControlError {
    MachineError::NoSuchDevice { kind, id: id.to_owned() }.into()
}

fn update_drive(
    machine: &mut dyn Machine,
    config: &mut VmConfig,
    update: DriveUpdate,
) -> Result<(), ControlError> {
    let id = &update.drive_id;
    let drive = config.drives.iter_mut().find(|d| d.drive_id == *id);
    let drive = drive.ok_or_else(|| no_such("drive", id))?;
    if update.path_on_host.is_none() && update.rate_limiter.is_none() {
        return Err(ControlError::EmptyDriveUpdate { id: id.clone() });
    }
    if let Some(path) = &update.path_on_host {
        files::check_drive_path(path)?;
    }
    machine.update_drive(&update)?;
    drive.path_on_host = update.path_on_host.or(drive.path_on_host.take());
    drive.rate_limiter = RateLimiterConfig::merge(&drive.rate_limiter, &update.rate_limiter);
    Ok(())
}

fn update_pmem(
    machine: &mut dyn Machine,
    config: &mut VmConfig,
    update: &PmemUpdate,
) -> Result<(), ControlError> {
    let pmem = config.pmem.iter_mut().find(|p| p.id == update.id);
    let pmem = pmem.ok_or_else(|| no_such("pmem device", &update.id))?;
    machine.update_pmem(update)?;
    pmem.rate_limiter = RateLimiterConfig::merge(&pmem.rate_limiter, &update.rate_limiter);
    Ok(())
}

fn update_interface(
    machine: &mut dyn Machine,
    config: &mut VmConfig,
    update: &NetworkInterfaceUpdate,
) -> Result<(), ControlError> {
    let interface = config.network_interfaces.iter_mut().find(|i| i.iface_id == update.iface_id);
    let interface = interface.ok_or_else(|| no_such("network interface", &update.iface_id))?;
    machine.update_network_interface(update)?;
    let merge = RateLimiterConfig::merge;
    interface.rx_rate_limiter = merge(&interface.rx_rate_limiter, &update.rx_rate_limiter);
    interface.tx_rate_limiter = merge(&interface.tx_rate_limiter, &update.tx_rate_limiter);
    Ok(())
}

fn balloon(config: &mut VmConfig) -> Result<&mut BalloonConfig, ControlError> {
    config.balloon.as_mut().ok_or(ControlError::NoBalloon)
}

fn update_balloon_stats(
    machine: &mut dyn Machine,
    config: &mut VmConfig,
    update: &BalloonStatsUpdate,
) -> Result<(), ControlError> {
    let balloon = balloon(config)?;
    let seconds = update.stats_polling_interval_s;
    match (balloon.stats_polling_interval_s, seconds) {
        (old, new) if old == new => return Ok(()),
        (0, _) => return Err(ControlError::NoBalloonStats),
        (_, 0) => return Err(ControlError::BalloonStatsOff),
        _ => {}
    }
    machine.set_balloon_stats_interval(seconds)?;
    balloon.stats_polling_interval_s = seconds;
    Ok(())
}

fn check_hinting(config: &mut VmConfig) -> Result<(), ControlError> {
    if !balloon(config)?.free_page_hinting {
        return Err(ControlError::NoBalloonHinting);
    }
    Ok(())
}
