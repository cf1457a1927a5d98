//! The registers of a virtio-mmio device as a page that the guest reads by itself, and acknowledgements of
//! interrupts that it makes without waiting.
//!
//! An exit to the VMM is the dearest thing a driver does, and Linux makes two at each interrupt: it reads
//! what the interrupt was for, and acknowledges it. Neither has to be one.
//!
//! * *Reading* a register changes nothing (virtio 1.2, 4.2.2), so a device's window is a page of the VMM's
//!   memory, in which the registers always have their present values. KVM shows it to the guest read-only:
//!   reads take what is there, writes still come to the transport.
//! * *Acknowledging* clears bits of the interrupt status, for which nobody waits. KVM notes the write in a
//!   ring (coalesced MMIO), and the bits are cleared before the next interrupt is raised.
//!
//! No interrupt gets lost by that. The device shows its used chains, takes acknowledgements out of the ring,
//! sets the bit, and interrupts; the driver acknowledges, then looks for used chains. An acknowledgement is
//! either in the ring before the bit is set, and does not clear it; or it comes after the chains were shown,
//! and the driver sees them. A status not cleared yet is seen by nobody, as each device has an interrupt line
//! of its own.
//!
//! On a host whose KVM cannot do one or the other, the same accesses come to the transport instead.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};

use super::mmio::{INTERRUPT_ACK, INTERRUPT_STATUS, WINDOW};
use crate::event_loop::lock;

const PAGE: usize = WINDOW as usize;
const WORDS: usize = PAGE / 4;

/// A device's window. Registers are little-endian, as is every processor this runs on.
#[repr(C, align(4096))]
pub struct Registers([AtomicU32; WORDS]);

impl Registers {
    /// All zero.
    pub fn new() -> Box<Self> {
        Box::new(Self([const { AtomicU32::new(0) }; WORDS]))
    }

    /// The register at `offset`, a multiple of 4 inside the window.
    pub fn at(&self, offset: u64) -> &AtomicU32 {
        &self.0[offset as usize / 4]
    }

    /// Sets the register at `offset`.
    pub fn set(&self, offset: u64, value: u32) {
        self.at(offset).store(value, Ordering::SeqCst);
    }

    /// What the guest reads at `offset`: any offset and width.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let word = self.0.get((at / 4) as usize).map_or(0, |word| word.load(Ordering::SeqCst));
            *byte = word.to_ne_bytes()[(at % 4) as usize];
        }
    }

    /// Puts `bytes` at `offset`, a multiple of 4. What does not fill a register is filled up with zeros, what
    /// lies beyond the window is left out.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let words = self.0.iter().skip(offset as usize / 4);
        for (word, bytes) in words.zip(bytes.chunks(4)) {
            let mut value = [0; 4];
            value[..bytes.len()].copy_from_slice(bytes);
            word.store(u32::from_ne_bytes(value), Ordering::SeqCst);
        }
    }

    /// The page's address in this process, for KVM.
    pub fn address(&self) -> u64 {
        std::ptr::from_ref(self) as u64
    }
}

/// Acknowledgements that KVM has noted, for all devices of a VM.
#[derive(Default)]
pub struct Acknowledgements(Mutex<Noted>);

#[derive(Default)]
struct Noted {
    ring: Option<Ring>,
    /// Windows by the guest's address of them.
    windows: Vec<(u64, Arc<Registers>)>,
}

impl Acknowledgements {
    /// Those of the device whose window is at `address` will be noted.
    pub fn add(&self, address: u64, registers: Arc<Registers>) {
        lock(&self.0).windows.push((address, registers));
    }

    /// From now on they are taken from the ring that the VM of vCPU `vcpu` has, if there are any to come.
    pub fn attach(&self, vcpu: &impl std::os::fd::AsRawFd) -> std::io::Result<()> {
        let mut noted = lock(&self.0);
        if !noted.windows.is_empty() {
            noted.ring = Some(Ring::map(vcpu.as_raw_fd())?);
        }
        Ok(())
    }

    /// Does all that were made so far. What this thread wrote before is visible to whoever makes a later one.
    pub fn take(&self) {
        let mut noted = lock(&self.0);
        let Noted { ring: Some(ring), windows } = &mut *noted else { return };
        while let Some(entry) = ring.next() {
            let of = |window: &&(u64, _)| entry.phys_addr == window.0 + INTERRUPT_ACK && entry.len == 4;
            if let Some((_, registers)) = windows.iter().find(of) {
                let [a, b, c, d, ..] = entry.data;
                registers.at(INTERRUPT_STATUS).fetch_and(!u32::from_ne_bytes([a, b, c, d]), Ordering::SeqCst);
            }
        }
    }
}

/// KVM's ring of writes whose effect can wait (`KVM_CAP_COALESCED_MMIO`).
struct Ring(*mut kvm_coalesced_mmio_ring);

// SAFETY: the page is shared with the kernel, and this is the only reference to it in the process.
unsafe impl Send for Ring {}

/// Entries that fit the page behind the two indices, as the kernel counts them.
const ENTRIES: u32 = ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

impl Ring {
    fn map(vcpu: std::os::fd::RawFd) -> std::io::Result<Self> {
        let offset = i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as i64;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: makes a mapping at an address that the kernel chooses.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, libc::MAP_SHARED, vcpu, offset) };
        if page == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(Self(page.cast())) }
    }

    fn next(&mut self) -> Option<kvm_coalesced_mmio> {
        // SAFETY: the page is mapped for as long as `self` lives; the kernel writes `last`, this process alone
        // writes `first`, and both are aligned.
        let (first, last) = unsafe {
            let (first, last) = (&raw mut (*self.0).first, &raw mut (*self.0).last);
            (AtomicU32::from_ptr(first), AtomicU32::from_ptr(last))
        };
        let at = first.load(Ordering::Relaxed);
        if at == last.load(Ordering::Acquire) || at >= ENTRIES {
            return None;
        }
        // SAFETY: the entry lies in the page, and the kernel leaves it alone until `first` has passed it.
        let entry = unsafe {
            let entries = self.0.add(1).cast::<kvm_coalesced_mmio>();
            entries.add(at as usize).read()
        };
        first.store((at + 1) % ENTRIES, Ordering::Release);
        Some(entry)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_width_reads_what_was_set() {
        let registers = Registers::new();
        registers.set(0x60, 0x0403_0201);
        registers.write(0x100, &[1, 2, 3, 4, 5]);
        let read = |offset, len| {
            let mut data = vec![0xaa; len];
            registers.read(offset, &mut data);
            data
        };
        assert_eq!(read(0x5f, 6), [0, 1, 2, 3, 4, 0]);
        assert_eq!(read(0x102, 4), [3, 4, 5, 0]);
        assert_eq!(read(WINDOW - 1, 4), [0; 4]);
        registers.write(WINDOW - 4, &[9; 8]);
        assert_eq!(read(WINDOW - 2, 4), [9, 9, 0, 0]);
    }

    /// A page as the kernel would fill it.
    #[test]
    fn acknowledgements_are_done_in_order_and_the_ring_wraps() {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: makes a mapping at an address that the kernel chooses.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, access, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        let ring: *mut kvm_coalesced_mmio_ring = page.cast();
        let acknowledgements = Acknowledgements::default();
        let windows = [0x1000, 0x2000].map(|address| {
            let registers: Arc<Registers> = Registers::new().into();
            acknowledgements.add(address, registers.clone());
            registers
        });
        lock(&acknowledgements.0).ring = Some(Ring(ring));
        let note = |address: u64, len: u32, value: u32| {
            let mut entry = kvm_coalesced_mmio { phys_addr: address, len, ..Default::default() };
            entry.data[..4].copy_from_slice(&value.to_ne_bytes());
            // SAFETY: the page is mapped, and nobody else uses it now.
            unsafe {
                let last = (*ring).last;
                ring.add(1).cast::<kvm_coalesced_mmio>().add(last as usize).write(entry);
                (*ring).last = (last + 1) % ENTRIES;
            }
        };
        let status = |window: usize| windows[window].at(INTERRUPT_STATUS).load(Ordering::SeqCst);
        for _ in 0..3 * ENTRIES {
            windows.iter().for_each(|w| w.set(INTERRUPT_STATUS, 3));
            note(0x1064, 4, 1);
            note(0x2064, 2, 3);
            note(0x2060, 4, 3);
            note(0x9064, 4, 3);
            assert_eq!((status(0), status(1)), (3, 3));
            acknowledgements.take();
            assert_eq!((status(0), status(1)), (2, 3));
        }
        assert_eq!(ENTRIES, 170);
    }
}
