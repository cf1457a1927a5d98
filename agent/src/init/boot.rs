//! The boot, step by step, with the time of each phase. What is on the way to "ready" is here and nowhere
//! else; keep it short.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::time::{ClockId, clock_gettime};
use pulau_agent_protocol::boot::{BootOptions, Init};
use pulau_agent_protocol::message::{BootPhase, Role};

use super::supervise::{restore_signals, signals};
use super::{boot_timer, first_boot, modules, mounts, overlay};
use crate::agent::Agent;
use crate::listen::{Address, Listener};
use crate::{logging, net, system};

/// A guest that has been set up.
pub struct Booted {
    pub agent: Agent,
    /// `None` if there is nothing to listen on; the console is then the only way in.
    pub listener: Option<Listener>,
    pub options: BootOptions,
}

/// Open files for a guest's processes at most; the kernel's own default, 4096, is too few for servers.
const OPEN_FILES: u64 = 524_288;

/// Sets the guest up. Does not return if the command line names another init.
pub fn boot(signals_before: &SigSet) -> Booted {
    let mut boot = Boot { agent: Agent::new(Role::Init) };
    mounts::early(&mut |why| boot.problem(why));
    logging::to_kmsg();
    let (options, wrong) = match fs::read_to_string("/proc/cmdline") {
        Ok(cmdline) => BootOptions::parse(&cmdline),
        Err(e) => (BootOptions::default(), vec![format!("/proc/cmdline: {e}")]),
    };
    if options.boot_timer {
        boot.attempt("boot timer", boot_timer::stop());
    }
    boot.phase("init");
    wrong.into_iter().for_each(|why| boot.problem(why));

    boot.attempt("drivers", modules::load());
    if let Some(wanted) = &options.overlay {
        boot.attempt("overlay", overlay::set_up(wanted));
        boot.phase("overlay");
    }
    mounts::late(&mut |why| boot.problem(why));
    // Refused where PID 1 is not the machine's; the limit that was given is then good enough.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 1024, OPEN_FILES);
    boot.phase("mounts");

    if let Some(name) = options.hostname.clone().or_else(system::own_hostname) {
        boot.attempt("hostname", system::set_hostname(&name));
    }
    boot.attempt("network", net::loopback_up());
    for config in &options.network {
        boot.attempt("network", net::configure(config));
    }
    boot.phase("network");

    if let Some(instance) = &options.instance
        && boot.attempt("first boot", first_boot::run(instance)) == Some(true)
    {
        boot.phase("first-boot");
    }
    if let Some(init) = options.init.as_ref().and_then(program) {
        let why = hand_over(init, signals_before);
        boot.problem(format!("pulau.init={init}: {why}"));
    }
    let address = match options.listen.as_deref().map(str::parse) {
        None => Address::default(),
        Some(Ok(address)) => address,
        Some(Err(why)) => {
            boot.problem(format!("pulau.listen: {why}"));
            Address::default()
        }
    };
    let listener = Listener::bind(&address);
    let listener = boot.attempt(&format!("listen on {address}"), listener);
    boot.phase("ready");
    Booted { agent: boot.agent, listener, options }
}

/// systemd, and what it has where the agent is its service.
const SYSTEMD: &str = "/lib/systemd/systemd";
const SERVICE: &str = "/usr/lib/systemd/system/pulau-agent.service";

/// The program to become; none if the agent is to stay.
fn program(init: &Init) -> Option<&str> {
    match init {
        Init::Program(path) => Some(path),
        // Without the service nobody would ever reach the agent.
        Init::Auto => {
            [SYSTEMD, SERVICE].iter().all(|file| fs::exists(file).unwrap_or(false)).then_some(SYSTEMD)
        }
    }
}

/// Becomes the other init; returns why that failed.
fn hand_over(init: &str, signals_before: &SigSet) -> io::Error {
    let same = |a: io::Result<Metadata>, b: io::Result<Metadata>| {
        a.is_ok_and(|a| b.is_ok_and(|b| (a.dev(), a.ino()) == (b.dev(), b.ino())))
    };
    if same(fs::metadata(init), fs::metadata("/proc/self/exe")) {
        return io::Error::other("is the agent itself");
    }
    restore_signals(signals_before);
    let error = Command::new(init).exec();
    let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals()), None);
    error
}

struct Boot {
    agent: Agent,
}

impl Boot {
    fn phase(&mut self, name: &str) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map_or(0, |t| t.tv_sec() * 1_000_000 + t.tv_nsec() / 1000);
        self.agent.boot.push(BootPhase { phase: name.to_owned(), at_us: u64::try_from(now).unwrap_or(0) });
    }

    fn problem(&mut self, why: String) {
        log::error!("boot: {why}");
        self.agent.problems.push(why);
    }

    fn attempt<T, E: std::fmt::Display>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|e| self.problem(format!("{what}: {e}"))).ok()
    }
}
