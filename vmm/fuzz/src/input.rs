//! Numbers off a string of bytes.

use crate::{HIGH, HIGH_LEN, LOW};

/// Takes numbers off a string of bytes. What is not there is zero, and [`Input::is_empty`] tells.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether everything is taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let given = self.bytes(N);
        bytes[..given.len()].copy_from_slice(given);
        bytes
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        now
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// An address: mostly in low memory, sometimes at one of the borders, sometimes anything.
    pub fn address(&mut self) -> u64 {
        let raw = self.u16();
        let offset = u64::from(raw & 0xfff);
        match raw >> 12 {
            0..=11 => u64::from(raw) * 4,
            12 => LOW.wrapping_sub(offset),
            13 => HIGH + offset * 8,
            14 => (HIGH + HIGH_LEN).wrapping_sub(offset),
            _ => self.u64(),
        }
    }
}
