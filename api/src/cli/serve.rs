//! `pulau serve`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use super::connection::default_socket;
use crate::instances::{Limits, physical};
use crate::microvm::sim::Simulation;
use crate::microvm::{Host, Machines};
use crate::programs;
use crate::serve::{Config, serve};
use crate::tls;

/// Run the daemon: it keeps instances, and serves the API that every other command is a client of.
///
/// It stops at SIGTERM or Ctrl-C; its instances run on, and the next daemon takes them over.
///
/// Whoever can open the Unix socket may do everything; over TCP, requests need a token (`pulau token create`).
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau serve
  pulau serve --listen 127.0.0.1:8020
  pulau serve --listen 0.0.0.0:8020 --tls-cert host.pem --tls-key host.key
  pulau serve --cpu-overcommit 8
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
    /// Certificate for --listen, and those that sign it: PEM. Read again when it changes, and at SIGHUP.
    #[arg(long, value_name = "FILE", requires = "tls_key", requires = "listen")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate: PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// vCPUs all instances may have together, instead of what --cpu-overcommit comes to.
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    /// Memory all instances may have together, such as 64G, instead of what --memory-overcommit comes to.
    #[arg(long, value_name = "SIZE")]
    memory: Option<super::microvm::MemoryArg>,
    /// vCPUs that instances may have for each processor of the host.
    #[arg(long, value_name = "RATIO", default_value_t = 4.0, value_parser = ratio, conflicts_with = "vcpus")]
    cpu_overcommit: f64,
    /// Memory that instances may have for all the host has but a tenth. Above 1, the host may run out of memory and
    /// kill some of them.
    #[arg(long, value_name = "RATIO", default_value_t = 1.0, value_parser = ratio, conflicts_with = "memory")]
    memory_overcommit: f64,
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
    /// With --simulate: give the host's network its taps and rules all the same. For tests.
    #[arg(long, hide = true, requires = "simulate")]
    simulate_network: bool,
    /// How long a terminated instance stays visible, in seconds. For tests.
    #[arg(long, hide = true, value_name = "SECONDS", default_value_t = 3600)]
    forget_after: u64,
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
        let kept = data_dir.join("simulated");
        let simulation = Simulation::kept_in(kept.clone());
        Machines::Simulated(
            simulation.with_context(|| format!("cannot keep microVMs in {}", kept.display()))?,
        )
    } else {
        Machines::Host(Host {
            vmm: programs::vmm()?,
            run_dir: data_dir.join("run"),
            cgroup_parent: PathBuf::from("/sys/fs/cgroup/pulau"),
        })
    };
    let memory_mib = match args.memory {
        Some(memory) => memory.mib(),
        None => {
            let host = physical().memory_mib;
            anyhow::ensure!(host > 0, "cannot tell how much memory the host has: give --memory");
            // A float's conversion to an integer saturates.
            (host as f64 * 0.9 * args.memory_overcommit) as u64
        }
    };
    let vcpus = args.vcpus.unwrap_or_else(|| (f64::from(physical().vcpus) * args.cpu_overcommit) as u32);
    let certificate = args.tls_cert.clone().zip(args.tls_key.clone());
    Ok(Config {
        data_dir,
        socket: std::path::absolute(args.socket.clone().unwrap_or_else(default_socket))?,
        listen: args.listen,
        tls: certificate.map(|(certificate, key)| tls::Files { certificate, key }),
        limits: Limits {
            vcpus,
            memory_mib,
            stop_within: Duration::from_secs(args.stop_timeout),
            check_every: Duration::from_secs(args.check_interval),
            terminated_visible: Duration::from_secs(args.forget_after),
            ..Limits::default()
        },
        machines,
        // Without it everything works but the import of container images, which says so.
        agent: programs::agent().ok(),
        connected: !args.no_network && (!args.simulate || args.simulate_network),
        jailed: !args.no_jail && !args.simulate,
    })
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio: &f64| (0.1..=64.0).contains(ratio));
    ratio.ok_or_else(|| "must be a number from 0.1 to 64".to_owned())
}

/// The log goes to standard error; `PULAU_LOG` says how much of it, as `info` or `pulau::http=debug`.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("PULAU_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
