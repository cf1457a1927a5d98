//! What a VMM process costs: its memory, and how often its guest left guest mode.

use std::path::Path;

use anyhow::{Context, Result};

/// Memory of a process in KiB, by what it is for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Proportional set size of everything but the guest's memory.
    pub overhead_pss: u64,
    /// The part of it that no file backs, so that nobody shares it and it cannot be dropped. (Private dirty
    /// pages are not that: those of a program just copied are, until it is on the disk.)
    pub overhead_anonymous: u64,
    /// Proportional set size of all.
    pub total_pss: u64,
}

/// Memory of process `pid`, whose guest has `guest_mib` MiB; from `/proc/PID/smaps` (proc(5)).
pub fn memory(pid: u32, guest_mib: u64) -> Result<Memory> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("memory map of the VMM")?;
    let mappings: Vec<Mapping> = parse(&text);
    let guest =
        guest_memory(&mappings, guest_mib << 20).context("no guest memory in the VMM's memory map")?;
    let mut memory = Memory::default();
    for (index, mapping) in mappings.iter().enumerate() {
        memory.total_pss += mapping.pss;
        if !guest.contains(&index) {
            memory.overhead_pss += mapping.pss;
            memory.overhead_anonymous += mapping.anonymous;
        }
    }
    Ok(memory)
}

#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    end: u64,
    pss: u64,
    anonymous: u64,
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = parse_range(first) {
            mappings.push(Mapping { start, end, ..Default::default() });
            continue;
        }
        let Some(mapping) = mappings.last_mut() else { continue };
        let kib = words.next().and_then(|v| v.parse().ok()).unwrap_or(0);
        match first {
            "Pss:" => mapping.pss = kib,
            "Anonymous:" => mapping.anonymous = kib,
            _ => {}
        }
    }
    mappings
}

/// The mappings that are the guest's memory: neighbours that are together as large as it, as a kernel that
/// is mapped from its file lies in the middle of it; or one that is at least as large.
fn guest_memory(mappings: &[Mapping], size: u64) -> Option<std::ops::Range<usize>> {
    for first in 0..mappings.len() {
        let mut end = mappings[first].start;
        for (index, mapping) in mappings.iter().enumerate().skip(first) {
            if mapping.start != end || end - mappings[first].start >= size {
                break;
            }
            end = mapping.end;
            if end - mappings[first].start == size {
                return Some(first..index + 1);
            }
        }
    }
    let large = mappings.iter().position(|m| m.end - m.start >= size)?;
    Some(large..large + 1)
}

fn parse_range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

/// Times the guest of process `pid` left guest mode so far; none where the host does not tell (KVM's
/// debugfs, for root).
pub fn exits(pid: u32) -> Option<f64> {
    let prefix = format!("{pid}-");
    let vm = std::fs::read_dir(Path::new("/sys/kernel/debug/kvm")).ok()?.flatten();
    let mut vm = vm.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    std::fs::read_to_string(vm.next()?.path().join("exits")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_found_in_pieces() {
        let at = |start: u64, end: u64| Mapping { start, end, ..Default::default() };
        let mib = 1 << 20;
        let pieces = [
            at(0, mib),
            at(2 * mib, 4 * mib),
            at(4 * mib, 5 * mib),
            at(5 * mib, 10 * mib),
            at(10 * mib, 11 * mib),
        ];
        assert_eq!(guest_memory(&pieces, 8 * mib), Some(1..4));
        assert_eq!(guest_memory(&pieces, 3 * mib), Some(1..3));
        assert_eq!(guest_memory(&pieces[..2], 2 * mib), Some(1..2));
        assert_eq!(guest_memory(&pieces, 100 * mib), None);
    }
}
