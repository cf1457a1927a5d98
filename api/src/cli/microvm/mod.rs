//! `pulau microvm`: single microVMs, without the daemon.

mod console;
pub(super) mod escape;
mod outcome;
pub(super) mod run;
pub(super) mod session;
mod spec;
pub(super) mod terminal;

pub use spec::MemoryArg;

use std::process::ExitCode;

/// Boot single microVMs, without the daemon.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau microvm run --kernel vmlinux --rootfs rootfs.erofs            a shell in a microVM
  pulau microvm run --kernel vmlinux --rootfs rootfs.erofs -- uname -a")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Run(Box<run::Args>),
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Run(args) => run::run(args),
    }
}
