//! Finds writes to guest memory that no descriptor allowed.
//!
//! The guest says what it writes ([`Watch::wrote`]); what the device may write to is read off the descriptor
//! tables before each call of the device ([`Watch::look`]), and at the end everything else must be as the
//! guest left it ([`Watch::check`]). A guest that has the device write into the tables themselves changes
//! the rules during a call; such a run is not judged.

use std::collections::HashSet;
use std::ops::Range;

use pulau_vmm::memory::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::{HIGH, HIGH_LEN, LOW};

const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Largest indirect table looked at, in bytes.
const MAX_TABLE: u32 = 512 * 16;

/// See the module's text.
pub struct Watch {
    regions: [Region; 2],
    /// Where rings and tables lie.
    rings: Range<u64>,
    seen: HashSet<(u64, u32)>,
    tables: HashSet<(u64, u32)>,
    stale: bool,
    on: bool,
    zeroing: bool,
}

struct Region {
    start: u64,
    /// As the guest left it.
    shadow: Vec<u8>,
    allowed: Vec<bool>,
}

impl Watch {
    /// Watches the whole of guest memory, zeroed, with rings and tables in `rings`.
    pub fn new(rings: Range<u64>) -> Self {
        let region =
            |start, len| Region { start, shadow: vec![0; len as usize], allowed: vec![false; len as usize] };
        Self {
            regions: [region(0, LOW), region(HIGH, HIGH_LEN)],
            rings,
            seen: HashSet::new(),
            tables: HashSet::new(),
            stale: true,
            on: true,
            zeroing: false,
        }
    }

    /// The device may zero whatever it is asked to.
    pub fn allow_zeroing(&mut self) {
        self.zeroing = true;
    }

    /// The guest plays by rules not known here.
    pub fn give_up(&mut self) {
        self.on = false;
    }

    /// The guest wrote this.
    pub fn wrote(&mut self, address: u64, bytes: &[u8]) {
        self.stale = true;
        for region in &mut self.regions {
            if let Some(at) = address.checked_sub(region.start)
                && let Some(place) = region.shadow.get_mut(at as usize..at as usize + bytes.len())
            {
                place.copy_from_slice(bytes);
            }
        }
    }

    /// The device may write this.
    pub fn allow(&mut self, address: u64, len: u64) {
        let end = address.saturating_add(len);
        for region in &mut self.regions {
            let clip = |at: u64| at.saturating_sub(region.start).min(region.allowed.len() as u64) as usize;
            let (from, to) = (clip(address), clip(end));
            region.allowed[from..to].fill(true);
        }
    }

    /// Reads off the tables what the device may write to from now on.
    pub fn look(&mut self, memory: &Memory, tables: impl Iterator<Item = (u64, u16)>) {
        if !self.on || !std::mem::take(&mut self.stale) {
            return;
        }
        for (table, size) in tables {
            self.look_at(memory, table, u32::from(size) * 16, true);
        }
        let overlaps =
            |a: &Range<u64>, (at, len): (u64, u32)| at < a.end && at.saturating_add(len.into()) > a.start;
        let tables = &self.tables;
        let into_rules = |buffer: &(u64, u32)| {
            overlaps(&self.rings, *buffer)
                || tables.iter().any(|(at, len)| overlaps(&(*at..at.saturating_add((*len).into())), *buffer))
        };
        self.on = !self.seen.iter().any(into_rules);
    }

    fn look_at(&mut self, memory: &Memory, table: u64, len: u32, direct: bool) {
        let mut bytes = vec![0; len as usize];
        // A table that is partly outside memory is read as far as it goes.
        let got = memory.read(&mut bytes, GuestAddress(table)).unwrap_or(0);
        for entry in bytes[..got].chunks_exact(16) {
            let address = u64::from_le_bytes(entry[..8].try_into().expect("eight bytes"));
            let len = u32::from_le_bytes(entry[8..12].try_into().expect("four bytes"));
            let flags = u16::from_le_bytes(entry[12..14].try_into().expect("two bytes"));
            if flags & WRITE != 0 && len > 0 && self.seen.insert((address, len)) {
                self.allow(address, len.into());
            }
            if flags & INDIRECT != 0 && direct {
                if len > MAX_TABLE {
                    self.on = false;
                } else {
                    self.tables.insert((address, len));
                    self.look_at(memory, address, len, false);
                }
            }
        }
    }

    /// Fails where memory is not as it must be.
    pub fn check(&self, memory: &Memory) {
        if !self.on {
            return;
        }
        for region in &self.regions {
            let mut now = vec![0; region.shadow.len()];
            memory.read_slice(&mut now, GuestAddress(region.start)).expect("it is memory");
            for (page, (now, shadow)) in now.chunks(4096).zip(region.shadow.chunks(4096)).enumerate() {
                if now == shadow {
                    continue;
                }
                for (at, (now, was)) in now.iter().zip(shadow).enumerate() {
                    let at = 4096 * page + at;
                    let fine = now == was || region.allowed[at] || (self.zeroing && *now == 0);
                    assert!(fine, "{:#x} was {was:#x} and is {now:#x}", region.start + at as u64);
                }
            }
        }
    }
}
