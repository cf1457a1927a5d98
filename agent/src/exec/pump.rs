//! Carrying bytes and messages between a host and a process: one thread, in which only `poll` waits.
//!
//! The connection is always read: standard input is held up to a window, so a signal never waits behind
//! input the process does not take. Towards the host one frame is held: until it has gone out nothing more
//! is read from the process, which is how a slow host slows its own process and no other.
//!
//! When the process has ended, what is in its pipes at that moment is still sent, and then its status.
//! What others write into those pipes later is not waited for: a daemon left behind may hold them for ever.

use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;
use pulau_agent_protocol::frame::{self, Decoder, HEADER_LEN, Kind, MAX_DATA};
use pulau_agent_protocol::message::{ErrorReply, ExecControl, ExecEvent, ExitStatus};

use super::input::Input;
use super::spawn::{Child, winsize};
use crate::connection::{Ended, parse};
use crate::listen::Socket;
use crate::refusal::bad_request;

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_read_bad!(bytes_in_pipe, libc::FIONREAD, libc::c_int);

/// How long a terminal may be silent after its process has ended before it counts as read to the end;
/// normally it hangs up at once.
const TERMINAL_SILENCE_MS: u16 = 500;

/// Carries everything until the process has ended and the host has been told so.
///
/// # Errors
/// The connection failed or the host broke the protocol; the process may still be running.
pub fn run(socket: &Socket, decoder: Decoder, child: &mut Child) -> Result<(), Ended> {
    let mut pump = Pump {
        socket,
        decoder,
        input: Input::new(child.stdin.take(), child.tty),
        outputs: [
            Output { fd: child.stdout.take(), kind: Kind::Stdout, left: None },
            Output { fd: child.stderr.take(), kind: Kind::Stderr, left: None },
        ],
        child,
        to_host: Outgoing::new(),
        status: None,
    };
    // Frames may have come together with the request.
    pump.take_frames()?;
    while !pump.finished()? {
        pump.step()?;
    }
    Ok(())
}

struct Pump<'a> {
    socket: &'a Socket,
    decoder: Decoder,
    child: &'a mut Child,
    input: Input,
    outputs: [Output; 2],
    to_host: Outgoing,
    /// How the process ended.
    status: Option<ExitStatus>,
}

/// One of the process's outputs.
struct Output {
    /// `None` once read to its end. Does not block.
    fd: Option<OwnedFd>,
    kind: Kind,
    /// Once the process has ended: bytes of a pipe yet to be read.
    left: Option<usize>,
}

/// What `poll` said.
struct Ready {
    socket: PollFlags,
    input: PollFlags,
    outputs: [PollFlags; 2],
    ended: bool,
    /// Nothing happened before the timeout.
    silent: bool,
}

impl Pump<'_> {
    /// Sends what is to be said now; `true` once the host has been told of the end.
    fn finished(&mut self) -> Result<bool, Ended> {
        if !self.to_host.is_empty() {
            return Ok(false);
        }
        while let Some(event) = self.input.next_event() {
            self.to_host.event(&event)?;
        }
        let done = self.outputs.iter().all(|output| output.fd.is_none());
        if let Some(status) = self.status.filter(|_| done) {
            self.to_host.event(&ExecEvent::Exited { status })?;
            return self.say_last();
        }
        self.to_host.flush(self.socket)?;
        Ok(false)
    }

    /// The process is gone, so nothing but the host's reading matters any more.
    fn say_last(&mut self) -> Result<bool, Ended> {
        loop {
            self.to_host.flush(self.socket)?;
            if self.to_host.is_empty() {
                return Ok(true);
            }
            poll_forever(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)])?;
        }
    }

    /// Waits for something to happen and deals with it.
    fn step(&mut self) -> Result<(), Ended> {
        let ready = self.wait()?;
        // A hang-up or an error is learnt of by reading.
        if !ready.socket.difference(PollFlags::POLLOUT).is_empty() {
            self.receive()?;
        }
        if !ready.input.is_empty() {
            self.input.ready(ready.input);
        }
        if ready.ended {
            self.reap()?;
        }
        self.to_host.flush(self.socket)?;
        self.collect(&ready)
    }

    fn wait(&self) -> Result<Ready, Ended> {
        let blocked = !self.to_host.is_empty();
        let running = self.status.is_none();
        let mut socket_events = PollFlags::POLLIN;
        socket_events.set(PollFlags::POLLOUT, blocked);

        let mut fds = Vec::with_capacity(5);
        let mut add = |fd, events| {
            fds.push(PollFd::new(fd, events));
            fds.len() - 1
        };
        add(self.socket.as_fd(), socket_events);
        let ended = running.then(|| add(self.child.pidfd.as_fd(), PollFlags::POLLIN));
        let input = self.input.interest().map(|(fd, events)| add(fd, events));
        // Left out while a frame waits: the hang-up of a pipe that is not read would end every wait.
        let outputs = self.outputs.each_ref().map(|output| {
            let fd = output.fd.as_ref().filter(|_| !blocked)?;
            Some(add(fd.as_fd(), PollFlags::POLLIN))
        });

        // With the process gone, its pipes hold all they ever will.
        let draining = !running && !blocked;
        let happened = match (draining, self.child.tty) {
            (false, _) => poll_forever(&mut fds)?,
            (true, true) => poll_for(&mut fds, TERMINAL_SILENCE_MS.into())?,
            (true, false) => poll_for(&mut fds, PollTimeout::ZERO)?,
        };
        let events = |at: Option<usize>| {
            at.and_then(|at| fds.get(at)).and_then(PollFd::revents).unwrap_or(PollFlags::empty())
        };
        Ok(Ready {
            socket: events(Some(0)),
            input: events(input),
            outputs: outputs.map(events),
            ended: !events(ended).is_empty(),
            silent: happened == 0,
        })
    }

    /// Reads from the connection once.
    fn receive(&mut self) -> Result<(), Ended> {
        match self.decoder.fill(&mut Now(self.socket)) {
            Ok(0) => {
                self.decoder.finish().map_err(|e| bad_request(e.to_string()))?;
                Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
            }
            Ok(_) => self.take_frames(),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn take_frames(&mut self) -> Result<(), Ended> {
        while let Some((kind, payload)) = self.decoder.take().map_err(|e| bad_request(e.to_string()))? {
            match kind {
                Kind::Stdin => self.input.accept(payload)?,
                Kind::Control => {
                    let terminal = self.outputs[0].fd.as_ref().filter(|_| self.child.tty);
                    let process = self.child.process.id();
                    control(&parse(payload)?, terminal, self.status.is_none().then_some(process))?;
                }
                other => return Err(bad_request(format!("{other:?} during an exec")).into()),
            }
        }
        self.input.feed();
        Ok(())
    }

    /// Takes the status of the ended process, and notes what is left in its pipes.
    fn reap(&mut self) -> Result<(), Ended> {
        let status = self.child.process.wait()?;
        self.child.reaped = true;
        self.status = Some(match (status.code(), status.signal()) {
            (Some(code), _) => ExitStatus::Code(code),
            (None, signal) => ExitStatus::Signal(signal.unwrap_or(0)),
        });
        if !self.child.tty {
            for output in &mut self.outputs {
                output.left = output.fd.as_ref().map(in_pipe);
            }
        }
        self.input.close();
        Ok(())
    }

    /// Reads the outputs, as long as the host takes what is read.
    fn collect(&mut self, ready: &Ready) -> Result<(), Ended> {
        let draining = self.status.is_some();
        // In turns, so that neither output waits for the other's flood to end.
        for (output, events) in self.outputs.iter_mut().zip(ready.outputs) {
            if !self.to_host.is_empty() || (events.is_empty() && !draining) {
                continue;
            }
            if draining && self.child.tty && ready.silent {
                output.fd = None;
            }
            if output.read(&mut self.to_host)? {
                self.to_host.flush(self.socket)?;
            }
        }
        Ok(())
    }
}

impl Output {
    /// Puts up to a frame of what there is in line for the host; `false` if there is nothing now.
    fn read(&mut self, to_host: &mut Outgoing) -> Result<bool, Ended> {
        let Some(fd) = &self.fd else { return Ok(false) };
        let limit = self.left.map_or(MAX_DATA, |left| left.min(MAX_DATA));
        let n = match limit {
            0 => 0,
            _ => match read(fd, &mut to_host.data()[..limit]) {
                Ok(n) => n,
                Err(Errno::EAGAIN | Errno::EINTR) if self.left.is_none() => return Ok(false),
                // EIO: the last holder of the terminal's other end has closed it.
                Err(_) => 0,
            },
        };
        if n == 0 {
            self.fd = None;
            return Ok(false);
        }
        if let Some(left) = &mut self.left {
            *left -= n;
        }
        to_host.filled(self.kind, n)?;
        Ok(true)
    }
}

/// One frame of data, or a few events, on the way to the host.
struct Outgoing {
    /// Room for the largest frame of data.
    buf: Vec<u8>,
    live: Range<usize>,
}

impl Outgoing {
    fn new() -> Self {
        Self { buf: vec![0; HEADER_LEN + MAX_DATA], live: 0..0 }
    }

    fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// Where data for the next frame goes; only while empty.
    fn data(&mut self) -> &mut [u8] {
        &mut self.buf[HEADER_LEN..HEADER_LEN + MAX_DATA]
    }

    /// `n` bytes have been put there.
    fn filled(&mut self, kind: Kind, n: usize) -> io::Result<()> {
        self.buf[..HEADER_LEN].copy_from_slice(&frame::header(kind, n).map_err(io::Error::other)?);
        self.live = 0..HEADER_LEN + n;
        Ok(())
    }

    fn event(&mut self, event: &ExecEvent) -> io::Result<()> {
        let json = serde_json::to_vec(event)?;
        let mut bytes = Vec::with_capacity(HEADER_LEN + json.len());
        frame::encode(&mut bytes, Kind::Event, &json).map_err(io::Error::other)?;
        let start = if self.is_empty() { 0 } else { self.live.end };
        // A handful of small events at most, in room for a large frame.
        let room = self.buf.get_mut(start..start + bytes.len()).ok_or(io::ErrorKind::OutOfMemory)?;
        room.copy_from_slice(&bytes);
        self.live = if start == 0 { 0..bytes.len() } else { self.live.start..start + bytes.len() };
        Ok(())
    }

    /// Sends what the connection takes now.
    fn flush(&mut self, socket: &Socket) -> io::Result<()> {
        while !self.is_empty() {
            match socket.write_now(&self.buf[self.live.clone()]) {
                Ok(n) => self.live.start += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Reads without waiting.
struct Now<'a>(&'a Socket);

impl Read for Now<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_now(buf)
    }
}

/// Does what the host asks of the running process; nothing if it has ended.
fn control(
    control: &ExecControl,
    terminal: Option<&OwnedFd>,
    process: Option<u32>,
) -> Result<(), ErrorReply> {
    match *control {
        ExecControl::Signal { signal } => {
            if !(1..=64).contains(&signal) {
                return Err(bad_request(format!("{signal} is not a signal")));
            }
            if let Some(group) = process.and_then(|pid| i32::try_from(pid).ok()) {
                // SAFETY: takes integers. The group's leader has not been waited for, so the number is its
                // own. That the group has just ended is no error; nix has no type for real-time signals.
                unsafe { libc::kill(-group, signal) };
            }
        }
        ExecControl::WindowSize(size) => {
            if let Some(terminal) = terminal {
                // SAFETY: the kernel reads one `winsize`. It refuses none.
                let _ = unsafe { set_window_size(terminal.as_raw_fd(), &winsize(size)) };
            }
        }
    }
    Ok(())
}

fn in_pipe(fd: &OwnedFd) -> usize {
    let mut count = 0;
    // SAFETY: the kernel writes one integer.
    match unsafe { bytes_in_pipe(fd.as_raw_fd(), &mut count) } {
        Ok(_) => usize::try_from(count).unwrap_or(0),
        Err(_) => 0,
    }
}

fn poll_forever(fds: &mut [PollFd<'_>]) -> io::Result<i32> {
    poll_for(fds, PollTimeout::NONE)
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> io::Result<i32> {
    loop {
        match poll(fds, timeout) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}
