//! What a running machine can be asked for.

use std::sync::MutexGuard;

use super::Machine;
use crate::config::{
    BalloonHintingStart, BalloonHintingStatus, BalloonStats, DriveUpdate, NetworkInterfaceUpdate, PmemUpdate,
    SnapshotCreateConfig, VmConfig,
};
use crate::control::{self, MachineError};
use crate::event_loop::lock;
use crate::virtio::balloon::Balloon;

impl control::Machine for Machine {
    fn pause(&mut self) -> Result<(), MachineError> {
        for vcpu in &self.vcpus {
            vcpu.pause();
        }
        for vcpu in &self.vcpus {
            vcpu.wait_paused();
        }
        self.devices.pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        for vcpu in &self.vcpus {
            // So that the guest's watchdog does not take the pause for a hang. A guest without KVM's clock has
            // none that knows.
            let _ = vcpu.fd().kvmclock_ctrl();
        }
        self.devices.resume();
        self.run();
        Ok(())
    }

    fn save(&mut self, request: &SnapshotCreateConfig, config: &VmConfig) -> Result<(), MachineError> {
        Machine::save(self, request, config).map_err(MachineError::failed)
    }

    fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError> {
        if self.keyboard.ctrl_alt_del() {
            Ok(())
        } else {
            Err(MachineError::Failed("the guest has not read the last Ctrl+Alt+Del yet".into()))
        }
    }

    fn update_drive(&mut self, update: &DriveUpdate) -> Result<(), MachineError> {
        let id = || update.drive_id.clone();
        let drive = self.devices.drive(&update.drive_id);
        let drive = drive.ok_or_else(|| MachineError::NoSuchDevice { kind: "drive", id: id() })?;
        lock(drive).update(update).map_err(MachineError::failed)
    }

    fn update_network_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), MachineError> {
        let network = self.devices.network(&update.iface_id).ok_or_else(|| MachineError::NoSuchDevice {
            kind: "network interface",
            id: update.iface_id.clone(),
        })?;
        lock(network).update(update);
        Ok(())
    }

    fn update_pmem(&mut self, update: &PmemUpdate) -> Result<(), MachineError> {
        let id = || update.id.clone();
        let pmem = self.devices.pmem(&update.id);
        let pmem = pmem.ok_or_else(|| MachineError::NoSuchDevice { kind: "pmem device", id: id() })?;
        lock(pmem).update(update);
        Ok(())
    }

    fn set_balloon_target(&mut self, amount_mib: u32) -> Result<(), MachineError> {
        self.balloon()?.set_target(amount_mib);
        Ok(())
    }

    fn set_balloon_stats_interval(&mut self, seconds: u16) -> Result<(), MachineError> {
        self.balloon()?.set_stats_interval(seconds);
        Ok(())
    }

    fn balloon_stats(&mut self) -> Result<BalloonStats, MachineError> {
        Ok(self.balloon()?.stats())
    }

    fn start_balloon_hinting(&mut self, start: &BalloonHintingStart) -> Result<(), MachineError> {
        self.balloon()?.start_hinting(start.acknowledge_on_stop);
        Ok(())
    }

    fn balloon_hinting_status(&mut self) -> Result<BalloonHintingStatus, MachineError> {
        Ok(self.balloon()?.hinting_status())
    }

    fn stop_balloon_hinting(&mut self) -> Result<(), MachineError> {
        self.balloon()?.stop_hinting();
        Ok(())
    }
}

impl Machine {
    fn balloon(&self) -> Result<MutexGuard<'_, Balloon>, MachineError> {
        self.devices.balloon().map(|b| lock(b)).ok_or_else(|| {
            MachineError::NotConfigured("this microVM has no balloon; configure one before it starts".into())
        })
    }
}
