//! What a client changes about the processor (`/cpu-config`): bits of CPUID registers and of model-specific
//! registers, on top of what KVM offers. What [`super::cpu`] hides stays hidden.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::config::{CpuConfig, CpuidRegister, KvmCapability};

/// A change that cannot be made on this host.
#[derive(Debug, thiserror::Error)]
pub enum CpuConfigError {
    /// The host's KVM lacks what the client asked for.
    #[error("cpu-config: kvm_capabilities: this host's KVM does not have capability {0}")]
    Capability(u32),
    /// KVM offers no such leaf.
    #[error("cpu-config: cpuid_modifiers: this host has no CPUID leaf {leaf:#x} with subleaf {subleaf:#x}")]
    Leaf {
        /// As in the client's request.
        leaf: u32,
        /// As in the client's request.
        subleaf: u32,
    },
    /// KVM has no such register, or does not take the value.
    #[error("cpu-config: msr_modifiers: KVM cannot {what} register {address:#x}")]
    Msr {
        /// What was tried.
        what: &'static str,
        /// As in the client's request.
        address: u32,
    },
}

/// Checks that KVM can do what the client requires of it. Capabilities the client gives up are not required
/// here anyway.
pub fn check_capabilities(kvm: &Kvm, config: &CpuConfig) -> Result<(), CpuConfigError> {
    for capability in &config.kvm_capabilities {
        match capability {
            KvmCapability::Add(number) if kvm.check_extension_raw((*number).into()) <= 0 => {
                return Err(CpuConfigError::Capability(*number));
            }
            KvmCapability::Add(_) | KvmCapability::Remove(_) => {}
        }
    }
    Ok(())
}

/// Changes the leaves.
pub fn apply_cpuid(cpuid: &mut CpuId, config: &CpuConfig) -> Result<(), CpuConfigError> {
    for change in &config.cpuid_modifiers {
        let (leaf, subleaf) = (change.leaf, change.subleaf);
        let mut entries = cpuid.as_mut_slice().iter_mut();
        let entry = entries.find(|e| (e.function, e.index) == (leaf, subleaf));
        let entry = entry.ok_or(CpuConfigError::Leaf { leaf, subleaf })?;
        for modifier in &change.modifiers {
            let register = match modifier.register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            // The pattern has 32 bits, so nothing is cut off.
            *register = modifier.bitmap.apply((*register).into()) as u32;
        }
    }
    Ok(())
}

/// Changes the registers of one vCPU, whose CPUID is already set.
pub fn apply_msrs(vcpu: &VcpuFd, config: &CpuConfig) -> Result<(), CpuConfigError> {
    for modifier in &config.msr_modifiers {
        let address = modifier.addr;
        let fail = |what| CpuConfigError::Msr { what, address };
        let entry = kvm_msr_entry { index: address, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| fail("read"))?;
        // Both calls say how many registers they got done.
        if !matches!(vcpu.get_msrs(&mut msrs), Ok(1)) {
            return Err(fail("read"));
        }
        for entry in msrs.as_mut_slice() {
            entry.data = modifier.bitmap.apply(entry.data);
        }
        if !matches!(vcpu.set_msrs(&msrs), Ok(1)) {
            return Err(fail("write"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    #[test]
    fn registers_of_the_right_leaf_change() {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0b1010,
            ebx: u32::MAX,
            ..Default::default()
        };
        let mut cpuid = CpuId::from_entries(&[leaf(7, 0), leaf(7, 1)]).unwrap();
        let text = r#"{"cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x1", "flags": 1, "modifiers": [
            {"register": "eax", "bitmap": "0bx1x0"}, {"register": "ebx", "bitmap": "0b0"}]}]}"#;
        apply_cpuid(&mut cpuid, &serde_json::from_str(text).unwrap()).unwrap();
        let values: Vec<_> = cpuid.as_slice().iter().map(|e| (e.eax, e.ebx)).collect();
        assert_eq!(values, [(0b1010, u32::MAX), (0b1110, u32::MAX - 1)]);

        let error = apply_cpuid(&mut cpuid, &serde_json::from_str(&text.replace("0x7", "0x8")).unwrap());
        let message = "cpu-config: cpuid_modifiers: this host has no CPUID leaf 0x8 with subleaf 0x1";
        assert_eq!(error.unwrap_err().to_string(), message);
    }
}
