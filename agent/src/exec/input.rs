//! Standard input on its way to a process: what the host has sent, what the process has taken, and what
//! the host is still to be told.
//!
//! Never holds more than a window, and never blocks.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::termios::{SpecialCharacterIndices, tcgetattr};
use nix::unistd::write;
use pulau_agent_protocol::STDIN_WINDOW;
use pulau_agent_protocol::message::{ErrorReply, ExecEvent};

use crate::refusal::bad_request;

#[derive(Debug)]
pub struct Input {
    /// `None` once closed, by whichever side, or if there never was any.
    fd: Option<OwnedFd>,
    terminal: bool,
    queue: VecDeque<u8>,
    /// The host has sent the end.
    ended: bool,
    /// The terminal has been given its end-of-file character.
    end_written: bool,
    /// Bytes received and not acknowledged.
    outstanding: usize,
    /// Those of them that take no room any more.
    taken: usize,
    /// The process has closed its side, and the host does not know.
    closed_untold: bool,
}

impl Input {
    /// `fd` does not block.
    pub fn new(fd: Option<OwnedFd>, terminal: bool) -> Self {
        Self {
            fd,
            terminal,
            queue: VecDeque::new(),
            ended: false,
            end_written: false,
            outstanding: 0,
            taken: 0,
            closed_untold: false,
        }
    }

    /// Takes what the host sent; nothing means the end. Call [`feed`](Self::feed) after it.
    ///
    /// # Errors
    /// `bad_request` for more than the window allows, or anything after the end.
    pub fn accept(&mut self, bytes: &[u8]) -> Result<(), ErrorReply> {
        if self.ended && !bytes.is_empty() {
            return Err(bad_request("standard input after its end"));
        }
        self.ended |= bytes.is_empty();
        self.outstanding += bytes.len();
        if self.outstanding > STDIN_WINDOW {
            return Err(bad_request(format!(
                "more than {STDIN_WINDOW} bytes of standard input unacknowledged"
            )));
        }
        if self.fd.is_some() {
            self.queue.extend(bytes);
        } else {
            self.taken += bytes.len();
        }
        Ok(())
    }

    /// What to poll for: room for what is queued, and (without asking for it) a pipe that nobody reads any
    /// more. A terminal is polled for room only: its hang-up is seen on the output side.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let fd = self.fd.as_ref()?.as_fd();
        if self.wants_room() {
            Some((fd, PollFlags::POLLOUT))
        } else {
            (!self.terminal).then_some((fd, PollFlags::empty()))
        }
    }

    fn wants_room(&self) -> bool {
        !self.queue.is_empty() || (self.terminal && self.ended && !self.end_written)
    }

    /// Acts on what `poll` said of it.
    pub fn ready(&mut self, events: PollFlags) {
        if events.contains(PollFlags::POLLERR) && !self.terminal { self.close() } else { self.feed() }
    }

    /// Gives the process as much as it will take now.
    pub fn feed(&mut self) {
        while let Some(fd) = &self.fd {
            let (front, _) = self.queue.as_slices();
            let result = match (front, self.ended) {
                ([_, ..], _) => write(fd, front).map(|n| {
                    self.queue.drain(..n);
                    self.taken += n;
                }),
                ([], false) => return,
                ([], true) if !self.terminal => return self.close(),
                ([], true) if self.end_written => return,
                ([], true) => write(fd, &[end_of_file(fd)]).map(|_| self.end_written = true),
            };
            match result {
                Ok(()) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => self.close(),
            }
        }
    }

    /// No more input: the process has closed it or has ended, or has been given all of it.
    pub fn close(&mut self) {
        if self.fd.take().is_some() {
            self.closed_untold = !self.ended;
            self.taken += self.queue.len();
            self.queue.clear();
        }
    }

    /// What the host should be told now, if anything.
    pub fn next_event(&mut self) -> Option<ExecEvent> {
        if std::mem::take(&mut self.closed_untold) {
            return Some(ExecEvent::StdinClosed);
        }
        // Not for every few bytes while there is more to come.
        if self.taken == 0 || !(self.queue.is_empty() || self.taken >= STDIN_WINDOW / 4) {
            return None;
        }
        self.outstanding -= self.taken;
        // At most a window.
        let bytes = std::mem::take(&mut self.taken) as u32;
        Some(ExecEvent::StdinTaken { bytes })
    }
}

/// The terminal's end-of-file character; control-D unless the process has chosen another.
fn end_of_file(terminal: &OwnedFd) -> u8 {
    const CONTROL_D: u8 = 4;
    tcgetattr(terminal).map_or(CONTROL_D, |t| t.control_chars[SpecialCharacterIndices::VEOF as usize])
}
