//! `pulau manual`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::CommandFactory;

/// Write manual pages, one for each command, into a directory.
#[derive(Debug, clap::Args)]
#[command(
    hide = true,
    after_help = "Examples:
  pulau manual target/man"
)]
pub struct Args {
    /// Made if it is not there.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let cannot = || format!("cannot write manual pages to {}", args.dir.display());
    std::fs::create_dir_all(&args.dir).with_context(cannot)?;
    clap_mangen::generate_to(super::Cli::command(), &args.dir).with_context(cannot)?;
    Ok(ExitCode::SUCCESS)
}
