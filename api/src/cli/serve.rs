//! `pulau serve`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use super::connection::default_socket;
use crate::instances::Limits;
use crate::microvm::sim::Simulation;
use crate::microvm::{Host, Machines};
use crate::programs;
use crate::serve::{Config, serve};

/// Run the daemon: it keeps instances, and serves the API that every other command is a client of.
///
/// It stops at SIGTERM or Ctrl-C; its instances run on, and the next daemon takes them over.
///
/// Whoever can open the Unix socket may do everything; over TCP, requests need a token (`pulau token create`).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau serve
  pulau serve --listen 127.0.0.1:8020
  pulau serve --data-dir /srv/pulau --socket /srv/pulau/api.sock --vcpus 128 --memory 64G
  PULAU_LOG=debug pulau serve")]
pub struct Args {
    /// Where Pulau keeps its data.
    #[arg(long, value_name = "DIR", env = "PULAU_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Unix socket for local clients.
    #[arg(long, value_name = "PATH", env = "PULAU_SOCKET")]
    socket: Option<PathBuf>,
    /// TCP address for clients with tokens, such as 127.0.0.1:8020; none if not given.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// vCPUs all instances may have together; four for each processor if not given.
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Memory all instances may have together, such as 64G; nine tenths of the host's if not given.
    #[arg(long, value_name = "SIZE")]
    memory: Option<super::microvm::MemoryArg>,
    /// How long a guest may take to stop before it is killed, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    stop_timeout: u64,
    /// Between two looks at whether an instance answers, in seconds. Three in vain, and it is impaired.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, env = "PULAU_CHECK_INTERVAL", value_parser = clap::value_parser!(u64).range(1..))]
    check_interval: u64,
    /// Run VMMs without a jail, as the daemon's user, for development. Needs only /dev/kvm.
    #[arg(long)]
    no_jail: bool,
    /// Give instances no network.
    #[arg(long)]
    no_network: bool,
    /// Run no microVMs at all, only pretend to: to try the API out, or to measure it.
    #[arg(long)]
    simulate: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    start_log();
    let config = config(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_timeout(Duration::from_secs(5));
    result.map(|()| ExitCode::SUCCESS)
}

fn config(args: &Args) -> anyhow::Result<Config> {
    let data_dir = args.data_dir.clone().unwrap_or_else(crate::default_data_dir);
    let data_dir = std::path::absolute(data_dir)?;
    let machines = if args.simulate {
        Machines::Simulated(Simulation::new())
    } else {
        Machines::Host(Host {
            vmm: programs::vmm()?,
            run_dir: data_dir.join("run"),
            cgroup_parent: PathBuf::from("/sys/fs/cgroup/pulau"),
        })
    };
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
    let memory_mib = match args.memory {
        Some(memory) => memory.mib(),
        None => {
            host_memory_mib().context("cannot tell how much memory the host has: give --memory")? / 10 * 9
        }
    };
    Ok(Config {
        data_dir,
        socket: std::path::absolute(args.socket.clone().unwrap_or_else(default_socket))?,
        listen: args.listen,
        limits: Limits {
            vcpus: args.vcpus.unwrap_or_else(|| processors.saturating_mul(4)),
            memory_mib,
            stop_within: Duration::from_secs(args.stop_timeout),
            check_every: Duration::from_secs(args.check_interval),
            ..Limits::default()
        },
        machines,
        // Without it everything works but the import of container images, which says so.
        agent: programs::agent().ok(),
        connected: !args.no_network && !args.simulate,
        jailed: !args.no_jail && !args.simulate,
    })
}

fn host_memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// The log goes to standard error; `PULAU_LOG` says how much of it, as `info` or `pulau::http=debug`.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PULAU_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
