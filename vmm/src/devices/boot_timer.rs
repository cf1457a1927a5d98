//! The boot timer: a guest's init writes the byte 123 here, and the time since InstanceStart is logged and
//! kept. The address and value are Firecracker's, so the same guest images serve both.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use log::info;

use crate::bus::BusDevice;

/// Bytes of address space.
pub const WINDOW: u64 = 0x1000;
const DONE: u8 = 123;

/// See the module's text.
pub struct BootTimer {
    start: Instant,
    start_cpu: Duration,
    guest_init: OnceLock<Duration>,
}

impl BootTimer {
    /// A timer that runs from now.
    pub fn start() -> Self {
        Self { start: Instant::now(), start_cpu: process_cpu_time(), guest_init: OnceLock::new() }
    }

    /// Time from InstanceStart to the guest's init, once it is there.
    pub fn guest_init(&self) -> Option<Duration> {
        self.guest_init.get().copied()
    }
}

impl BusDevice for BootTimer {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) {
        if data != [DONE] {
            return;
        }
        let (wall, cpu) = (self.start.elapsed(), process_cpu_time().saturating_sub(self.start_cpu));
        if self.guest_init.set(wall).is_ok() {
            info!(
                "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
                wall.as_micros(),
                wall.as_millis(),
                cpu.as_micros(),
                cpu.as_millis()
            );
        }
    }
}

fn process_cpu_time() -> Duration {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID) {
        Ok(time) => time.into(),
        Err(_) => Duration::ZERO,
    }
}
