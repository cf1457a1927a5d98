//! Whether a processor seen by a guest somewhere else can be shown to it here.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Incompatible {
    /// Made by somebody else.
    #[error("it was made on a processor of {then:?}, and this one is of {now:?}")]
    Vendor {
        /// Maker of the processor it was made on.
        then: String,
        /// Maker of this one.
        now: String,
    },
    /// Something is missing here.
    #[error(
        "it needs processor features that this host does not have: CPUID leaf {leaf:#x}.{index}, {register} {missing:#010x}"
    )]
    Missing {
        /// CPUID leaf.
        leaf: u32,
        /// Its index.
        index: u32,
        /// Register.
        register: &'static str,
        /// Bits that are missing.
        missing: u32,
    },
}

/// Leaves whose registers are sets of features: leaf, index, and which bits of eax, ebx, ecx and edx are. Bits that
/// a running system sets itself (OSXSAVE, OSPKE) are none.
const FEATURES: &[(u32, u32, [u32; 4])] = &[
    (0x1, 0, [0, 0, !(1 << 27), !0]),
    (0x7, 0, [0, !0, !(1 << 4), !0]),
    (0x7, 1, [!0, !0, !0, !0]),
    (0x7, 2, [0, 0, 0, !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
];

/// Checks that everything `wanted` has is in `here`, the same vCPU as this host would make it.
pub fn check(wanted: &[kvm_cpuid_entry2], here: &CpuId) -> Result<(), Incompatible> {
    let here = here.as_slice();
    let (then, now) = (vendor(wanted), vendor(here));
    if then != now {
        return Err(Incompatible::Vendor { then, now });
    }
    for (leaf, index, masks) in FEATURES {
        let of = |all: &[kvm_cpuid_entry2]| {
            let entry = all.iter().find(|e| e.function == *leaf && e.index == *index);
            entry.map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        };
        let (wanted, here) = (of(wanted), of(here));
        for (at, register) in ["eax", "ebx", "ecx", "edx"].into_iter().enumerate() {
            let missing = wanted[at] & !here[at] & masks[at];
            if missing != 0 {
                return Err(Incompatible::Missing { leaf: *leaf, index: *index, register, missing });
            }
        }
    }
    Ok(())
}

fn vendor(cpuid: &[kvm_cpuid_entry2]) -> String {
    let Some(e) = cpuid.iter().find(|e| e.function == 0) else { return String::new() };
    let bytes: Vec<u8> = [e.ebx, e.edx, e.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ecx, ..Default::default() }
    }

    #[test]
    fn everything_needed_must_be_there() {
        let here = CpuId::from_entries(&[leaf(0, 0, 7), leaf(1, 0, 0b0111), leaf(7, 0, 1)]).unwrap();
        let check = |wanted: &[kvm_cpuid_entry2]| check(wanted, &here);
        assert_eq!(check(&[leaf(0, 0, 7), leaf(1, 0, 0b0101)]), Ok(()));
        assert_eq!(check(&[leaf(0, 0, 7), leaf(1, 0, 1 << 27 | 1)]), Ok(()), "OSXSAVE");
        let missing = check(&[leaf(0, 0, 7), leaf(1, 0, 0b1101)]).unwrap_err();
        assert_eq!(missing, Incompatible::Missing { leaf: 1, index: 0, register: "ecx", missing: 8 });
        let missing = check(&[leaf(0, 0, 7), leaf(0x8000_0001, 0, 4)]).unwrap_err();
        assert_eq!(
            missing,
            Incompatible::Missing { leaf: 0x8000_0001, index: 0, register: "ecx", missing: 4 }
        );
        assert!(matches!(check(&[leaf(0, 0, 8)]), Err(Incompatible::Vendor { .. })));
    }
}
