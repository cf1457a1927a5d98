//! The serial port (16550A, COM1) and the console behind it.
//!
//! The guest's output goes into a bounded buffer on the vCPU's thread and from there to its sink on the
//! event loop: a sink that blocks (a terminal on hold, a full pipe, a full disk) costs the guest its
//! output, which is dropped and counted, and costs the VMM nothing. Input flows only as far as the port's
//! FIFO has room.
//!
//! Sinks: a file or the standard output, with the standard input as input; or a Unix socket to which one
//! client at a time attaches, and is first shown what the guest wrote last.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use log::{info, warn};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::event_loop::{EventSet, Events, Subscriber, lock};
use crate::metrics::METRICS;
use crate::rate_limiter::TokenBucket;

/// Number of ports.
pub const PORTS: u64 = 8;

/// Bytes kept for a sink that is slow, and shown to a client that attaches.
const BUFFER: usize = 64 << 10;
/// Bytes per write: what a pipe takes without blocking once it is writable (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// Writes before others in the event loop get their turn: a guest may print as fast as is written.
const BUDGET: usize = 16;

const TOKEN_OUTPUT: u32 = 0;
const TOKEN_ROOM: u32 = 1;
const TOKEN_SINK: u32 = 2;
const TOKEN_INPUT: u32 = 3;
const TOKEN_LISTENER: u32 = 4;
const TOKEN_CLIENT: u32 = 5;

/// Where the console goes.
pub enum Sink {
    /// Output to a file, input from another, if any.
    Files {
        /// Takes the guest's output.
        output: File,
        /// Gives the guest's input.
        input: Option<File>,
    },
    /// A Unix socket to which a client attaches.
    Socket(ConsoleSocket),
}

/// A Unix socket for a console. Its file is removed when it is dropped.
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Binds `path`, where nothing may be yet.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::bind(path)?, path: path.to_owned() })
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Interrupt line as the serial port model wants it.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[derive(Default)]
struct Pending {
    bytes: VecDeque<u8>,
    dropped: u64,
}

/// The port's output side.
struct Output {
    pending: Arc<Mutex<Pending>>,
    ready: EventFd,
    keep_newest: bool,
    limit: Option<TokenBucket>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(limit) = &mut self.limit
            && limit.take(bytes.len() as u64, Instant::now()).is_err()
        {
            METRICS.uart.rate_limiter_dropped_bytes.add(bytes.len() as u64);
            return Ok(bytes.len());
        }
        let mut pending = lock(&self.pending);
        let was_empty = pending.bytes.is_empty();
        for byte in bytes {
            if pending.bytes.len() == BUFFER {
                pending.dropped += 1;
                if !self.keep_newest {
                    continue;
                }
                pending.bytes.pop_front();
            }
            pending.bytes.push_back(*byte);
        }
        if was_empty {
            self.ready.write(1)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the event loop that the input FIFO has room again.
struct Room(EventFd);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

type Port = Serial<Line, Room, Output>;

/// The device side: registers on the port I/O bus.
pub struct SerialPort(Arc<Mutex<Port>>);

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let [value] = data {
            METRICS.uart.read_count.inc();
            *value = lock(&self.0).read(offset as u8);
        } else {
            METRICS.uart.missed_read_count.inc();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [value] = data {
            METRICS.uart.write_count.inc();
            // Fails only if an interrupt cannot be raised, which an event descriptor never refuses.
            let _ = lock(&self.0).write(offset as u8, *value);
        } else {
            METRICS.uart.missed_write_count.inc();
        }
    }
}

/// The event loop's side: moves bytes between the port and the sink.
pub struct Console {
    port: Arc<Mutex<Port>>,
    pending: Arc<Mutex<Pending>>,
    ready: EventFd,
    room: EventFd,
    sink: Sink,
    client: Option<UnixStream>,
    events: Option<Events>,
    input_open: bool,
}

/// Makes the port, which raises `irq`, and the console that serves it from an event loop. Output beyond
/// `limit`, in bytes, is dropped and counted.
pub fn create(irq: EventFd, sink: Sink, limit: Option<TokenBucket>) -> io::Result<(SerialPort, Console)> {
    let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let (ready, room) = (event()?, event()?);
    let pending = Arc::new(Mutex::new(Pending::default()));
    let output = Output {
        pending: pending.clone(),
        ready: ready.try_clone()?,
        keep_newest: matches!(sink, Sink::Socket(_)),
        limit,
    };
    let port = Arc::new(Mutex::new(Serial::with_events(Line(irq), Room(room.try_clone()?), output)));
    let console = Console {
        port: port.clone(),
        pending,
        ready,
        room,
        sink,
        client: None,
        events: None,
        input_open: false,
    };
    Ok((SerialPort(port), console))
}

impl Console {
    /// Adds the console's descriptors to its event loop.
    pub fn attach(&mut self, events: Events) -> io::Result<()> {
        events.add(&self.ready, TOKEN_OUTPUT, EventSet::IN)?;
        events.add(&self.room, TOKEN_ROOM, EventSet::IN)?;
        match &self.sink {
            Sink::Socket(socket) => {
                socket.listener.set_nonblocking(true)?;
                events.add(&socket.listener, TOKEN_LISTENER, EventSet::IN)?;
            }
            Sink::Files { input, .. } => {
                // Files and /dev/null cannot be waited for; a console has no use for them as input.
                self.input_open =
                    input.as_ref().is_some_and(|input| events.add(input, TOKEN_INPUT, EventSet::IN).is_ok());
            }
        }
        self.events = Some(events);
        Ok(())
    }

    /// Writes what is left, as far as the sink takes it without blocking. For the end of the VM.
    pub fn finish(&mut self) {
        while !lock(&self.pending).bytes.is_empty() && self.sink_writable() {
            if self.write_chunk().is_err() {
                break;
            }
        }
        let dropped = lock(&self.pending).dropped;
        if dropped > 0 && matches!(self.sink, Sink::Files { .. }) {
            warn!("serial console: {dropped} bytes of output were dropped because nothing took them");
        }
    }

    fn sink_writable(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let fd = match (&self.sink, &self.client) {
            (Sink::Files { output, .. }, _) => output.as_fd(),
            (Sink::Socket(_), Some(client)) => client.as_fd(),
            (Sink::Socket(_), None) => return false,
        };
        let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    /// Writes one chunk; the sink must be writable.
    fn write_chunk(&mut self) -> io::Result<()> {
        let chunk: Vec<u8> = {
            let pending = lock(&self.pending);
            pending.bytes.iter().take(CHUNK).copied().collect()
        };
        let written = match (&mut self.sink, &mut self.client) {
            (Sink::Files { output, .. }, _) => output.write(&chunk),
            (Sink::Socket(_), Some(client)) => client.write(&chunk),
            (Sink::Socket(_), None) => Ok(0),
        };
        match written {
            Ok(count) => {
                lock(&self.pending).bytes.drain(..count);
                Ok(())
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(e) => {
                // The output is lost, the guest goes on.
                let mut pending = lock(&self.pending);
                pending.dropped += pending.bytes.len() as u64;
                pending.bytes.clear();
                Err(e)
            }
        }
    }

    /// Moves output to the sink as far as it goes, and waits for the sink if there is more.
    fn pump_output(&mut self) {
        let mut left = BUDGET;
        while !lock(&self.pending).bytes.is_empty() {
            if matches!(self.sink, Sink::Socket(_)) && self.client.is_none() {
                return;
            }
            if left == 0 {
                let _ = self.ready.write(1);
                return;
            }
            left -= 1;
            if !self.sink_writable() {
                self.wait_for_sink(true);
                return;
            }
            if let Err(e) = self.write_chunk() {
                warn!("serial console: {e}");
                self.drop_client();
                return;
            }
        }
        self.wait_for_sink(false);
    }

    fn wait_for_sink(&self, wait: bool) {
        let Some(events) = &self.events else { return };
        match (&self.sink, &self.client) {
            (Sink::Files { output, .. }, _) if wait => {
                let _ = events.add(output, TOKEN_SINK, EventSet::OUT);
            }
            (Sink::Files { output, .. }, _) => events.remove(output),
            (Sink::Socket(_), Some(client)) => {
                let set = if wait { EventSet::IN | EventSet::OUT } else { EventSet::IN };
                let _ = events.modify(client, TOKEN_CLIENT, set);
            }
            (Sink::Socket(_), None) => {}
        }
    }

    fn pump_input(&mut self) {
        let capacity = lock(&self.port).fifo_capacity();
        if capacity == 0 {
            return self.wait_for_input(false);
        }
        let mut bytes = [0; 64];
        let want = capacity.min(bytes.len());
        let got = match (&mut self.sink, &mut self.client) {
            (Sink::Files { input: Some(input), .. }, _) => input.read(&mut bytes[..want]),
            (Sink::Socket(_), Some(client)) => client.read(&mut bytes[..want]),
            _ => return,
        };
        match got {
            Ok(0) => self.close_input(),
            Ok(count) => {
                // There is room for all of it: nobody else fills the FIFO.
                let _ = lock(&self.port).enqueue_raw_bytes(&bytes[..count]);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.close_input(),
        }
    }

    fn wait_for_input(&mut self, wait: bool) {
        let Some(events) = &self.events else { return };
        let set = if wait { EventSet::IN } else { EventSet::empty() };
        match (&self.sink, &self.client) {
            (Sink::Files { input: Some(input), .. }, _) if self.input_open => {
                let _ = events.modify(input, TOKEN_INPUT, set);
            }
            (Sink::Socket(_), Some(client)) => {
                let _ = events.modify(client, TOKEN_CLIENT, set);
            }
            _ => {}
        }
    }

    fn close_input(&mut self) {
        match &self.sink {
            Sink::Files { input: Some(input), .. } => {
                if let Some(events) = &self.events {
                    events.remove(input);
                }
                self.input_open = false;
            }
            _ => self.drop_client(),
        }
    }

    fn drop_client(&mut self) {
        if let (Some(client), Some(events)) = (self.client.take(), &self.events) {
            events.remove(&client);
        }
    }

    fn accept(&mut self) {
        let (Sink::Socket(socket), Some(events)) = (&self.sink, &self.events) else { return };
        let Ok((client, _)) = socket.listener.accept() else { return };
        if self.client.is_some() {
            // Closed at once: one client at a time.
            info!("serial console: a second client was refused");
            return;
        }
        if client.set_nonblocking(true).is_ok() && events.add(&client, TOKEN_CLIENT, EventSet::IN).is_ok() {
            self.client = Some(client);
            self.pump_output();
        }
    }
}

impl Subscriber for Console {
    fn process(&mut self, token: u32, events: EventSet) {
        match token {
            TOKEN_OUTPUT => {
                let _ = self.ready.read();
                self.pump_output();
            }
            TOKEN_SINK => self.pump_output(),
            TOKEN_ROOM => {
                let _ = self.room.read();
                self.wait_for_input(true);
            }
            TOKEN_INPUT => self.pump_input(),
            TOKEN_LISTENER => self.accept(),
            TOKEN_CLIENT => {
                if events.contains(EventSet::OUT) {
                    self.pump_output();
                }
                if events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
                    self.pump_input();
                }
            }
            _ => {}
        }
    }
}

impl AsRawFd for Line {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
