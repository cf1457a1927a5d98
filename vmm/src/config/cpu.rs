//! Changes to what the guest sees of the CPU (`/cpu-config`).

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ConfigError;

/// A KVM capability the host must have (`"121"`), or that is not asked for (`"!121"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmCapability {
    Add(u32),
    Remove(u32),
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Add(capability) => serializer.collect_str(capability),
            Self::Remove(capability) => serializer.collect_str(&format_args!("!{capability}")),
        }
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (digits, variant): (_, fn(u32) -> Self) = match text.strip_prefix('!') {
            Some(digits) => (digits, Self::Remove),
            None => (text.as_str(), Self::Add),
        };
        digits
            .parse()
            .map(variant)
            .map_err(|_| D::Error::custom(format_args!("{text:?} is not the number of a KVM capability")))
    }
}

/// Bits to set, to clear and to leave alone in a register of up to 64 bits. Written `0b` and a
/// digit per bit, highest first: `1`, `0`, or `x` for leaving it; bits not written are left.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct BitPattern<const BITS: u32> {
    /// Bits that are set or cleared.
    pub mask: u64,
    /// What they become; a subset of `mask`.
    pub value: u64,
}

impl<const BITS: u32> BitPattern<BITS> {
    /// `register` after the change.
    pub fn apply(&self, register: u64) -> u64 {
        (register & !self.mask) | self.value
    }
}

impl<const BITS: u32> fmt::Display for BitPattern<BITS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        for bit in (0..BITS).rev() {
            f.write_str(match (self.mask >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })?;
        }
        Ok(())
    }
}

impl<const BITS: u32> fmt::Debug for BitPattern<BITS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<const BITS: u32> Serialize for BitPattern<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for BitPattern<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0b").unwrap_or(&text);
        let mut pattern = Self::default();
        for (bit, digit) in digits.bytes().rev().filter(|&b| b != b'_').enumerate() {
            if bit >= BITS as usize {
                let error = format_args!("bitmap {text:?} has more than {BITS} bits");
                return Err(D::Error::custom(error));
            }
            match digit {
                b'x' => {}
                b'0' => pattern.mask |= 1 << bit,
                b'1' => {
                    pattern.mask |= 1 << bit;
                    pattern.value |= 1 << bit;
                }
                _ => {
                    let error = format_args!("bitmap {text:?} may only contain 0, 1, x and _");
                    return Err(D::Error::custom(error));
                }
            }
        }
        Ok(pattern)
    }
}

/// A number written as a string in hexadecimal (`0x…`) or binary (`0b…`).
mod number {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => u32::from_str_radix(digits, 16),
            (_, Some(digits)) => u32::from_str_radix(digits, 2),
            _ => {
                let error = format_args!("{text:?} must begin with 0x or 0b");
                return Err(D::Error::custom(error));
            }
        };
        parsed.map_err(|_| D::Error::custom(format_args!("{text:?} is not a 32-bit number")))
    }
}

/// A register CPUID answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change to one register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidRegisterModifier {
    pub register: CpuidRegister,
    pub bitmap: BitPattern<32>,
}

/// Changes to a CPUID leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidLeafModifier {
    #[serde(with = "number")]
    pub leaf: u32,
    #[serde(with = "number")]
    pub subleaf: u32,
    /// KVM's flags of the leaf (`KVM_CPUID_FLAG_*`).
    pub flags: u32,
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// A change to the initial value of a model specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    #[serde(with = "number")]
    pub addr: u32,
    pub bitmap: BitPattern<64>,
}

/// Changes to what the guest sees of the CPU: the body of `PUT /cpu-config`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    #[serde(default)]
    pub kvm_capabilities: Vec<KvmCapability>,
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidLeafModifier>,
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

impl CpuConfig {
    /// Checks that no register is given twice.
    pub fn check(&self) -> Result<(), ConfigError> {
        let twice = |problem: String| Err(ConfigError::Cpu { problem });
        for (index, leaf) in self.cpuid_modifiers.iter().enumerate() {
            let (number, subleaf) = (leaf.leaf, leaf.subleaf);
            let same = |other: &CpuidLeafModifier| (other.leaf, other.subleaf) == (number, subleaf);
            if self.cpuid_modifiers[..index].iter().any(same) {
                return twice(format!("cpuid_modifiers has leaf {number:#x} subleaf {subleaf:#x} twice"));
            }
            for (index, modifier) in leaf.modifiers.iter().enumerate() {
                let register = modifier.register;
                if leaf.modifiers[..index].iter().any(|m| m.register == register) {
                    return twice(format!(
                        "cpuid_modifiers has register {register:?} of leaf {number:#x} twice"
                    ));
                }
            }
        }
        for (index, msr) in self.msr_modifiers.iter().enumerate() {
            if self.msr_modifiers[..index].iter().any(|m| m.addr == msr.addr) {
                return twice(format!("msr_modifiers has address {:#x} twice", msr.addr));
            }
        }
        Ok(())
    }
}
