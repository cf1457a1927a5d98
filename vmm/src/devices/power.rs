//! Ports by which a guest powers off, resets, or says that it panicked.
//!
//! Sleep control, sleep status and reset are those of ACPI 6.5 (4.8.3.7 and 4.8.3.6) for hardware-reduced
//! platforms; the panic port is QEMU's pvpanic (docs/specs/pvpanic).

use crate::bus::BusDevice;
use crate::stop::{StopReason, StopSink};

/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// Number of ports.
pub const PORTS: u64 = 3;
/// Value that resets.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of state S5 (soft off).
pub const SLEEP_TYPE_OFF: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;

/// ACPI sleep and reset registers.
pub struct Power(pub StopSink);

impl BusDevice for Power {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, [value]) if *value == SLEEP_TYPE_OFF << 2 | SLEEP_ENABLE => {
                self.0.stop(StopReason::PowerOff)
            }
            (RESET, [RESET_VALUE]) => self.0.stop(StopReason::Reset),
            _ => {}
        }
    }
}

/// The panic notification port.
pub struct PvPanic(pub StopSink);

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        // With a crash kernel loaded the guest goes on to it; anything else is the end.
        if let [value] = data
            && value & PANICKED != 0
        {
            self.0.stop(StopReason::Panic);
        }
    }
}
