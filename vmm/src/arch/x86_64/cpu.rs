//! What processor the guest sees: the host's features as KVM offers them, minus what must be hidden,
//! with this VM's own topology; and the few model-specific registers a boot needs.
//!
//! Hidden: performance counters (a side channel into the host), nested virtualisation (its state is not
//! in our snapshots), power management hints that a guest cannot act on.

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_msr_entry};

/// Topology and identity of one vCPU.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// This vCPU's number, also its APIC id.
    pub index: u8,
    /// vCPUs of the VM, 1 to 32. One socket.
    pub count: u8,
    /// Whether two vCPUs are the threads of a core (if there is more than one), or each is a core.
    pub smt: bool,
}

impl Topology {
    /// Bits of an APIC id that number the cores of the socket.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }

    /// Threads of a core. One bit of an APIC id numbers them if they are two, none if there is one.
    fn threads(self) -> u32 {
        1 + u32::from(self.smt && self.count > 1)
    }
}

/// Adapts KVM's supported CPUID leaves to one vCPU of this VM.
pub fn adapt_cpuid(cpuid: &mut CpuId, topology: Topology) {
    let apic_id = u32::from(topology.index);
    let count = u32::from(topology.count);
    let threads = topology.threads();
    for e in cpuid.as_mut_slice() {
        match (e.function, e.index) {
            (0x1, _) => {
                e.ebx = e.ebx & 0xffff | count << 16 | apic_id << 24;
                clear(&mut e.ecx, 3); // MONITOR/MWAIT: a guest that waits so never leaves the host CPU
                clear(&mut e.ecx, 5); // VMX
                clear(&mut e.ecx, 15); // PDCM: performance capabilities MSR
                set(&mut e.ecx, 24, true); // TSC deadline: KVM's local APIC always has it
                set(&mut e.ecx, 31, true); // hypervisor present
                set(&mut e.edx, 28, topology.count > 1); // HTT: more than one logical processor
            }
            // Caches (Intel leaf 4, AMD leaf 0x8000_001d): levels 1 and 2 a core's, level 3 shared by all.
            (0x4 | 0x8000_001d, _) if e.eax & 0x1f != 0 => {
                let level = e.eax >> 5 & 7;
                let sharers = if level >= 3 { count } else { threads };
                e.eax = e.eax & !(0xfff << 14) | (sharers - 1) << 14;
                if e.function == 0x4 {
                    e.eax = e.eax & 0x03ff_ffff | (count / threads - 1).min(63) << 26;
                }
            }
            // Thermal and power: no turbo, no energy bias, no hardware feedback.
            (0x6, _) => (e.eax, e.ebx, e.ecx, e.edx) = (e.eax & 1 << 2, 0, 0, 0),
            (0xa, _) => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            (0xb | 0x1f, index) => {
                let (shift, kind, number) = match index {
                    0 => (threads - 1, 1, threads),
                    1 => (topology.core_bits(), 2, count),
                    _ => (0, 0, 0),
                };
                (e.eax, e.ebx, e.ecx, e.edx) = (shift, number, index | kind << 8, apic_id);
            }
            (0x8000_0001, _) => {
                clear(&mut e.ecx, 2); // SVM
                clear(&mut e.ecx, 10); // IBS
                clear(&mut e.ecx, 23); // core performance counters
                clear(&mut e.ecx, 24); // northbridge performance counters
            }
            (0x8000_0008, _) => e.ecx = (count - 1) | topology.core_bits() << 12,
            (0x8000_000a, _) => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            (0x8000_001e, _) => {
                let core = apic_id / threads;
                (e.eax, e.ebx, e.ecx) = (apic_id, core | (threads - 1) << 8, 0);
            }
            (0x8000_0022, _) => (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    add_topology_leaf(cpuid, topology);
}

/// The extended topology leaf is what current kernels read first; not every host offers it.
fn add_topology_leaf(cpuid: &mut CpuId, topology: Topology) {
    const SIGNIFICANT_INDEX: u32 = 1;
    if cpuid.as_slice().iter().any(|e| e.function == 0xb) {
        return;
    }
    let threads = topology.threads();
    for (index, eax, ebx, kind) in
        [(0, threads - 1, threads, 1), (1, topology.core_bits(), u32::from(topology.count), 2)]
    {
        // Full only if a host offers as many leaves as KVM allows; the guest then reads the older leaves.
        let _ = cpuid.push(kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: SIGNIFICANT_INDEX,
            eax,
            ebx,
            ecx: index | kind << 8,
            edx: topology.index.into(),
            ..Default::default()
        });
    }
}

/// The first guest physical address that is too high for the guest's processor: CPUID leaf 0x8000_0008, or 36
/// bits where that is missing.
pub fn physical_address_limit(cpuid: &CpuId) -> u64 {
    let leaf = cpuid.as_slice().iter().find(|e| e.function == 0x8000_0008);
    1 << leaf.map_or(36, |e| (e.eax & 0xff).clamp(36, 52))
}

fn set(register: &mut u32, bit: u32, value: bool) {
    *register = *register & !(1 << bit) | u32::from(value) << bit;
}

fn clear(register: &mut u32, bit: u32) {
    set(register, bit, false);
}

/// Model-specific registers that differ from their value after reset when a kernel starts: memory type
/// write-back by default (there is no firmware to set it), fast string operations on.
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    const MISC_ENABLE: u32 = 0x1a0;
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [msr(MISC_ENABLE, 1), msr(MTRR_DEFAULT_TYPE, 1 << 11 | 6)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let all = u32::MAX;
        kvm_cpuid_entry2 { function, index, eax: all, ebx: all, ecx: all, edx: all, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_sees_its_own_number_and_the_vms_topology() {
        let mut cpuid =
            CpuId::from_entries(&[leaf(1, 0), leaf(0x8000_0008, 0), leaf(0x8000_001e, 0)]).unwrap();
        adapt_cpuid(&mut cpuid, Topology { index: 3, count: 6, smt: false });
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16, 3 << 8 | 6);
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 5 | 3 << 12);
        assert_eq!(find(&cpuid, 0x8000_001e, 0).eax, 3);
        assert_eq!(find(&cpuid, 0xb, 1).ebx, 6);
        assert_eq!(find(&cpuid, 0xb, 1).eax, 3);
        assert_eq!(find(&cpuid, 0xb, 0).edx, 3);
    }

    #[test]
    fn addresses_end_where_the_processor_says() {
        let mut cpuid = CpuId::from_entries(&[leaf(0x8000_0008, 0)]).unwrap();
        assert_eq!(physical_address_limit(&cpuid), 1 << 52, "no processor has more");
        cpuid.as_mut_slice()[0].eax = 0x3028;
        assert_eq!(physical_address_limit(&cpuid), 1 << 40);
        assert_eq!(physical_address_limit(&CpuId::from_entries(&[leaf(1, 0)]).unwrap()), 1 << 36);
    }

    #[test]
    fn two_vcpus_are_threads_of_a_core_where_asked_for() {
        let mut cpuid = CpuId::from_entries(&[leaf(4, 1), leaf(4, 3), leaf(0x8000_001e, 0)]).unwrap();
        for (index, level) in [1, 3].into_iter().enumerate() {
            cpuid.as_mut_slice()[index].eax = level << 5 | 1;
        }
        adapt_cpuid(&mut cpuid, Topology { index: 5, count: 6, smt: true });
        assert_eq!(find(&cpuid, 0x8000_001e, 0).ebx, 1 << 8 | 2, "thread of core 2");
        assert_eq!((find(&cpuid, 0xb, 0).eax, find(&cpuid, 0xb, 0).ebx), (1, 2));
        assert_eq!((find(&cpuid, 0xb, 1).eax, find(&cpuid, 0xb, 1).ebx), (3, 6));
        assert_eq!(find(&cpuid, 4, 1).eax >> 14, 2 << 12 | 1, "of three cores, shared by two threads");
        assert_eq!(find(&cpuid, 4, 3).eax >> 14, 2 << 12 | 5, "shared by all");
    }

    #[test]
    fn nested_virtualisation_and_performance_counters_are_hidden() {
        let mut cpuid =
            CpuId::from_entries(&[leaf(1, 0), leaf(0xa, 0), leaf(0x8000_0001, 0), leaf(0x8000_000a, 0)])
                .unwrap();
        adapt_cpuid(&mut cpuid, Topology { index: 0, count: 1, smt: true });
        let basic = find(&cpuid, 1, 0);
        assert_eq!(basic.ecx & (1 << 5 | 1 << 3 | 1 << 15), 0);
        assert_ne!(basic.ecx & 1 << 31, 0);
        assert_eq!(basic.edx & 1 << 28, 0, "one vCPU is no multi-processor");
        assert_eq!(find(&cpuid, 0x8000_0001, 0).ecx & (1 << 2 | 1 << 10 | 1 << 23), 0);
        for leaf in [find(&cpuid, 0xa, 0), find(&cpuid, 0x8000_000a, 0)] {
            assert_eq!((leaf.eax, leaf.ebx, leaf.ecx, leaf.edx), (0, 0, 0, 0));
        }
    }
}
