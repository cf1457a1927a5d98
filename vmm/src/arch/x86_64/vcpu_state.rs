//! What a vCPU is made of as far as KVM knows it, read from one and put into another.
//!
//! The order matters in both directions, since some registers decide what others mean or are changed by
//! writing them: multiprocessor state is read first, as that settles what was pending; special registers come
//! before the local APIC, whose base is among them; the deadline of the APIC's timer comes after the time
//! stamp counter that it is compared with.
//!
//! Nested virtualisation and performance counters are hidden from guests ([`super::cpu`]), so there is nothing of
//! them to keep.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_cpuid_entry2,
    kvm_debugregs, kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// Everything KVM knows about one vCPU.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct VcpuState {
    /// The processor as the guest sees it.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Frequency of the time stamp counter, in kHz.
    pub tsc_khz: u32,
    /// What the guest's time stamp counter is ahead of the host's; none where KVM does not tell.
    pub tsc_offset: Option<u64>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// A request that KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM's answer to one of its requests.
    #[error("{what}: {source}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// A model-specific register that cannot have this value here.
    #[error("set model-specific register {index:#x} to {value:#x}: this host's KVM does not take it")]
    Msr {
        /// Which.
        index: u32,
        /// What it was.
        value: u64,
    },
    /// More entries than KVM takes.
    #[error("{0}: too many entries")]
    TooMany(&'static str),
}

pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Kvm { what, source }
}

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Registers per request.
const CHUNK: usize = 256;

impl VcpuState {
    /// Reads the state of a vCPU that is not running. `msrs` are the model-specific registers that KVM keeps
    /// (`KVM_GET_MSR_INDEX_LIST`); those that this vCPU does not have are left out.
    pub fn read(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, StateError> {
        let mp_state = fd.get_mp_state().map_err(kvm("get multiprocessor state"))?;
        let regs = fd.get_regs().map_err(kvm("get registers"))?;
        let sregs = fd.get_sregs().map_err(kvm("get special registers"))?;
        let xsave = fd.get_xsave().map_err(kvm("get extended state"))?;
        let xcrs = fd.get_xcrs().map_err(kvm("get extended control registers"))?;
        let debug = fd.get_debug_regs().map_err(kvm("get debug registers"))?;
        let lapic = fd.get_lapic().map_err(kvm("get local APIC"))?;
        let tsc_khz = fd.get_tsc_khz().map_err(kvm("get frequency of the time stamp counter"))?;
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm("get CPUID"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz,
            tsc_offset: tsc_offset(fd),
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            lapic,
            msrs: read_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().map_err(kvm("get pending events"))?,
        })
    }

    /// Puts the state into a vCPU that has never run. `tsc_offset` is what its time stamp counter is to be
    /// ahead of this host's, where the state has an offset.
    pub fn write(&self, fd: &VcpuFd, tsc_offset: u64) -> Result<(), StateError> {
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany("CPUID"))?;
        fd.set_cpuid2(&cpuid).map_err(kvm("set CPUID"))?;
        if fd.get_tsc_khz().ok() != Some(self.tsc_khz) {
            fd.set_tsc_khz(self.tsc_khz).map_err(kvm("set frequency of the time stamp counter"))?;
        }
        fd.set_mp_state(self.mp_state).map_err(kvm("set multiprocessor state"))?;
        fd.set_regs(&self.regs).map_err(kvm("set registers"))?;
        fd.set_sregs(&self.sregs).map_err(kvm("set special registers"))?;
        // SAFETY: no feature with more state than the structure has is ever asked for (`arch_prctl`).
        unsafe { fd.set_xsave(&self.xsave) }.map_err(kvm("set extended state"))?;
        fd.set_xcrs(&self.xcrs).map_err(kvm("set extended control registers"))?;
        fd.set_debug_regs(&self.debug).map_err(kvm("set debug registers"))?;
        fd.set_lapic(&self.lapic).map_err(kvm("set local APIC"))?;
        let by_offset = self.tsc_offset.is_some() && set_tsc_offset(fd, tsc_offset);
        let (late, early): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .filter(|msr| msr.index != MSR_TSC || !by_offset)
            .partition(|msr| msr.index == MSR_TSC_DEADLINE);
        write_msrs(fd, &early)?;
        write_msrs(fd, &late)?;
        fd.set_vcpu_events(&self.events).map_err(kvm("set pending events"))
    }
}

/// The values of those of `indices` that the vCPU has.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut all = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let chunk = &left[..left.len().min(CHUNK)];
        let entries: Vec<_> =
            chunk.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs =
            Msrs::from_entries(&entries).map_err(|_| StateError::TooMany("model-specific registers"))?;
        // It ends at the first that it does not have.
        let read = fd.get_msrs(&mut msrs).map_err(kvm("get model-specific registers"))?;
        all.extend_from_slice(&msrs.as_slice()[..read.min(chunk.len())]);
        let done = if read < chunk.len() { read + 1 } else { read };
        left = &left[done..];
    }
    Ok(all)
}

/// Sets `msrs`. One that cannot be set is passed over if it is zero, as it is after reset.
fn write_msrs(fd: &VcpuFd, msrs: &[&kvm_msr_entry]) -> Result<(), StateError> {
    let mut left = msrs;
    while !left.is_empty() {
        let chunk: Vec<_> = left.iter().take(CHUNK).map(|msr| **msr).collect();
        let entries =
            Msrs::from_entries(&chunk).map_err(|_| StateError::TooMany("model-specific registers"))?;
        let written = fd.set_msrs(&entries).map_err(kvm("set model-specific registers"))?;
        if let Some(refused) = chunk.get(written) {
            if refused.data != 0 {
                return Err(StateError::Msr { index: refused.index, value: refused.data });
            }
            left = &left[written + 1..];
        } else {
            left = &left[chunk.len()..];
        }
    }
    Ok(())
}

// Of linux/kvm.h; kvm-ioctls has them for vCPUs of other architectures only.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

fn tsc_offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_attribute(&raw mut offset as u64);
    // SAFETY: the request reads the attribute and writes eight bytes at its address, which `offset` has.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attribute) };
    (answer == 0).then_some(offset)
}

/// Sets the offset exactly. Writing the counter itself would not do: a KVM before Linux 6.7 takes a value that
/// is near to what the counter would have for an attempt to synchronise vCPUs, and drops it.
fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> bool {
    let attribute = tsc_attribute(&raw const offset as u64);
    // SAFETY: the request reads the attribute and eight bytes at its address, which `offset` has.
    unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) == 0 }
}

fn tsc_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr }
}
