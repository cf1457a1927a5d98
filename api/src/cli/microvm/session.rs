//! A process in the guest, joined to our standard input and output.
//!
//! The agent's client blocks, so output is copied on one thread and input on another. The latter is left
//! behind when the process ends: it waits in a read that may never return.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;

use pulau_agent_protocol::client::{ClientError, ExecInput, OutputEvent};
use pulau_agent_protocol::message::{ExecRequest, ExitStatus, WindowSize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::escape::copy_typed;
use super::terminal::{self, RawMode};
use crate::microvm::Agent;

/// No more of each of a process's streams is kept in memory.
const MAX_CAPTURE: usize = 16 << 20;

/// What is told to a process beside its input.
enum Control {
    Resize(WindowSize),
    Signal(i32),
}

/// How a session ended.
#[derive(Debug)]
pub enum End {
    /// The process did.
    Exited(ExitStatus),
    /// The user at the terminal typed the escape.
    Left,
    /// We were told to end, by this signal, more often than a process that listens needs.
    Signalled(i32),
}

/// Signals after which a process is no longer waited for.
const ENOUGH: u32 = 3;

/// Runs `request` and joins it to our standard streams until it ends. With a terminal (`request.tty`) ours is raw
/// meanwhile, and its size is passed on. The signals `forwarded` are passed on, too; a process that does not
/// heed three of them is left.
///
/// # Errors
///
/// The process cannot be started, its guest is gone, or our input or output fails.
pub async fn join(agent: Agent, request: ExecRequest, forwarded: &[SignalKind]) -> Result<End, ClientError> {
    let interactive = request.tty.is_some();
    let local = |error: io::Error| ClientError::Local(error);
    let raw = interactive.then(RawMode::enter).transpose().map_err(local)?;
    let (controls_in, controls) = mpsc::channel();
    let (left, mut has_left) = oneshot::channel();
    let mut resized = signal(SignalKind::window_change()).map_err(local)?;
    let (signals_in, mut signals) = tokio::sync::mpsc::channel(1);
    for &kind in forwarded {
        let mut source = signal(kind).map_err(local)?;
        let signals_in = signals_in.clone();
        tokio::spawn(async move {
            while source.recv().await.is_some() && signals_in.send(kind.as_raw_value()).await.is_ok() {}
        });
    }
    let left = interactive.then_some(left);
    let mut running = tokio::task::spawn_blocking(move || run(agent, &request, controls, left));
    let (mut may_leave, mut signalled) = (interactive, 0);
    let end = loop {
        tokio::select! {
            result = &mut running => {
                let result = result.map_err(|error| ClientError::Local(io::Error::other(error)))?;
                break result.map(End::Exited);
            }
            result = &mut has_left, if may_leave => match result {
                Ok(()) => break Ok(End::Left),
                Err(_) => may_leave = false, // Standard input has ended.
            },
            _ = resized.recv(), if interactive => {
                let _ = controls_in.send(Control::Resize(terminal::size()));
            }
            Some(number) = signals.recv() => {
                signalled += 1;
                if signalled == ENOUGH {
                    break Ok(End::Signalled(number));
                }
                let _ = controls_in.send(Control::Signal(number));
            }
        }
    };
    drop(raw);
    end
}

/// See [`join`]. Blocks.
fn run(
    agent: Agent,
    request: &ExecRequest,
    controls: mpsc::Receiver<Control>,
    left: Option<oneshot::Sender<()>>,
) -> Result<ExitStatus, ClientError> {
    let exec = agent.exec(request)?;
    let input = Arc::new(Mutex::new(exec.input));
    thread::spawn({
        let input = Arc::clone(&input);
        move || {
            for control in controls {
                // If it fails, so does the output, which tells why.
                let _ = match control {
                    Control::Resize(size) => lock(&input).resize(size),
                    Control::Signal(number) => lock(&input).signal(number),
                };
            }
        }
    });
    thread::spawn(move || copy_input(&input, left));
    let mut output = exec.output;
    output.copy_to(&mut Flushing(io::stdout().lock()), &mut io::stderr().lock())
}

fn lock(input: &Mutex<ExecInput<UnixStream>>) -> std::sync::MutexGuard<'_, ExecInput<UnixStream>> {
    input.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Copies standard input to the process until either ends, or a user at a terminal wants out.
fn copy_input(input: &Mutex<ExecInput<UnixStream>>, left: Option<oneshot::Sender<()>>) {
    if copy_typed(left, |bytes| lock(input).write_all(bytes)) {
        let _ = lock(input).close();
    }
}

/// Writes through at once: a prompt has no line end.
struct Flushing<W: Write>(W);

impl<W: Write> Write for Flushing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(bytes)?;
        self.0.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// What a process wrote.
#[derive(Debug, Default)]
pub struct Captured {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// It wrote more than is kept.
    pub truncated: bool,
}

/// Runs `request` without input and keeps what it writes. Blocks.
///
/// # Errors
///
/// The process cannot be started, or its guest is gone.
pub fn capture(agent: Agent, request: &ExecRequest) -> Result<(ExitStatus, Captured), ClientError> {
    let mut output = agent.exec(request)?.output;
    let mut captured = Captured::default();
    loop {
        match output.next_event()? {
            OutputEvent::Stdout(bytes) => captured.truncated |= keep(&mut captured.stdout, bytes),
            OutputEvent::Stderr(bytes) => captured.truncated |= keep(&mut captured.stderr, bytes),
            OutputEvent::Exited(status) => return Ok((status, captured)),
        }
    }
}

/// Adds as much of `bytes` as there is room for. Returns whether some was dropped.
fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let room = MAX_CAPTURE.saturating_sub(kept.len()).min(bytes.len());
    kept.extend_from_slice(&bytes[..room]);
    room < bytes.len()
}
