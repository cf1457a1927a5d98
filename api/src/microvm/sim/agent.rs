//! The agent in a simulated guest, at the other end of a socket pair, on a thread of its own as long as the
//! connection lasts.
//!
//! It says how it is, keeps files, ends the guest, and "runs" commands: the output is the command's words in a
//! line, and then all of standard input; the exit code is that of a last word of digits after `exit`, else 0. A test
//! may say otherwise ([`Simulation::on_command`]).

use std::io;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use pulau_agent_protocol::frame::{self, Decoder, Kind, MAX_DATA};
use pulau_agent_protocol::message::{
    AgentHello, BootPhase, CopyIn, CopyOut, ErrorReply, ExecEvent, ExecRequest, ExitStatus, FileInfo, Health,
    Reply, Request, Role, ShutdownAction,
};
use pulau_agent_protocol::{ErrorCode, MAX_VERSION, STDIN_WINDOW};
use serde::Serialize;

use super::{At, Guest, How, POWER_OFF, REBOOT, Simulation};
use crate::microvm::guest::Reach;

/// Threads here do little.
const STACK: usize = 256 << 10;

/// The way into one guest.
#[derive(Debug)]
pub(super) struct Door {
    sim: Simulation,
    id: String,
}

impl Door {
    pub fn new(sim: &Simulation, id: &str) -> Self {
        Door { sim: sim.clone(), id: id.to_owned() }
    }

    /// Whether somebody in the guest would answer now.
    fn answers(&self) -> bool {
        let takes = self.sim.lock().times.agent;
        let up = |guest: &mut Guest| {
            let running = !guest.paused && guest.ended.borrow().is_none();
            running && guest.started.is_some_and(|started| started.elapsed() >= takes)
        };
        self.sim.of(&self.id, up).unwrap_or(false)
    }
}

impl Reach for Door {
    fn has_agent(&self) -> bool {
        self.sim.of(&self.id, |guest| guest.spec.vm.vsock.is_some()).unwrap_or(false)
    }

    fn agent(&self, _deadline: Instant) -> Result<UnixStream, String> {
        if !self.answers() {
            return Err("nothing in the guest listens".into());
        }
        let silent = match self.sim.fault(At::Agent, &self.id) {
            Some(How::Fail(message)) => return Err(message),
            fault => fault.is_some(),
        };
        let (ours, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
        let agent =
            Agent { sim: self.sim.clone(), id: self.id.clone(), stream: ours, decoder: Decoder::new() };
        let serve = move || if silent { agent.wait() } else { agent.serve() };
        let thread = thread::Builder::new().stack_size(STACK).spawn(move || drop(serve()));
        thread.map_err(|e| e.to_string())?;
        Ok(theirs)
    }

    /// A console that repeats what is typed.
    fn console(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let echo = move || io::copy(&mut &ours, &mut &ours);
        thread::Builder::new().stack_size(STACK).spawn(move || drop(echo()))?;
        Ok(theirs)
    }
}

struct Agent {
    sim: Simulation,
    id: String,
    stream: UnixStream,
    decoder: Decoder,
}

impl Agent {
    /// Never answers; ends with the connection.
    fn wait(mut self) -> io::Result<()> {
        while self.decoder.fill(&mut self.stream)? > 0 {}
        Ok(())
    }

    fn serve(mut self) -> io::Result<()> {
        let agent = "simulated agent".to_owned();
        if self.receive()?.is_some() {
            self.send(Kind::Hello, &AgentHello { version: MAX_VERSION, agent, role: Role::Init })?;
        }
        while let Some((Kind::Request, bytes)) = self.receive()? {
            match serde_json::from_slice(&bytes)? {
                Request::Exec(request) => return self.exec(&request),
                Request::CopyIn(file) => return self.copy_in(file),
                Request::CopyOut(CopyOut { path }) => return self.copy_out(&path),
                Request::Health => {
                    let health = Reply::Health(self.health());
                    self.send(Kind::Reply, &health)?;
                }
                Request::Shutdown(shutdown) => {
                    self.send(Kind::Reply, &Reply::Done)?;
                    let exit = match shutdown.action {
                        ShutdownAction::PowerOff => POWER_OFF,
                        ShutdownAction::Reboot => REBOOT,
                    };
                    self.sim.end(&self.id, exit);
                }
                Request::SetTime(_) | Request::ConfigureNetwork(_) | Request::Resumed(_) => {
                    self.send(Kind::Reply, &Reply::Done)?;
                }
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<Option<(Kind, Vec<u8>)>> {
        let frame = self.decoder.read(&mut self.stream)?;
        Ok(frame.map(|(kind, bytes)| (kind, bytes.to_vec())))
    }

    fn send(&mut self, kind: Kind, message: &impl Serialize) -> io::Result<()> {
        frame::write(&mut self.stream, kind, &serde_json::to_vec(message)?)
    }

    fn send_data(&mut self, kind: Kind, data: &[u8]) -> io::Result<()> {
        data.chunks(MAX_DATA).try_for_each(|chunk| frame::write(&mut self.stream, kind, chunk))
    }

    fn health(&self) -> Health {
        let look = |guest: &mut Guest| {
            let uptime = guest.started.map_or(Duration::ZERO, |started| started.elapsed());
            (uptime, guest.spec.vm.machine.mem_size_mib.saturating_mul(1 << 20), guest.cpu.load)
        };
        let (uptime, memory, load) = self.sim.of(&self.id, look).unwrap_or_default();
        Health {
            id: Some(self.id.clone()),
            hostname: self.id.clone(),
            uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
            load: [load; 3],
            memory_total: memory,
            memory_available: memory / 2,
            execs: 0,
            boot: vec![BootPhase { phase: "ready".into(), at_us: 0 }],
            problems: Vec::new(),
        }
    }

    fn exec(&mut self, request: &ExecRequest) -> io::Result<()> {
        let stdin_window = u32::try_from(STDIN_WINDOW).unwrap_or(u32::MAX);
        self.send(Kind::Event, &ExecEvent::Started { pid: 2, stdin_window })?;
        let commands = self.sim.lock().commands.clone();
        let (text, code) =
            commands.and_then(|commands| commands.0(&self.id, &request.argv)).unwrap_or_else(|| {
                let line = request.argv.join(" ");
                let code = line.rsplit_once("exit ").and_then(|(_, code)| code.trim().parse().ok());
                (line + "\n", code.unwrap_or(0))
            });
        self.send_data(Kind::Stdout, text.as_bytes())?;
        if request.stdin {
            self.echo()?;
        }
        self.send(Kind::Event, &ExecEvent::Exited { status: ExitStatus::Code(code) })
    }

    /// Gives standard input back as output, to its end.
    fn echo(&mut self) -> io::Result<()> {
        loop {
            match self.receive()? {
                Some((Kind::Stdin, bytes)) if !bytes.is_empty() => {
                    let taken = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    self.send(Kind::Event, &ExecEvent::StdinTaken { bytes: taken })?;
                    self.send_data(Kind::Stdout, &bytes)?;
                }
                Some((Kind::Control, _)) => {}
                _ => return Ok(()),
            }
        }
    }

    fn copy_in(&mut self, file: CopyIn) -> io::Result<()> {
        self.send(Kind::Reply, &Reply::Ready)?;
        let mut content = Vec::new();
        while let Some((Kind::FileData, bytes)) = self.receive()? {
            content.extend_from_slice(&bytes);
        }
        if content.len() as u64 != file.size {
            let error =
                ErrorReply::new(ErrorCode::Truncated, format!("{}: not its announced size", file.path));
            return self.send(Kind::Error, &error);
        }
        self.sim.of(&self.id, |guest| guest.files.insert(file.path, content));
        self.send(Kind::Reply, &Reply::Done)
    }

    fn copy_out(&mut self, path: &str) -> io::Result<()> {
        let Some(content) = self.sim.of(&self.id, |guest| guest.files.get(path).cloned()).flatten() else {
            let error = ErrorReply::new(ErrorCode::NotFound, format!("{path}: no such file"));
            return self.send(Kind::Error, &error);
        };
        let info = FileInfo { size: content.len() as u64, mode: 0o644, uid: 0, gid: 0, mtime: 0 };
        self.send(Kind::Reply, &Reply::File(info))?;
        self.send_data(Kind::FileData, &content)?;
        frame::write(&mut self.stream, Kind::FileEnd, &[])
    }
}
