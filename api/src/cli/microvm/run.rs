//! `pulau microvm run`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use pulau_agent_protocol::client::ClientError;
use pulau_agent_protocol::message::{BootPhase, ExecRequest, ExitStatus};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::session::{self, Captured, End};
use super::terminal;
use super::{console, outcome, spec::MachineArgs};
use crate::cli::print_json;
use crate::microvm::{Ending, GuestError, Host, MicroVm, Spec, Stop, sweep};
use crate::programs;

/// Exit code where the command's own is not known: the microVM failed, not the command.
const MICROVM_FAILED: u8 = 125;
/// From the command's end to the VMM's, for the guest to stop its services and write its disks.
const GRACE: Duration = Duration::from_secs(10);
/// Time for a VMM whose guest broke off to say why.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(2);

/// Boot a microVM, run a command or a shell in it, and remove it again.
///
/// The VMM is jailed: own user, namespaces, file tree, control group and system call filter. The guest needs
/// Pulau's agent, as the images that `images/build` makes have it.
///
/// On a terminal and without a command, this is an interactive shell; `~.` at the beginning of a line kills a
/// microVM that no longer answers. Ctrl-C elsewhere, SIGTERM and SIGHUP stop it in an orderly way; a second one
/// kills it. Whatever happens, nothing of it is left on the host.
///
/// Exit code: the command's; 125 if the microVM failed; 128 and the signal's number if stopped by one.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau microvm run --kernel vmlinux --rootfs debian.ext4 --cpus 2 --memory 1G
  pulau microvm run --kernel vmlinux --rootfs minimal.erofs -- uname -a
  echo 'ls /' | pulau microvm run --kernel vmlinux --rootfs minimal.erofs
  pulau microvm run --kernel vmlinux --rootfs minimal.erofs --drive data.img --drive tools.img:ro
  pulau microvm run --kernel vmlinux --rootfs minimal.erofs --json -- cat /proc/meminfo")]
pub struct Args {
    #[command(flatten)]
    machine: MachineArgs,
    /// Set an environment variable for the command.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = environment)]
    env: Vec<(String, String)>,
    /// Run the command as this user of the guest: a name or number, `user:group`.
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// Run the command in this directory of the guest.
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
    /// Give the command a terminal, as the shell gets one without a command.
    #[arg(long, short, conflicts_with = "json")]
    tty: bool,
    /// Show the guest's console on standard error.
    #[arg(long)]
    console: bool,
    /// Print how long each phase of the boot took, on standard error.
    #[arg(long)]
    boot_times: bool,
    /// Print one JSON document with exit code, output and boot times. Without a command, only boots.
    #[arg(long)]
    json: bool,
    /// How long the guest may take to boot, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    boot_timeout: u64,
    /// Where Pulau keeps its data.
    #[arg(long, value_name = "DIR", env = "PULAU_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// The command and its arguments; without one, a shell.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub fn environment(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".into()),
    }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let result = prepare(args).and_then(|(host, spec)| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(live(args, host, spec));
        // Threads that still wait for standard input are not waited for.
        runtime.shutdown_background();
        result
    });
    // The command's exit code could be 1 as well.
    result.or_else(|error| {
        eprintln!("pulau: {error:#}");
        Ok(ExitCode::from(MICROVM_FAILED))
    })
}

fn prepare(args: &Args) -> anyhow::Result<(Host, Spec)> {
    let spec = args.machine.spec()?;
    let data_dir = args.data_dir.clone().unwrap_or_else(crate::default_data_dir);
    let host = Host {
        vmm: programs::vmm()?,
        // Not the daemon's: it and we would sweep away each other's.
        run_dir: std::path::absolute(data_dir)?.join("adhoc"),
        cgroup_parent: PathBuf::from("/sys/fs/cgroup/pulau"),
    };
    Ok((host, spec))
}

/// What came of the guest's part.
enum Work {
    /// The command ended.
    Done(ExitStatus),
    /// It ended and what it wrote was kept (`--json`); None if there was no command.
    Captured(Option<(ExitStatus, Captured)>),
    /// The user left the terminal.
    Left,
}

/// The microVM's life from sweeping up after others to its removal.
async fn live(args: &Args, host: Host, spec: Spec) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let run_dir = host.run_dir.clone();
    match tokio::task::spawn_blocking(move || sweep(&run_dir)).await? {
        Ok(swept) if swept.is_empty() => {}
        Ok(swept) => eprintln!("pulau: removed what was left of {}", swept.join(", ")),
        Err(e) => eprintln!("pulau: cannot remove what was left of others: {e}"),
    }
    let vm = MicroVm::create(host, spec);
    let mut phases = Vec::new();
    let worked = {
        let _console = args.console.then(|| {
            let vm = vm.clone();
            AbortOnDrop(tokio::spawn(async move { console::follow(&vm).await }))
        });
        tokio::select! {
            biased;
            number = signals.next() => Err(number),
            result = work(args, &vm, &mut phases) => Ok(result),
        }
    };
    // Before the end: the VMM's log goes with it.
    let times = vm.times();
    let how = match &worked {
        Ok(Ok(Work::Left)) => Stop::Force,
        _ => Stop::Orderly { grace: GRACE },
    };
    let ending = tokio::select! {
        ending = vm.stop(how) => ending,
        _ = signals.next() => vm.stop(Stop::Force).await,
    };
    if let Some(error) = &ending.left_behind {
        eprintln!("pulau: not everything of microVM {} could be removed: {error}", vm.id());
    }
    let result = match worked {
        Err(number) => return Ok(ExitCode::from(128 + number)),
        Ok(result) => result.map_err(|e| e.context(format!("microVM {}", vm.id()))),
    };
    if args.boot_times {
        eprint!("{}", outcome::boot_table(&times, &phases));
    }
    match result? {
        Work::Done(status) => Ok(exit_code(status)),
        Work::Left => Ok(ExitCode::from(128 + libc::SIGKILL as u8)),
        Work::Captured(command) => {
            let code = command.as_ref().map_or(ExitCode::SUCCESS, |(status, _)| exit_code(*status));
            print_json(&outcome::Outcome::new(vm.id(), times, &phases, command))?;
            Ok(code)
        }
    }
}

/// Waits for the guest and runs the command in it.
async fn work(args: &Args, vm: &MicroVm, phases: &mut Vec<BootPhase>) -> anyhow::Result<Work> {
    let agent = match vm.agent(Duration::from_secs(args.boot_timeout)).await {
        Ok(agent) => agent,
        Err(GuestError::Ended(ending)) => return Err(failure(&ending)),
        Err(error @ GuestError::TimedOut { .. }) => {
            let ending = vm.stop(Stop::Force).await;
            return Err(with_last_words(&error.to_string(), &ending));
        }
        Err(error) => return Err(error.into()),
    };
    let mut agent = agent;
    if args.boot_times || args.json {
        let health = tokio::task::spawn_blocking(move || agent.health().map(|health| (agent, health)));
        let (connection, health) = health.await?.context("asking the guest how it is")?;
        for problem in &health.problems {
            eprintln!("pulau: the guest reports: {problem}");
        }
        *phases = health.boot;
        agent = connection;
    }
    let interactive = !args.json && (args.tty || args.command.is_empty()) && terminal::is_interactive();
    let request = request(args, interactive);
    if args.json {
        if args.command.is_empty() {
            return Ok(Work::Captured(None));
        }
        let run = tokio::task::spawn_blocking(move || session::capture(agent, &request));
        return match run.await? {
            Ok(result) => Ok(Work::Captured(Some(result))),
            Err(error) => Err(explain(vm, error).await),
        };
    }
    match session::join(agent, request, &[]).await {
        Ok(End::Exited(status)) => Ok(Work::Done(status)),
        Ok(End::Left | End::Signalled(_)) => Ok(Work::Left),
        Err(error) => Err(explain(vm, error).await),
    }
}

fn request(args: &Args, interactive: bool) -> ExecRequest {
    let mut env: BTreeMap<String, String> = args.env.iter().cloned().collect();
    if interactive && let Ok(term) = std::env::var("TERM") {
        env.entry("TERM".into()).or_insert(term);
    }
    let shell = || vec!["/bin/sh".to_owned()];
    ExecRequest {
        argv: if args.command.is_empty() { shell() } else { args.command.clone() },
        env,
        clear_env: false,
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        tty: interactive.then(terminal::size),
        stdin: !args.json,
    }
}

/// Why a session broke off. If that is because its microVM ended, how it did.
async fn explain(vm: &MicroVm, error: ClientError) -> anyhow::Error {
    if matches!(error, ClientError::Disconnected | ClientError::Io(_))
        && let Ok(ending) = tokio::time::timeout(LAST_WORDS_WITHIN, vm.ended()).await
    {
        return failure(&ending);
    }
    error.into()
}

/// A microVM's end as an error.
fn failure(ending: &Ending) -> anyhow::Error {
    with_last_words(&ending.reason.to_string(), ending)
}

/// A message, followed by what console and log said last.
fn with_last_words(message: &str, ending: &Ending) -> anyhow::Error {
    anyhow::anyhow!("{}", format!("{message}\n{}", outcome::last_words(ending)).trim_end().to_owned())
}

pub fn exit_code(status: ExitStatus) -> ExitCode {
    ExitCode::from(u8::try_from(status.shell_code()).unwrap_or(u8::MAX))
}

/// The signals that end a run.
struct Signals([(u8, Signal); 3]);

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Signals([
            (libc::SIGINT as u8, signal(SignalKind::interrupt())?),
            (libc::SIGTERM as u8, signal(SignalKind::terminate())?),
            (libc::SIGHUP as u8, signal(SignalKind::hangup())?),
        ]))
    }

    /// The number of the next of them.
    async fn next(&mut self) -> u8 {
        let [(a, interrupt), (b, terminate), (c, hangup)] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => *a,
            _ = terminate.recv() => *b,
            _ = hangup.recv() => *c,
        }
    }
}

/// A task that ends with its handle.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
