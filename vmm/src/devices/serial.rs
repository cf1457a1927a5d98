//! The serial port (16550A, COM1) and the console behind it.
//!
//! The guest's output goes into a bounded buffer on the vCPU's thread and from there to a file (the standard
//! output, if no other) on the event loop: a file that blocks (a terminal on hold, a full pipe, a full disk)
//! costs the guest its output, which is dropped and counted, and costs the VMM nothing. Input flows only as far
//! as the port's FIFO has room.
//!
//! Input comes from another file (the standard input), or from a Unix socket to which one client at a time
//! attaches. The client gets the output as well, from a buffer of its own, and is first shown what the guest
//! wrote last.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use log::{info, warn};
use serde::{Deserialize, Serialize};
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

/// What the console is connected with.
pub struct Sink {
    /// Takes the guest's output.
    pub output: File,
    /// Gives the guest's input.
    pub input: Input,
}

/// Where the guest's input comes from.
pub enum Input {
    /// There is none.
    None,
    /// A file, named pipe or terminal.
    File(File),
    /// A client of this socket, which is shown the output as well.
    Client(ConsoleSocket),
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

/// Output that has not been taken yet.
#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Queue {
    /// Adds a byte. If there is no room, it or the oldest is dropped.
    fn push(&mut self, byte: u8, keep_newest: bool) {
        if self.bytes.len() == BUFFER {
            self.dropped += 1;
            if !keep_newest {
                return;
            }
            self.bytes.pop_front();
        }
        self.bytes.push_back(byte);
    }
}

/// The two that take output.
#[derive(Clone, Copy)]
enum Side {
    File,
    Client,
}

#[derive(Default)]
struct Pending {
    file: Queue,
    /// There where clients can attach.
    client: Option<Queue>,
}

impl Pending {
    fn queue(&mut self, side: Side) -> Option<&mut Queue> {
        match side {
            Side::File => Some(&mut self.file),
            Side::Client => self.client.as_mut(),
        }
    }
}

/// The port's output side.
struct Output {
    pending: Arc<Mutex<Pending>>,
    ready: EventFd,
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
        let empty = |queue: &Queue| queue.bytes.is_empty();
        let wake = empty(&pending.file) || pending.client.as_ref().is_some_and(empty);
        for byte in bytes {
            pending.file.push(*byte, false);
            if let Some(client) = &mut pending.client {
                client.push(*byte, true);
            }
        }
        if wake {
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

/// The event loop's side: moves bytes between the port and what it is connected with.
pub struct Console {
    port: Arc<Mutex<Port>>,
    pending: Arc<Mutex<Pending>>,
    ready: EventFd,
    room: EventFd,
    sink: Sink,
    client: Option<Client>,
    events: Option<Events>,
    /// Whether the input file, if that is what there is, still gives something.
    input_open: bool,
}

struct Client {
    stream: UnixStream,
    /// Whether it has not taken all there is for it.
    slow: bool,
    /// Whether the port has no room for what it sends.
    held: bool,
}

/// Makes the port, which raises `irq`, and the console that serves it from an event loop. Output beyond
/// `limit`, in bytes, is dropped and counted. With `saved`, the port goes on from there.
pub fn create(
    irq: EventFd,
    sink: Sink,
    limit: Option<TokenBucket>,
    saved: Option<&SerialState>,
) -> io::Result<(SerialPort, Console)> {
    let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let (ready, room) = (event()?, event()?);
    let client = matches!(sink.input, Input::Client(_)).then(Queue::default);
    let pending = Arc::new(Mutex::new(Pending { client, ..Default::default() }));
    let output = Output { pending: pending.clone(), ready: ready.try_clone()?, limit };
    let saved = saved.map_or_else(vm_superio::SerialState::default, Into::into);
    let port = Serial::from_state(&saved, Line(irq), Room(room.try_clone()?), output);
    let port = Arc::new(Mutex::new(port.map_err(io::Error::other)?));
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

/// What the port's registers hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(state: vm_superio::SerialState) -> Self {
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        }
    }
}

impl From<&SerialState> for vm_superio::SerialState {
    fn from(state: &SerialState) -> Self {
        Self {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        }
    }
}

/// What is left after some output was moved.
#[derive(PartialEq, Eq)]
enum Left {
    Nothing,
    /// What cannot be taken now.
    Blocked,
    /// What was left for the next turn.
    More,
}

/// Moves output to `to` as far as it goes without blocking, in at most `budget` writes. With an error, what was
/// left is lost.
fn drain(
    pending: &Mutex<Pending>,
    side: Side,
    to: &mut (impl Write + AsFd),
    budget: usize,
) -> io::Result<Left> {
    for _ in 0..budget {
        let chunk: Vec<u8> = match lock(pending).queue(side) {
            Some(queue) => queue.bytes.iter().take(CHUNK).copied().collect(),
            None => Vec::new(),
        };
        if chunk.is_empty() {
            return Ok(Left::Nothing);
        }
        if !writable(to.as_fd()) {
            return Ok(Left::Blocked);
        }
        let written = to.write(&chunk);
        let mut pending = lock(pending);
        let Some(queue) = pending.queue(side) else { return Ok(Left::Nothing) };
        match written {
            // The guest may have pushed out the oldest meanwhile, where the newest are kept.
            Ok(count) => _ = queue.bytes.drain(..count.min(queue.bytes.len())),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Left::Blocked),
            Err(e) => {
                queue.dropped += queue.bytes.len() as u64;
                queue.bytes.clear();
                return Err(e);
            }
        }
    }
    Ok(Left::More)
}

fn writable(fd: BorrowedFd<'_>) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    poll(&mut [PollFd::new(fd, PollFlags::POLLOUT)], PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

impl Console {
    /// Adds the console's descriptors to its event loop.
    pub fn attach(&mut self, events: Events) -> io::Result<()> {
        events.add(&self.ready, TOKEN_OUTPUT, EventSet::IN)?;
        events.add(&self.room, TOKEN_ROOM, EventSet::IN)?;
        match &self.sink.input {
            Input::Client(socket) => {
                socket.listener.set_nonblocking(true)?;
                events.add(&socket.listener, TOKEN_LISTENER, EventSet::IN)?;
            }
            // Files and /dev/null cannot be waited for; a console has no use for them as input.
            Input::File(input) => self.input_open = events.add(input, TOKEN_INPUT, EventSet::IN).is_ok(),
            Input::None => {}
        }
        self.events = Some(events);
        Ok(())
    }

    /// What the port's registers hold.
    pub fn save(&self) -> SerialState {
        lock(&self.port).state().into()
    }

    /// Writes what is left, as far as it is taken without blocking. For the end of the VM.
    pub fn finish(&mut self) {
        // What fails here was reported before, or is of no more use to anyone.
        let _ = drain(&self.pending, Side::File, &mut self.sink.output, usize::MAX);
        if let Some(client) = &mut self.client {
            let _ = drain(&self.pending, Side::Client, &mut client.stream, usize::MAX);
        }
        let dropped = lock(&self.pending).file.dropped;
        if dropped > 0 {
            warn!("serial console: {dropped} bytes of output were dropped because nothing took them");
        }
    }

    /// Moves output as far as it goes, and waits for whoever has not taken all of it.
    fn pump_output(&mut self) {
        let file = drain(&self.pending, Side::File, &mut self.sink.output, BUDGET).unwrap_or_else(|e| {
            warn!("serial console: {e}");
            Left::Nothing
        });
        if let Some(events) = &self.events {
            if file == Left::Blocked {
                let _ = events.add(&self.sink.output, TOKEN_SINK, EventSet::OUT);
            } else {
                events.remove(&self.sink.output);
            }
        }
        let mut more = file == Left::More;
        if let Some(client) = &mut self.client {
            match drain(&self.pending, Side::Client, &mut client.stream, BUDGET) {
                Ok(left) => {
                    client.slow = left == Left::Blocked;
                    more |= left == Left::More;
                    self.wait_for_client();
                }
                // It went away.
                Err(_) => self.drop_client(),
            }
        }
        if more {
            let _ = self.ready.write(1);
        }
    }

    fn wait_for_client(&self) {
        let (Some(events), Some(client)) = (&self.events, &self.client) else { return };
        let mut set = EventSet::empty();
        set.set(EventSet::IN, !client.held);
        set.set(EventSet::OUT, client.slow);
        let _ = events.modify(&client.stream, TOKEN_CLIENT, set);
    }

    fn pump_input(&mut self) {
        let capacity = lock(&self.port).fifo_capacity();
        if capacity == 0 {
            return self.hold_input(true);
        }
        let mut bytes = [0; 64];
        let want = capacity.min(bytes.len());
        let got = match (&mut self.sink.input, &mut self.client) {
            (Input::File(input), _) => input.read(&mut bytes[..want]),
            (Input::Client(_), Some(client)) => client.stream.read(&mut bytes[..want]),
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

    /// Takes no more input until there is room, or takes it again.
    fn hold_input(&mut self, hold: bool) {
        if let (Input::File(input), true, Some(events)) = (&self.sink.input, self.input_open, &self.events) {
            let set = if hold { EventSet::empty() } else { EventSet::IN };
            let _ = events.modify(input, TOKEN_INPUT, set);
        }
        if let Some(client) = &mut self.client {
            client.held = hold;
            self.wait_for_client();
        }
    }

    fn close_input(&mut self) {
        match &self.sink.input {
            Input::File(input) => {
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
            events.remove(&client.stream);
        }
    }

    fn accept(&mut self) {
        let (Input::Client(socket), Some(events)) = (&self.sink.input, &self.events) else { return };
        let Ok((stream, _)) = socket.listener.accept() else { return };
        if self.client.is_some() {
            // Closed at once: one client at a time.
            info!("serial console: a second client was refused");
            return;
        }
        if stream.set_nonblocking(true).is_ok() && events.add(&stream, TOKEN_CLIENT, EventSet::IN).is_ok() {
            self.client = Some(Client { stream, slow: false, held: false });
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
                self.hold_input(false);
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
