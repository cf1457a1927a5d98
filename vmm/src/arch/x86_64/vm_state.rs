//! What KVM knows about a machine besides its vCPUs: interrupt controllers and the clock; and how time goes on
//! where a machine is taken up again.
//!
//! Guests have two clocks: the time stamp counter, which is the host's with an offset, and KVM's own clock. Both
//! go on from where they stood, or, if asked for, from there and the time that has passed since
//! ([`Clock::advance`]); always by the same time, so that they agree (Linux, Documentation/virt/kvm/devices/vcpu.rst,
//! `KVM_VCPU_TSC_OFFSET`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data,
    kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::vcpu_state::{StateError, kvm};

/// Everything KVM knows about a machine besides its vCPUs.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct VmState {
    /// When it was.
    pub clock: Clock,
    /// Both PICs and the IOAPIC.
    chips: Vec<kvm_irqchip>,
}

/// One moment by three clocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clock {
    /// KVM's clock of the machine, in ns.
    guest: u64,
    /// The host's time stamp counter.
    tsc: u64,
    /// The host's wall clock, in ns since 1970.
    wall: u64,
}

impl Clock {
    fn now(vm: &VmFd) -> Result<Self, StateError> {
        let clock = vm.get_clock().map_err(kvm("get clock"))?;
        // Of the same instant, if KVM can; else of the next.
        let tsc = if clock.flags & KVM_CLOCK_HOST_TSC != 0 { clock.host_tsc } else { host_tsc() };
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Ok(Self { guest: clock.clock, tsc, wall: u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX) })
    }

    /// What a time stamp counter has to be ahead of the host's now, that was ahead by `offset` then, with a
    /// frequency of `khz`, so that it goes as KVM's clock does.
    fn offset(&self, then: &Clock, offset: u64, khz: u32) -> u64 {
        let passed = i128::from(self.guest) - i128::from(then.guest);
        let ticks = passed * i128::from(khz) / 1_000_000;
        // Modulo 2^64, as the counters themselves.
        offset.wrapping_add(then.tsc).wrapping_sub(self.tsc).wrapping_add(ticks as u64)
    }
}

/// A clock that goes on from a moment in the past.
pub struct Resumed {
    then: Clock,
    now: Clock,
}

impl Resumed {
    /// See [`Clock::offset`].
    pub fn tsc_offset(&self, offset: u64, khz: u32) -> u64 {
        self.now.offset(&self.then, offset, khz)
    }
}

/// Bit of an IOAPIC's redirection entry (Intel 82093AA, 3.2.4).
const IOAPIC_MASKED: u64 = 1 << 16;

fn host_tsc() -> u64 {
    // SAFETY: every 64-bit processor has the instruction.
    unsafe { core::arch::x86_64::_rdtsc() }
}

impl VmState {
    /// Reads the state of a machine whose vCPUs are not running.
    pub fn read(vm: &VmFd) -> Result<Self, StateError> {
        let mut chips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(kvm("get interrupt controller"))?;
            chips.push(chip);
        }
        Ok(Self { clock: Clock::now(vm)?, chips })
    }

    /// Puts the interrupt controllers' state into a machine whose vCPUs are there.
    pub fn write(&self, vm: &VmFd) -> Result<(), StateError> {
        self.chips.iter().try_for_each(|chip| vm.set_irqchip(chip).map_err(kvm("set interrupt controller")))
    }

    /// Whether the guest takes interrupts of this line of the IOAPIC. Before it has set that up, an interrupt would
    /// come by the PICs, as an exception of the same number.
    pub fn takes_interrupt(&self, line: u32) -> bool {
        self.chips.iter().filter(|chip| chip.chip_id == KVM_IRQCHIP_IOAPIC).any(|chip| {
            // SAFETY: of a chip with this number it is the member that KVM has filled; any bits are a value of it.
            let entries = unsafe { chip.chip.ioapic.redirtbl };
            // SAFETY: both members of the union are the same bits.
            entries.get(line as usize).is_some_and(|entry| unsafe { entry.bits } & IOAPIC_MASKED == 0)
        })
    }

    /// Sets KVM's clock of a machine. If `advance`, the time that has passed by the wall clock is added.
    pub fn resume_clock(&self, vm: &VmFd, advance: bool) -> Result<Resumed, StateError> {
        let then = self.clock;
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let passed = if advance { wall.as_nanos().saturating_sub(then.wall.into()) } else { 0 };
        let clock = then.guest.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX));
        vm.set_clock(&kvm_clock_data { clock, ..Default::default() }).map_err(kvm("set clock"))?;
        Ok(Resumed { then, now: Clock::now(vm)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_goes_on_by_what_the_clock_went_on() {
        let then = Clock { guest: 5_000_000_000, tsc: 100_000, wall: 0 };
        let khz = 2_000_000;
        // The guest's counter was at 100_000 - 40_000.
        let offset = 40_000u64.wrapping_neg();
        let at = |now: Clock| now.tsc.wrapping_add(now.offset(&then, offset, khz));
        assert_eq!(at(Clock { guest: 5_000_000_000, tsc: 7_000, wall: 0 }), 60_000, "another host, no time");
        assert_eq!(at(Clock { guest: 5_000_001_000, tsc: 9_000_000, wall: 0 }), 62_000, "a microsecond");
        let hour = 3_600_000_000_000;
        assert_eq!(at(Clock { guest: 5_000_000_000 + hour, tsc: 1, wall: 0 }), 60_000 + 2 * hour);
        let year = 365 * 24 * hour;
        assert_eq!(at(Clock { guest: 5_000_000_000 + year, tsc: 1, wall: 0 }), 60_000 + 2 * year);
    }
}
