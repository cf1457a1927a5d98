//! `pulau doctor`

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};

use super::{print, print_json};
use crate::doctor::{CHECKS, Context, examine, probe_kvm_in_this_process, select};

/// Check whether this host can run microVMs, and say what to do where it cannot.
///
/// Every requirement is reported as ok, degraded (microVMs run, with less) or missing (they do not run as
/// they should), with a remedy. Each is checked by using it; for KVM that means running a small guest.
///
/// Exit code: 0 if nothing is missing, 1 if something is.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau doctor                      everything, as a table
  pulau doctor --json               the same for programs
  pulau doctor --check kvm --quiet  only the exit code: does KVM work, and is it real?")]
pub struct Args {
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    /// Make only these checks: a name from the report, or the part before its dash (`kvm`).
    #[arg(long = "check", value_name = "NAME", value_delimiter = ',')]
    checks: Vec<String>,
    /// Print nothing; the exit code is the answer.
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
    /// Where Pulau keeps its data.
    #[arg(long, value_name = "DIR", env = "PULAU_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Run the KVM test guest in this very process and print what it showed (used by the check itself).
    #[arg(long, hide = true)]
    run_kvm_probe: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.run_kvm_probe {
        let answer = probe_kvm_in_this_process().map_err(|e| e.to_string());
        print(&serde_json::to_string(&answer)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let checks = match select(&args.checks) {
        Ok(checks) => checks,
        Err(unknown) => {
            let names: Vec<_> = CHECKS.iter().map(|check| check.name).collect();
            bail!("there is no check named `{unknown}`; the checks are: {}", names.join(", "));
        }
    };
    let probe_binary = std::env::current_exe().context("cannot find this program's own file")?;
    let data_dir = args.data_dir.clone().unwrap_or_else(crate::default_data_dir);
    let report = examine(&checks, &Context { data_dir, probe_binary });
    if args.json {
        print_json(&report)?;
    } else if !args.quiet {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        print(&report.table(colour))?;
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
