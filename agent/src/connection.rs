//! One connection: the hello, then requests one after another. Whatever goes wrong here ends this
//! connection and nothing else.

use std::io;
use std::time::Duration;

use pulau_agent_protocol::frame::{self, Decoder, Kind};
use pulau_agent_protocol::message::{AgentHello, ClientHello, ErrorCode, ErrorReply, Reply, Request};
use pulau_agent_protocol::{MAX_VERSION, MIN_VERSION};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::agent::{self, Agent};
use crate::listen::Socket;
use crate::refusal::bad_request;
use crate::{exec, files, health, net, system};

/// How long a connection may be silent before its hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The host is gone, or the transport failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// To be told to the host before closing.
    #[error(transparent)]
    Refused(#[from] ErrorReply),
}

/// Serves a connection to its end.
pub fn serve(socket: &Socket, agent: &Agent) {
    match requests(socket, agent) {
        Ok(()) => {}
        Err(Ended::Refused(error)) => refuse(socket, &error),
        // The decoder's errors come as I/O errors; the host may yet want to know.
        Err(Ended::Io(e)) if e.kind() == io::ErrorKind::InvalidData => {
            refuse(socket, &bad_request(e.to_string()));
        }
        // The host went away, which it may do at any time.
        Err(Ended::Io(_)) => {}
    }
}

/// Tells the host why its connection is about to be closed, if it still listens.
pub fn refuse(socket: &Socket, error: &ErrorReply) {
    let _ = send(socket, Kind::Error, error);
}

/// Sends a JSON message.
///
/// # Errors
/// Those of the socket.
pub fn send(mut socket: &Socket, kind: Kind, message: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    frame::write(&mut socket, kind, &json)
}

/// Reads a JSON payload.
///
/// # Errors
/// `bad_request`, saying what the parser stumbled over.
pub fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, ErrorReply> {
    serde_json::from_slice(payload).map_err(|e| bad_request(e.to_string()))
}

fn requests(mut socket: &Socket, agent: &Agent) -> Result<(), Ended> {
    let mut decoder = Decoder::new();
    socket.set_read_timeout(Some(HELLO_TIMEOUT))?;
    match decoder.read(&mut socket)? {
        None => return Ok(()),
        Some((Kind::Hello, payload)) => {
            let version = choose_version(&parse(payload)?)?;
            let hello = AgentHello { version, agent: agent::NAME.to_owned(), role: agent.role };
            send(socket, Kind::Hello, &hello)?;
        }
        Some((kind, _)) => return Err(bad_request(format!("{kind:?} before the hello")).into()),
    }
    socket.set_read_timeout(None)?;
    loop {
        let request = match decoder.read(&mut socket)? {
            None => return Ok(()),
            Some((Kind::Request, payload)) => parse(payload)?,
            Some((kind, _)) => return Err(bad_request(format!("{kind:?} where a request belongs")).into()),
        };
        let outcome = match request {
            Request::Exec(request) => return exec::serve(socket, decoder, &request, agent),
            Request::CopyIn(request) => return files::copy_in(socket, decoder, &request),
            Request::CopyOut(request) => return files::copy_out(socket, &request),
            Request::Health => health::report(agent).map(Reply::Health),
            Request::SetTime(time) => system::set_time(time).map(|()| Reply::Done),
            Request::ConfigureNetwork(config) => net::configure(&config).map(|()| Reply::Done),
            Request::Resumed(resumed) => system::resumed(agent, &resumed).map(|()| Reply::Done),
            Request::Shutdown(shutdown) => match system::plan_shutdown(agent, shutdown) {
                Ok(plan) => {
                    // Answered first: afterwards there may be nobody to.
                    send(socket, Kind::Reply, &Reply::Done)?;
                    plan.carry_out();
                    return Ok(());
                }
                Err(error) => Err(error),
            },
        };
        match outcome {
            Ok(reply) => send(socket, Kind::Reply, &reply)?,
            Err(error) => send(socket, Kind::Error, &error)?,
        }
    }
}

fn choose_version(hello: &ClientHello) -> Result<u32, ErrorReply> {
    let version = hello.max_version.min(MAX_VERSION);
    if version < hello.min_version || version < MIN_VERSION {
        return Err(ErrorReply::new(
            ErrorCode::UnsupportedVersion,
            format!(
                "the host speaks protocol versions {} to {}, this agent {MIN_VERSION} to {MAX_VERSION}",
                hello.min_version, hello.max_version
            ),
        ));
    }
    Ok(version)
}
