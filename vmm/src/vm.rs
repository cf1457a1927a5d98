//! The KVM side of a virtual machine: memory slots, the in-kernel interrupt controllers, and the binding
//! of event descriptors to interrupt lines and to addresses.

use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::layout;
use crate::memory::Memory;
use crate::virtio::mmio::WINDOW;
use crate::virtio::registers::Registers;

/// KVM's part of a virtual machine.
pub struct Vm {
    fd: VmFd,
    cpuid: CpuId,
    next_slot: u32,
    max_slots: usize,
    /// Memory that the guest can only read is possible.
    read_only: bool,
    /// Writes can be noted for later.
    coalesced: bool,
    /// Model-specific registers that are part of a vCPU's state.
    msrs: Vec<u32>,
}

/// A request that KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM lacks something.
    #[error("this host's KVM lacks {0}; run `pulau doctor`")]
    Missing(&'static str),
    /// A request failed.
    #[error("KVM: {what}: {source}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// More memory regions than KVM has slots for.
    #[error("KVM has no memory slot left")]
    Slots,
}

fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

impl Vm {
    /// Creates an empty virtual machine with interrupt controllers.
    pub fn new(host: &Kvm) -> Result<Self, VmError> {
        for (cap, name) in [
            (Cap::Irqchip, "in-kernel interrupt controllers (KVM_CAP_IRQCHIP)"),
            (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
            (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
            (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
            (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
            (Cap::TscDeadlineTimer, "the TSC deadline timer (KVM_CAP_TSC_DEADLINE_TIMER)"),
        ] {
            if !host.check_extension(cap) {
                return Err(VmError::Missing(name));
            }
        }
        let cpuid = host.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("get supported CPUID"))?;
        let max_slots = host.get_nr_memslots();
        let fd = create_vm(host)?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("set identity map address"))?;
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(kvm("set TSS address"))?;
        fd.create_irq_chip().map_err(kvm("create interrupt controllers"))?;
        let (read_only, coalesced) =
            (host.check_extension(Cap::ReadonlyMem), host.check_extension(Cap::CoalescedMmio));
        let msrs = host.get_msr_index_list().map_err(kvm("list model-specific registers"))?;
        let msrs = msrs.as_slice().to_vec();
        Ok(Self { fd, cpuid, next_slot: 0, max_slots, read_only, coalesced, msrs })
    }

    /// The underlying descriptor, for creating vCPUs.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// CPUID leaves KVM supports on this host.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The same, to change before vCPUs are created.
    pub fn cpuid_mut(&mut self) -> &mut CpuId {
        &mut self.cpuid
    }

    /// Model-specific registers that KVM keeps for a vCPU.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Makes `memory` the guest's physical memory.
    pub fn set_memory(&mut self, memory: &Arc<Memory>) -> Result<(), VmError> {
        for region in memory.iter() {
            // SAFETY: the mapping belongs to `memory`, which every part of the VM that can outlive this
            // call holds an Arc of; `Machine` drops its vCPUs and this descriptor before it.
            unsafe { self.add_slot(region.start_addr().0, region.len(), region.as_ptr() as u64, false) }?;
        }
        Ok(())
    }

    /// Puts `len` bytes at host address `host` into the guest's physical address space at `guest`.
    ///
    /// # Safety
    /// The host range must stay mapped for as long as the VM lives.
    pub unsafe fn add_slot(
        &mut self,
        guest: u64,
        len: u64,
        host: u64,
        read_only: bool,
    ) -> Result<(), VmError> {
        if self.next_slot as usize >= self.max_slots {
            return Err(VmError::Slots);
        }
        let region = kvm_userspace_memory_region {
            slot: self.next_slot,
            flags: if read_only { kvm_bindings::KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: guest,
            memory_size: len,
            userspace_addr: host,
        };
        // SAFETY: as promised by the caller.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(kvm("set memory region"))?;
        self.next_slot += 1;
        Ok(())
    }

    /// Lets the guest read `registers` at `address` without leaving guest mode, where KVM can.
    ///
    /// # Safety
    /// `registers` must live for as long as the VM.
    pub unsafe fn show_registers(&mut self, address: u64, registers: &Registers) -> Result<(), VmError> {
        if self.read_only {
            // SAFETY: as promised by the caller.
            unsafe { self.add_slot(address, WINDOW, registers.address(), true) }?;
        }
        Ok(())
    }

    /// Has KVM note 32-bit writes to `address`, without leaving the kernel; false where it cannot.
    pub fn note_writes(&self, address: u64) -> Result<bool, VmError> {
        if self.coalesced {
            let address = IoEventAddress::Mmio(address);
            self.fd.register_coalesced_mmio(address, 4).map_err(kvm("note acknowledgements"))?;
        }
        Ok(self.coalesced)
    }

    /// Raises interrupt line `irq` whenever `event` is signalled.
    pub fn bind_irq(&self, event: &EventFd, irq: u32) -> Result<(), VmError> {
        self.fd.register_irqfd(event, irq).map_err(kvm("bind interrupt"))
    }

    /// Signals `event` whenever the guest writes the 32-bit `value` to `address`, without leaving the kernel.
    pub fn bind_notification(&self, event: &EventFd, address: u64, value: u32) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(kvm("bind notification"))
    }
}

/// `KVM_CREATE_VM` is interrupted when a signal arrives; only then it is tried again.
fn create_vm(host: &Kvm) -> Result<VmFd, VmError> {
    loop {
        match host.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(kvm("create VM")),
        }
    }
}
