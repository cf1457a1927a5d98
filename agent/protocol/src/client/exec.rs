//! The host's side of a running process: standard input, signals and window sizes go in by
//! [`ExecInput`], output and the exit status come out of [`ExecOutput`], so that two threads can do both
//! at once. Dropping [`ExecOutput`] ends the connection, and with it the process.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::{ClientError, Connection, Stream, Wire};
use crate::frame::{self, Kind, MAX_DATA};
use crate::message::{ExecControl, ExecEvent, ExecRequest, ExitStatus, Request, WindowSize};

/// A started process.
#[derive(Debug)]
pub struct Exec<S: Stream> {
    /// Process id in the guest.
    pub pid: u32,
    pub input: ExecInput<S>,
    pub output: ExecOutput<S>,
}

/// Everything a process said and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// What [`ExecOutput::next_event`] saw.
#[derive(Debug, PartialEq, Eq)]
pub enum OutputEvent<'a> {
    Stdout(&'a [u8]),
    Stderr(&'a [u8]),
    /// Last event.
    Exited(ExitStatus),
}

/// Standard input and control of a process. Writing blocks while the process is behind with reading by
/// more than a window, and fails with `BrokenPipe` once it reads no more. Dropping it ends the input.
#[derive(Debug)]
pub struct ExecInput<S: Stream> {
    stream: S,
    credit: Arc<Credit>,
    ended: bool,
}

/// Output and exit of a process.
#[derive(Debug)]
pub struct ExecOutput<S: Stream> {
    wire: Wire<S>,
    credit: Arc<Credit>,
}

/// How much standard input may be sent: shared by the half that sends and the half that is told.
#[derive(Debug)]
struct Credit {
    state: Mutex<CreditState>,
    changed: Condvar,
}

#[derive(Debug)]
struct CreditState {
    bytes: usize,
    closed: bool,
}

impl Credit {
    fn lock(&self) -> MutexGuard<'_, CreditState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grant(&self, bytes: u32) {
        let mut state = self.lock();
        state.bytes = state.bytes.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
        self.changed.notify_all();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until something may be sent and takes at most `wanted` of it; `None` once closed.
    fn take(&self, wanted: usize) -> Option<usize> {
        let mut state = self.lock();
        while state.bytes == 0 && !state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return None;
        }
        let taken = wanted.min(state.bytes);
        state.bytes -= taken;
        Some(taken)
    }
}

impl<S: Stream> Connection<S> {
    /// Starts a process. The connection's deadline covers the start; after it there is none.
    ///
    /// # Errors
    /// [`ClientError::Agent`] if it cannot be started; `not_found` covers program, user and directory.
    pub fn exec(self, request: &ExecRequest) -> Result<Exec<S>, ClientError> {
        let mut wire = self.wire;
        wire.send(Kind::Request, &Request::Exec(request.clone()))?;
        let ExecEvent::Started { pid, stdin_window } = wire.expect(Kind::Event)? else {
            return Err(ClientError::Protocol("no started event".to_owned()));
        };
        wire.set_deadline(None)?;
        let window = usize::try_from(stdin_window).unwrap_or(usize::MAX);
        let state = CreditState { bytes: window, closed: !(request.stdin || request.tty.is_some()) };
        let credit = Arc::new(Credit { state: Mutex::new(state), changed: Condvar::new() });
        let input = ExecInput { stream: wire.stream.try_clone()?, credit: credit.clone(), ended: false };
        Ok(Exec { pid, input, output: ExecOutput { wire, credit } })
    }

    /// Runs a process to its end with this standard input, and collects its output in memory.
    ///
    /// # Errors
    /// As [`exec`](Self::exec), and those of the connection while it runs.
    pub fn output(self, request: &ExecRequest, stdin: &[u8]) -> Result<Output, ClientError> {
        let request = ExecRequest { stdin: !stdin.is_empty(), ..request.clone() };
        let exec = self.exec(&request)?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let status = exec.run(stdin, &mut stdout, &mut stderr)?;
        Ok(Output { status, stdout, stderr })
    }
}

impl<S: Stream> Exec<S> {
    /// Copies standard input and output until the process ends. Returns only when `stdin` has reached
    /// its end or an error too: for a terminal, which may never, use the two halves.
    ///
    /// # Errors
    /// [`ClientError::Local`] if `stdout` or `stderr` cannot be written (the process is then ended), and
    /// those of the connection. That the process did not read all its input is no error.
    pub fn run(
        self,
        mut stdin: impl Read + Send,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<ExitStatus, ClientError> {
        let Self { mut input, mut output, .. } = self;
        thread::scope(|scope| {
            scope.spawn(move || {
                // Not an error: a process may end or close its input before it has read everything.
                let _ = io::copy(&mut stdin, &mut input);
            });
            let result = output.copy_to(stdout, stderr);
            // Wakes the copying thread if it waits to send.
            drop(output);
            result
        })
    }
}

impl<S: Stream> ExecInput<S> {
    /// Sends a signal (its Linux number, 1 to 64) to the process group of the process.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn signal(&mut self, signal: i32) -> Result<(), ClientError> {
        self.control(&ExecControl::Signal { signal })
    }

    /// Gives the terminal another size.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn resize(&mut self, size: WindowSize) -> Result<(), ClientError> {
        self.control(&ExecControl::WindowSize(size))
    }

    /// Ends standard input: the process reads all that was sent, then its end. With a terminal, its
    /// end-of-file character is sent. Signals and window sizes can still follow.
    ///
    /// # Errors
    /// Those of the connection.
    pub fn close(&mut self) -> Result<(), ClientError> {
        if !self.ended {
            self.ended = true;
            frame::write(&mut self.stream, Kind::Stdin, &[])?;
        }
        Ok(())
    }

    fn control(&mut self, control: &ExecControl) -> Result<(), ClientError> {
        let json = serde_json::to_vec(control).map_err(|e| ClientError::Local(e.into()))?;
        Ok(frame::write(&mut self.stream, Kind::Control, &json)?)
    }
}

impl<S: Stream> Write for ExecInput<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if self.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let taken = self.credit.take(buf.len().min(MAX_DATA)).ok_or(io::ErrorKind::BrokenPipe)?;
        frame::write(&mut self.stream, Kind::Stdin, &buf[..taken])?;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl<S: Stream> Drop for ExecInput<S> {
    fn drop(&mut self) {
        // If the connection is gone, so is the process and its input.
        let _ = self.close();
    }
}

impl<S: Stream> ExecOutput<S> {
    /// Waits for the next thing the process says or does.
    ///
    /// # Errors
    /// Those of the connection: the process is then no longer known about, and the agent ends it.
    pub fn next_event(&mut self) -> Result<OutputEvent<'_>, ClientError> {
        loop {
            if let kind @ (Kind::Stdout | Kind::Stderr) = self.wire.wait()? {
                let (_, bytes) = self.wire.receive()?;
                return Ok(if kind == Kind::Stdout {
                    OutputEvent::Stdout(bytes)
                } else {
                    OutputEvent::Stderr(bytes)
                });
            }
            match self.wire.expect(Kind::Event)? {
                ExecEvent::StdinTaken { bytes } => self.credit.grant(bytes),
                ExecEvent::StdinClosed => self.credit.close(),
                ExecEvent::Exited { status } => {
                    self.credit.close();
                    return Ok(OutputEvent::Exited(status));
                }
                ExecEvent::Started { .. } => return Err(ClientError::Protocol("started twice".to_owned())),
            }
        }
    }

    /// Copies all output until the process ends.
    ///
    /// # Errors
    /// [`ClientError::Local`] if a writer fails; else as [`next_event`](Self::next_event).
    pub fn copy_to(
        &mut self,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<ExitStatus, ClientError> {
        loop {
            match self.next_event()? {
                OutputEvent::Stdout(bytes) => stdout.write_all(bytes).map_err(ClientError::Local)?,
                OutputEvent::Stderr(bytes) => stderr.write_all(bytes).map_err(ClientError::Local)?,
                OutputEvent::Exited(status) => {
                    stdout.flush().map_err(ClientError::Local)?;
                    stderr.flush().map_err(ClientError::Local)?;
                    return Ok(status);
                }
            }
        }
    }
}

impl<S: Stream> Drop for ExecOutput<S> {
    fn drop(&mut self) {
        self.credit.close();
        // The other half holds the same connection: without this, the agent would not see it end.
        let _ = self.wire.stream.shutdown();
    }
}
