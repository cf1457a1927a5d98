//! x86_64: address map, boot protocols, CPU state, ACPI and MP tables.

pub mod layout;
