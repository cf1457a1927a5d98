//! The command line: what each subcommand takes, and how the program ends.
//!
//! Conventions, the same for every command:
//!
//! - What was asked for goes to standard output; progress, hints and errors go to standard error.
//! - `--json` prints one JSON document instead of text for people.
//! - Exit code 0: done. 1: it failed, or the answer is no. 2: the command line was wrong.
//! - An error is one line that says what was being done and why it failed, then what to do, if known.

mod completion;
mod connection;
mod doctor;
mod group;
mod host;
mod image;
mod instance;
mod key_pair;
mod load_balancer;
mod manual;
mod microvm;
mod network;
mod progress;
mod resource;
mod security_group;
mod serve;
mod snapshot;
mod table;
mod token;
mod volume;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A small cloud on one Linux host: microVMs as instances, functions and tasks.
#[derive(Debug, Parser)]
#[command(name = "pulau", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "Start with `pulau doctor`, which tells whether this host can run microVMs.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Args),
    Instance(instance::Args),
    Group(group::Args),
    LoadBalancer(load_balancer::Args),
    Image(image::Args),
    Volume(volume::Args),
    Snapshot(snapshot::Args),
    KeyPair(key_pair::Args),
    Network(network::Args),
    SecurityGroup(security_group::Args),
    Token(token::Args),
    Host(host::Args),
    Doctor(doctor::Args),
    Microvm(microvm::Args),
    Completion(completion::Args),
    /// Print the OpenAPI document of the HTTP API, which the daemon serves at /openapi.json.
    #[command(
        hide = true,
        after_help = "Examples:
  pulau openapi > api/openapi.json"
    )]
    Openapi,
    Manual(manual::Args),
}

/// Parses the command line, runs the command, and returns the process's exit code.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::Instance(args) => instance::run(&args),
        Command::Group(args) => group::run(&args),
        Command::LoadBalancer(args) => load_balancer::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Volume(args) => volume::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::KeyPair(args) => key_pair::run(&args),
        Command::Network(args) => network::run(&args),
        Command::SecurityGroup(args) => security_group::run(&args),
        Command::Token(args) => token::run(&args),
        Command::Host(args) => host::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Microvm(args) => microvm::run(&args),
        Command::Completion(args) => completion::run(&args),
        Command::Manual(args) => manual::run(&args),
        Command::Openapi => print_json(&crate::http::openapi()).map(|()| ExitCode::SUCCESS),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pulau: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Writes to standard output. A reader that has gone (`pulau … | head`) is not an error.
fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

/// Writes `value` as indented JSON and a newline to standard output.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }

    /// Every command, and every one below one that takes arguments.
    #[test]
    fn every_command_has_examples() {
        fn check(command: &clap::Command, path: &str) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let example = format!("  {path}");
            assert!(help.contains(&example), "`{path}` has no example of itself in its help");
            for below in command.get_subcommands() {
                let takes_something = below.get_arguments().next().is_some();
                if below.has_subcommands() || takes_something {
                    check(below, &format!("{path} {}", below.get_name()));
                }
            }
        }
        super::Cli::command().get_subcommands().for_each(|c| check(c, &format!("pulau {}", c.get_name())));
    }
}
