//! A machine out of a snapshot.
//!
//! Goes in the order in which things can fail for reasons a user can mend, as building one does. vCPUs are there
//! before the interrupt controllers get their state, and those before anything interrupts.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Board, BuildError, IRQ_VMGENID, Machine, Resources, event, host, random};
use crate::arch::cpu::{self, Topology};
use crate::arch::cpu_compat::{self, Incompatible};
use crate::arch::layout;
use crate::arch::vcpu_state::StateError;
use crate::config::VmConfig;
use crate::event_loop::lock;
use crate::memory::Memory;
use crate::snapshot::State;
use crate::vcpu;
use crate::virtio::state::RestoreError as DeviceError;
use crate::vm::Vm;

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// What building one fails for as well.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// This host's processor cannot be shown to the guest as that which it knows.
    #[error("this host cannot run it: {0}")]
    Cpu(#[from] Incompatible),
    /// KVM does not take the state of a vCPU.
    #[error("vCPU {index}: {source}")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why not.
        source: StateError,
    },
    /// KVM does not take the state of the machine.
    #[error("KVM: {0}")]
    Vm(#[from] StateError),
    /// Other devices than those of the state.
    #[error("it has {found} virtio devices, and its configuration {wanted}")]
    Devices {
        /// In the state.
        found: usize,
        /// In the configuration.
        wanted: usize,
    },
    /// A device cannot be put into its state.
    #[error("virtio device {index}: {source}")]
    Device {
        /// Which, by its window.
        index: usize,
        /// Why not.
        source: DeviceError,
    },
}

impl From<crate::vm::VmError> for RestoreError {
    fn from(error: crate::vm::VmError) -> Self {
        BuildError::from(error).into()
    }
}

impl Machine {
    /// Makes the machine that `state` is of over `memory`, with what `config` names, which may be other files
    /// than the state's own configuration. With `advance` the guest's clocks go on by the time that has passed
    /// since. It is paused.
    pub fn restore(
        state: &State,
        config: &VmConfig,
        memory: Arc<Memory>,
        advance: bool,
        resources: Resources,
    ) -> Result<Self, RestoreError> {
        let prepare_vcpu = resources.prepare_vcpu;
        let vm = Vm::new(resources.kvm)?;
        check_cpu(state, config, &vm)?;
        let board = Board::new(config, vm, memory, resources, None, Some(&state.serial))?;
        restore_devices(state, &board)?;
        let fds = (0..state.vcpus.len()).map(|index| vcpu::create_empty(board.vm.fd(), index as u8));
        let fds = fds.collect::<Result<Vec<_>, _>>().map_err(BuildError::from)?;
        let clock = state.vm.resume_clock(board.vm.fd(), advance)?;
        for (index, (fd, saved)) in fds.iter().zip(&state.vcpus).enumerate() {
            let offset = clock.tsc_offset(saved.tsc_offset.unwrap_or(0), saved.tsc_khz);
            saved.write(fd, offset).map_err(|source| RestoreError::Vcpu { index, source })?;
        }
        state.vm.write(board.vm.fd())?;
        let vcpus = board.start(fds, prepare_vcpu)?;
        let generation = if state.acpi { announce_generation(state, &board)? } else { None };
        board.transports.iter().for_each(|transport| transport.interrupt_again());
        if let Some(vsock) = board.devices.vsock() {
            lock(vsock).reset_connections();
        }
        Ok(board.with(vcpus, generation, state.acpi))
    }
}

/// Checks that the guest's processor has nothing that this host does not.
fn check_cpu(state: &State, config: &VmConfig, vm: &Vm) -> Result<(), RestoreError> {
    let Some(wanted) = state.vcpus.first() else { return Ok(()) };
    let mut here = vm.cpuid().clone();
    let topology = Topology { index: 0, count: config.machine.vcpu_count, smt: config.machine.smt };
    cpu::adapt_cpuid(&mut here, topology);
    Ok(cpu_compat::check(&wanted.cpuid, &here)?)
}

fn restore_devices(state: &State, board: &Board) -> Result<(), RestoreError> {
    let (found, wanted) = (state.transports.len(), board.transports.len());
    if found != wanted {
        return Err(RestoreError::Devices { found, wanted });
    }
    board.keyboard.restore(&state.keyboard);
    if let (Some(balloon), Some(saved)) = (board.devices.balloon(), &state.balloon) {
        lock(balloon).restore(saved);
    }
    for (index, (transport, saved)) in board.transports.iter().zip(&state.transports).enumerate() {
        transport.restore(saved).map_err(|source| RestoreError::Device { index, source })?;
    }
    Ok(())
}

/// Tells the guest that it is another machine from now on (Microsoft's Virtual Machine Generation ID): returns
/// what has raised the interrupt, if there is a driver already that takes it.
fn announce_generation(state: &State, board: &Board) -> Result<Option<EventFd>, RestoreError> {
    let mut id = [0; 16];
    random(&mut id).map_err(host("random numbers"))?;
    board.memory.write_slice(&id, GuestAddress(layout::VMGENID)).map_err(BuildError::from)?;
    if !state.vm.takes_interrupt(IRQ_VMGENID) {
        return Ok(None);
    }
    let interrupt = event().map_err(host("eventfd"))?;
    board.vm.bind_irq(&interrupt, IRQ_VMGENID)?;
    interrupt.write(1).map_err(host("eventfd"))?;
    Ok(Some(interrupt))
}
