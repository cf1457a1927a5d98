//! The keyboard controller, as much as a guest needs of it: the reset line (`reboot=k`), and a keyboard on
//! which only Ctrl-Alt-Del is ever pressed.
//!
//! Registers as in the IBM PS/2 technical reference: data at port 0x60, status and command at 0x64. The
//! device spans 0x60 to 0x64; what lies between reads as all ones.

use std::collections::VecDeque;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::event_loop::lock;
use crate::metrics::METRICS;
use crate::stop::{StopReason, StopSink};

/// Number of ports from 0x60 on.
pub const PORTS: u64 = 5;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const CONTROL_INTERRUPT: u8 = 1;
const CONTROL_POST_OK: u8 = 1 << 2;
const CONTROL_DISABLED: u8 = 1 << 4;
const CONTROL_TRANSLATE: u8 = 1 << 6;

/// Scan codes (set 1, as translated) for pressing Ctrl, Alt and Del and releasing them in reverse.
const CTRL_ALT_DEL: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
const OUTPUT_MAX: usize = 16;
const ACK: u8 = 0xfa;

/// What the next byte written to the data port means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Expect {
    KeyboardCommand,
    KeyboardArgument,
    Control,
    MouseLoop,
    Ignored,
}

/// What the controller consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    control: u8,
    output: VecDeque<u8>,
    expect: Expect,
    last_was_command: bool,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            control: CONTROL_INTERRUPT | CONTROL_POST_OK | CONTROL_TRANSLATE,
            output: VecDeque::new(),
            expect: Expect::KeyboardCommand,
            last_was_command: false,
        }
    }
}

/// See the module's text.
pub struct I8042 {
    state: Mutex<I8042State>,
    irq: EventFd,
    stop: StopSink,
}

impl I8042 {
    /// A controller that raises `irq` for each byte of the keyboard and ends the VM on reset.
    pub fn new(irq: EventFd, stop: StopSink) -> Self {
        Self { state: Mutex::default(), irq, stop }
    }

    /// Presses Ctrl-Alt-Del. `false` if the guest has not read the last press yet.
    pub fn ctrl_alt_del(&self) -> bool {
        let mut state = lock(&self.state);
        let idle = state.output.is_empty();
        if idle {
            self.send(&mut state, &CTRL_ALT_DEL);
        }
        idle
    }

    /// What the controller consists of.
    pub fn save(&self) -> I8042State {
        lock(&self.state).clone()
    }

    /// Goes on from there. What does not fit is left out.
    pub fn restore(&self, saved: &I8042State) {
        let mut state = saved.clone();
        state.output.truncate(OUTPUT_MAX);
        *lock(&self.state) = state;
    }

    /// The interrupt line, for registering it.
    pub fn irq(&self) -> &EventFd {
        &self.irq
    }

    fn send(&self, state: &mut I8042State, bytes: &[u8]) {
        if state.output.len() + bytes.len() <= OUTPUT_MAX {
            state.output.extend(bytes);
            self.interrupt(state);
        }
    }

    fn interrupt(&self, state: &I8042State) {
        if !state.output.is_empty()
            && state.control & (CONTROL_INTERRUPT | CONTROL_DISABLED) == CONTROL_INTERRUPT
        {
            let _ = self.irq.write(1);
        }
    }

    fn command(&self, state: &mut I8042State, command: u8) {
        state.last_was_command = true;
        state.expect = Expect::KeyboardCommand;
        match command {
            0x20 => {
                let control = state.control;
                self.send(state, &[control]);
            }
            0x60 => state.expect = Expect::Control,
            0xaa => self.send(state, &[0x55]), // self test passed
            0xab => self.send(state, &[0x00]), // keyboard line passed
            0xad => state.control |= CONTROL_DISABLED,
            0xae => {
                state.control &= !CONTROL_DISABLED;
                self.interrupt(state);
            }
            0xa9 => self.send(state, &[0x01]), // mouse line: stuck, there is none
            0xd3 => state.expect = Expect::MouseLoop,
            // Bytes for the output port, the keyboard's buffer and the mouse.
            0xd1 | 0xd2 | 0xd4 => state.expect = Expect::Ignored,
            0xfe => {
                METRICS.i8042.reset_count.inc();
                self.stop.stop(StopReason::Reset);
            }
            _ => {}
        }
    }

    fn data(&self, state: &mut I8042State, value: u8) {
        state.last_was_command = false;
        match std::mem::replace(&mut state.expect, Expect::KeyboardCommand) {
            Expect::Control => state.control = value,
            // A mouse line would echo the byte marked as the mouse's; a driver gives up on any other answer
            // at once, where it would wait half a second for none.
            Expect::MouseLoop => self.send(state, &[0]),
            Expect::Ignored => {}
            Expect::KeyboardArgument => self.send(state, &[ACK]),
            Expect::KeyboardCommand => match value {
                0xff => self.send(state, &[ACK, 0xaa]),       // reset: self test passed
                0xf2 => self.send(state, &[ACK, 0xab, 0x83]), // identity: an ordinary keyboard
                0xed | 0xf0 | 0xf3 => {
                    state.expect = Expect::KeyboardArgument;
                    self.send(state, &[ACK]);
                }
                _ => self.send(state, &[ACK]),
            },
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let [value] = data else { return };
        METRICS.i8042.read_count.inc();
        let mut state = lock(&self.state);
        match offset {
            DATA => {
                *value = state.output.pop_front().unwrap_or(0);
                self.interrupt(&state);
            }
            COMMAND => {
                *value = STATUS_SYSTEM | STATUS_UNLOCKED;
                *value |= if state.output.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
                *value |= if state.last_was_command { STATUS_COMMAND } else { 0 };
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        METRICS.i8042.write_count.inc();
        let mut state = lock(&self.state);
        match offset {
            DATA => self.data(&mut state, value),
            COMMAND => self.command(&mut state, value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> I8042 {
        I8042::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), StopSink::new().unwrap())
    }

    fn read(device: &I8042, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn reset_command_ends_the_vm() {
        let device = device();
        device.write(COMMAND, &[0xfe]);
        assert_eq!(device.stop.reason(), Some(StopReason::Reset));
    }

    #[test]
    fn ctrl_alt_del_arrives_as_scan_codes_with_an_interrupt_each() {
        let device = device();
        assert!(device.ctrl_alt_del());
        assert!(!device.ctrl_alt_del(), "the first press has not been read");
        for code in CTRL_ALT_DEL {
            assert_eq!(device.irq.read().unwrap(), 1);
            assert_eq!(read(&device, COMMAND) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
            assert_eq!(read(&device, DATA), code);
        }
        assert_eq!(read(&device, COMMAND) & STATUS_OUTPUT_FULL, 0);
        assert!(device.irq.read().is_err());
        assert!(device.ctrl_alt_del());
    }

    #[test]
    fn a_driver_finds_a_controller_and_a_keyboard() {
        let device = device();
        device.write(COMMAND, &[0xaa]);
        assert_eq!(read(&device, DATA), 0x55);
        device.write(COMMAND, &[0x60]);
        device.write(DATA, &[0x30]);
        device.write(COMMAND, &[0x20]);
        assert_eq!(read(&device, DATA), 0x30);
        device.write(DATA, &[0xf2]);
        assert_eq!([read(&device, DATA), read(&device, DATA), read(&device, DATA)], [ACK, 0xab, 0x83]);
    }

    #[test]
    fn a_driver_finds_no_mouse_and_need_not_wait_for_one() {
        let device = device();
        device.write(COMMAND, &[0xd3]);
        device.write(DATA, &[0x5a]);
        assert_eq!(read(&device, COMMAND) & (STATUS_OUTPUT_FULL | 0x20), STATUS_OUTPUT_FULL);
        assert_ne!(read(&device, DATA), 0x5a);
        device.write(COMMAND, &[0xa9]);
        assert!(![0, 0xfa, 0xff].contains(&read(&device, DATA)));
    }

    #[test]
    fn an_output_nobody_reads_stays_bounded() {
        let device = device();
        for _ in 0..1000 {
            device.write(DATA, &[0xff]);
            device.write(COMMAND, &[0xaa]);
        }
        assert!(lock(&device.state).output.len() <= OUTPUT_MAX);
    }
}
