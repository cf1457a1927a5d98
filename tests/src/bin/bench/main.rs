//! The benchmarks: `scripts/bench boot|devices|network|density|instances`.
//!
//! Each figure is taken for `pulau-vmm` and, where `PULAU_BENCH_OTHER` names the program of another VMM
//! that speaks the same API, for that one in turn, run by run, so that what the machine does meanwhile
//! meets both. Reported are medians, and the ratio of the first column to the second (ours to theirs) of each
//! pair of runs: its median, and the quartiles as its spread. Nothing here passes or fails.

mod boot;
mod density;
mod devices;
mod instances;
mod measure;
mod network;
mod report;
mod vmm;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
Usage: bench boot|devices|network|density|instances [--runs N] [--json FILE]

  boot      process start to API, InstanceStart to the guest's init by phase, memory beyond the guest's
  devices   block throughput and latency at queue depth 1 and 32, by fio in the guest and on the host
  network   TCP throughput each way by iperf3, round trips by ping; the same over the host's loopback
  density   boots per second, one by one and side by side; idle microVMs in a given memory
  instances request to agent by phase, beside a bare VMM; the API with 1000 simulated instances

Environment: PULAU_BIN_DIR, PULAU_TEST_KERNEL, PULAU_TEST_ROOTFS_MINIMAL, PULAU_TEST_ROOTFS_BENCH (set by
scripts/bench);
PULAU_BENCH_OTHER: program of another VMM with the same API, to be measured beside ours.";

/// What was asked for on the command line.
struct Options {
    what: String,
    runs: Option<usize>,
    json: Option<String>,
}

fn parse() -> Result<Options> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().context(USAGE)?;
    let mut options = Options { what, runs: None, json: None };
    while let Some(argument) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{argument} needs a value\n{USAGE}"))?;
        match argument.as_str() {
            "--runs" => options.runs = Some(value.parse().context("--runs takes a number")?),
            "--json" => options.json = Some(value),
            _ => bail!("unknown argument {argument}\n{USAGE}"),
        }
    }
    Ok(options)
}

fn run() -> Result<()> {
    let options = parse()?;
    let contenders = vmm::contenders()?;
    let report = match options.what.as_str() {
        "boot" => boot::run(&contenders, options.runs.unwrap_or(15))?,
        "devices" => devices::run(&contenders, options.runs.unwrap_or(5))?,
        "network" => network::run(&contenders, options.runs.unwrap_or(5))?,
        "instances" => instances::run(&contenders, options.runs.unwrap_or(50))?,
        "density" => density::run(&contenders, options.runs.unwrap_or(3))?,
        other => bail!("unknown benchmark {other}\n{USAGE}"),
    };
    print!("{}", report.table());
    if let Some(path) = options.json {
        std::fs::write(&path, report.json()).with_context(|| format!("cannot write {path}"))?;
        println!("written to {path}");
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}
