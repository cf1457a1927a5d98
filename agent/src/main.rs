//! The guest side of Pulau. As PID 1 it sets the guest up, serves hosts, and ends it in good order; with
//! `--service` it only serves, under another init. What it serves is the protocol of
//! `pulau-agent-protocol`; see `agent/README.md` for what it does at boot.

mod agent;
mod connection;
mod exec;
mod files;
mod health;
mod init;
mod listen;
mod logging;
mod net;
mod procfs;
mod refusal;
mod system;
mod users;

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use pulau_agent_protocol::message::Role;

use crate::agent::Agent;
use crate::listen::{Address, Listener};

const USAGE: &str = "\
pulau-agent: the guest side of Pulau

  as PID 1                                   set up the guest, then serve hosts
  pulau-agent --service [--listen ADDRESS]   serve hosts, under another init
  pulau-agent --version | --help

ADDRESS is vsock:PORT (vsock:1024 if left out) or unix:/path.

Examples:
  pulau-agent --service                              in a guest whose init is systemd
  pulau-agent --service --listen unix:/tmp/agent     to try the protocol without a guest";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run();
    }
    match parse(std::env::args_os().skip(1)) {
        Ok(Command::Print(text)) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Command::Service(address)) => {
            logging::to_stderr();
            let error = match Listener::bind(&address) {
                Ok(listener) => listen::serve(&listener, &Arc::new(Agent::new(Role::Service))),
                Err(e) => e,
            };
            log::error!("{address}: {error}");
            ExitCode::FAILURE
        }
        Err(why) => {
            eprintln!("pulau-agent: {why}\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

enum Command {
    Service(Address),
    Print(String),
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let mut service = false;
    let mut address = Address::default();
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--service") => service = true,
            Some("--listen") => {
                let value = args.next().ok_or("--listen needs an address")?;
                address = value.to_str().ok_or("--listen: not UTF-8")?.parse()?;
            }
            Some("--version") => return Ok(Command::Print(agent::NAME.to_owned())),
            Some("--help") => return Ok(Command::Print(USAGE.to_owned())),
            _ => return Err(format!("unknown argument {arg:?}")),
        }
    }
    if service { Ok(Command::Service(address)) } else { Err("not PID 1: --service is needed".to_owned()) }
}
