//! Running processes for a host: one connection, one thread, one process.
//!
//! `spawn` starts it, `pump` carries bytes and messages until it or the host is done (`input` keeps
//! standard input's books), and `end` sees to it that nothing of it is left when the host goes first.

mod end;
mod input;
mod pump;
mod spawn;

use pulau_agent_protocol::STDIN_WINDOW;
use pulau_agent_protocol::frame::{Decoder, Kind};
use pulau_agent_protocol::message::{ErrorCode, ErrorReply, ExecEvent, ExecRequest};

use crate::agent::Agent;
use crate::connection::{Ended, send};
use crate::listen::Socket;

pub use spawn::DEFAULT_PATH;

/// Processes run for hosts at once.
const MAX_EXECS: u32 = 1000;

/// Answers a request to run a process, to its end.
///
/// # Errors
/// The process could not be started, the connection failed, or the host broke the protocol; there is no
/// process left in any of these cases.
pub fn serve(socket: &Socket, decoder: Decoder, request: &ExecRequest, agent: &Agent) -> Result<(), Ended> {
    let _counted = agent.execs.enter(MAX_EXECS).ok_or_else(|| {
        ErrorReply::new(ErrorCode::Busy, format!("{MAX_EXECS} processes are running for hosts"))
    })?;
    let mut child = spawn::start(request, agent.role)?;
    let started = ExecEvent::Started { pid: child.process.id(), stdin_window: STDIN_WINDOW as u32 };
    let outcome = match send(socket, Kind::Event, &started) {
        Ok(()) => pump::run(socket, decoder, &mut child),
        Err(e) => Err(e.into()),
    };
    if !child.reaped {
        end::terminate(child);
    }
    outcome
}
