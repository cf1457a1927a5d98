//! The two address spaces through which a guest reaches emulated devices: port I/O and memory-mapped
//! I/O. A bus is filled before the vCPUs start and read-only afterwards, so a look-up takes no lock.
//!
//! An access to an address where nothing is, or one that leaves a device's range, reads as all ones and
//! writes nowhere: what a guest does there is its own affair and never the VMM's.

use std::sync::Arc;

/// A device on a bus. Offsets are relative to the device's first address; any offset inside its range
/// and any length from 1 to 8 may come.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset`. `data` arrives filled with ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Slot {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address. See the module's text.
#[derive(Default)]
pub struct Bus {
    slots: Vec<Slot>,
}

/// Two devices claim the same address.
#[derive(Debug, thiserror::Error)]
#[error("bus range {start:#x}+{len:#x} overlaps another device")]
pub struct Overlap {
    start: u64,
    len: u64,
}

impl Bus {
    /// Puts `device` at `start..start + len`.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let end = start.checked_add(len).filter(|_| len > 0).ok_or(Overlap { start, len })?;
        let at = self.slots.partition_point(|s| s.start < start);
        let clear_before = at == 0 || self.slots[at - 1].start + self.slots[at - 1].len <= start;
        let clear_after = self.slots.get(at).is_none_or(|next| end <= next.start);
        if !clear_before || !clear_after {
            return Err(Overlap { start, len });
        }
        self.slots.insert(at, Slot { start, len, device });
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Slot, u64)> {
        let at = self.slots.partition_point(|s| s.start <= address);
        let slot = self.slots.get(at.checked_sub(1)?)?;
        let offset = address - slot.start;
        (offset.checked_add(len as u64)? <= slot.len).then_some((slot, offset))
    }

    /// Guest read; `false` if nothing is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((slot, offset)) => {
                slot.device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Guest write; `false` if nothing is there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((slot, offset)) => {
                slot.device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);
    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_they_name_and_no_other() {
        let (a, b) = (Arc::new(Recorder::default()), Arc::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, a.clone()).unwrap();
        bus.insert(0x110, 0x10, b.clone()).unwrap();
        assert!(bus.write(0x10f, &[1]));
        assert!(bus.write(0x110, &[2, 3]));
        assert!(!bus.write(0x10f, &[9, 9]), "an access across two devices goes nowhere");
        assert!(!bus.write(0xff, &[9]));
        assert!(!bus.write(0x120, &[9]));
        assert!(!bus.write(u64::MAX, &[9, 9]));
        assert_eq!(*a.0.lock().unwrap(), [(0xf, vec![1])]);
        assert_eq!(*b.0.lock().unwrap(), [(0, vec![2, 3])]);
        let mut data = [0; 2];
        assert!(bus.read(0x111, &mut data));
        assert_eq!(data, [1, 0xff]);
        assert!(!bus.read(0, &mut data));
        assert_eq!(data, [0xff, 0xff]);
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let d = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, d.clone()).unwrap();
        for (start, len) in [(0x100, 1), (0xf8, 9), (0x10f, 1), (0x80, 0x200), (0x300, 0), (u64::MAX, 2)] {
            assert!(bus.insert(start, len, d.clone()).is_err(), "{start:#x}+{len:#x}");
        }
        bus.insert(0xf8, 8, d).unwrap();
    }
}
