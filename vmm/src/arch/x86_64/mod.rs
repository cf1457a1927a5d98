//! x86_64: address map, boot protocols, CPU state, ACPI and MP tables.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod cpu_compat;
pub mod cpu_config;
pub mod layout;
pub mod mptable;
pub mod vcpu_state;
pub mod vm_state;
