//! Free page hinting (virtio 1.2, 5.5.6.6): on the host's command the driver takes what memory is free, names
//! it page block by page block, and keeps it until the host says that it is done.
//!
//! ```text
//!        start                    driver answers with the command
//! DONE ─────────▶ command n ────────────────────────────────────────▶ ranges are given back
//!   ▲                │ start: n + 1                                        │ driver sends STOP
//!   └────────────────┴──── stop, or STOP where that ends the run ──────────┘
//! ```
//! Ranges that do not belong to the present command are left alone: the driver may be using them again.

use serde::{Deserialize, Serialize};

use crate::config::BalloonHintingStatus;

/// `VIRTIO_BALLOON_CMD_ID_STOP`: the driver has named everything. Also what a fresh device says.
pub const STOP: u32 = 0;
/// `VIRTIO_BALLOON_CMD_ID_DONE`: the driver may have its pages back.
pub const DONE: u32 = 1;

/// Where a run stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hinting {
    /// What the configuration space says.
    host: u32,
    /// What the driver said last.
    guest: Option<u32>,
    /// The last command used.
    last: u32,
    /// Whether the driver's STOP ends the run.
    end_on_stop: bool,
}

impl Hinting {
    /// The command in the configuration space.
    pub fn command(&self) -> u32 {
        self.host
    }

    /// Begins a run; the configuration space has changed.
    pub fn start(&mut self, end_on_stop: bool) {
        // STOP and DONE are no commands for a run.
        self.last = self.last.wrapping_add(1).max(DONE + 1);
        self.host = self.last;
        self.guest = None;
        self.end_on_stop = end_on_stop;
    }

    /// Ends a run; the configuration space has changed.
    pub fn stop(&mut self) {
        self.host = DONE;
    }

    /// The driver sent a command. Returns whether that ended the run, which changes the configuration space.
    pub fn guest_said(&mut self, command: u32) -> bool {
        self.guest = Some(command);
        let ends = command <= DONE && self.host > DONE && self.end_on_stop;
        if ends {
            self.stop();
        }
        ends
    }

    /// Whether ranges the driver names now belong to the present run.
    pub fn takes_ranges(&self) -> bool {
        self.host > DONE && self.guest == Some(self.host)
    }

    /// The driver is gone, and what it said with it.
    pub fn forget_driver(&mut self) {
        self.guest = None;
        self.host = STOP;
    }

    /// As the API tells it.
    pub fn status(&self) -> BalloonHintingStatus {
        BalloonHintingStatus { host_cmd: self.host, guest_cmd: self.guest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ranges_of_the_present_command_are_taken() {
        let mut hinting = Hinting::default();
        assert!(!hinting.takes_ranges());
        hinting.start(true);
        let first = hinting.command();
        assert!(first > DONE && !hinting.takes_ranges());
        assert!(!hinting.guest_said(first));
        assert!(hinting.takes_ranges());
        hinting.start(true);
        assert!(!hinting.takes_ranges(), "those of the run before");
        assert!(!hinting.guest_said(first) && !hinting.takes_ranges());
        assert!(!hinting.guest_said(hinting.command()) && hinting.takes_ranges());
        assert!(hinting.guest_said(STOP), "ends the run");
        assert_eq!((hinting.command(), hinting.takes_ranges()), (DONE, false));
        assert!(!hinting.guest_said(STOP));
    }

    #[test]
    fn a_run_may_be_left_to_the_host_to_end() {
        let mut hinting = Hinting::default();
        hinting.start(false);
        hinting.guest_said(hinting.command());
        assert!(!hinting.guest_said(STOP));
        assert!(hinting.command() > DONE && !hinting.takes_ranges());
        hinting.stop();
        assert_eq!(hinting.status(), BalloonHintingStatus { host_cmd: DONE, guest_cmd: Some(STOP) });
    }

    #[test]
    fn commands_never_become_stop_or_done() {
        let mut hinting = Hinting { last: u32::MAX - 1, ..Hinting::default() };
        for _ in 0..3 {
            hinting.start(true);
            assert!(hinting.command() > DONE);
        }
    }
}
