//! `pulau completion`

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use super::print;

/// Print a completion script for a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  source <(pulau completion bash)                              for this shell
  pulau completion bash > /etc/bash_completion.d/pulau         for every bash
  pulau completion zsh > \"${fpath[1]}/_pulau\"                  for every zsh
  pulau completion fish > ~/.config/fish/completions/pulau.fish")]
pub struct Args {
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "pulau", &mut script);
    print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}
