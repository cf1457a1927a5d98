//! Memory of a VMM process.

use anyhow::{Context, Result};

/// Memory of a process in KiB, by what it is for.
#[derive(Debug, Default, Clone, Copy)]
pub struct Memory {
    /// Proportional set size of everything but the guest's memory and the kernel file mapped into it.
    pub overhead_pss: u64,
    /// Private dirty pages of the same.
    pub overhead_dirty: u64,
    /// Proportional set size of all.
    pub total_pss: u64,
}

/// A mapping this large, private, and of no file is guest memory: nothing else in a VMM is.
const GUEST_MEMORY_MIN: u64 = 16 << 20;

/// Reads `/proc/PID/smaps` (proc(5)).
pub fn memory(pid: u32, kernel: &std::path::Path) -> Result<Memory> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("memory map of the VMM")?;
    let kernel = kernel.to_string_lossy();
    let mut memory = Memory::default();
    let mut guest = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = parse_range(first) {
            let file = line.split_whitespace().nth(5).unwrap_or_default();
            guest = file == kernel || (file.is_empty() && end - start >= GUEST_MEMORY_MIN);
            continue;
        }
        let kib = words.next().and_then(|v| v.parse().ok()).unwrap_or(0);
        match first {
            "Pss:" => {
                memory.total_pss += kib;
                memory.overhead_pss += if guest { 0 } else { kib };
            }
            "Private_Dirty:" if !guest => memory.overhead_dirty += kib,
            _ => {}
        }
    }
    Ok(memory)
}

fn parse_range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}
