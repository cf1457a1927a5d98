//! The program: what `main` does with its command line. It puts the parts together and owns the main
//! loop; everything it knows how to do itself is in what order.
//!
//! The order at the start: the jail, which everything else is to be in; log and metrics; signals; the
//! API's socket, since whoever started the process waits for it; and only then the rest. Nothing of the
//! microVM is made before it is started: no memory, no `/dev/kvm`.
//!
//! At the end, whatever the reason: the machine is dropped, which ends its threads and removes what it
//! made; metrics are written once more; the socket is removed; the code says why (see [`crate::exit`]).

mod kvm_builder;

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::api::{ApiServer, ApiSocket, ServerError, serve};
use crate::cli::Options;
use crate::config::{FullVmConfig, MetricsConfig};
use crate::control::{ControlError, Controller};
use crate::event_loop::{EventLoop, EventSet, OwnEvent};
use crate::exit::{self, ExitCode};
use crate::jail::{self, JailError};
use crate::logger::LoggerError;
use crate::metrics::{METRICS, MetricsError};
use crate::mmds::{Mmds, MmdsError};
use crate::signals::{self, EndRequests};
use crate::stop::{StopReason, StopSink};
use crate::{api, logger, metrics};
use kvm_builder::{Filters, KvmBuilder};

const TOKEN_STOP: u32 = 0;
const TOKEN_SIGNAL: u32 = 1;
const TOKEN_API: u32 = 2;

/// Why the program could not run.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Logger(#[from] LoggerError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("cannot {what}: {error}")]
    Host { what: &'static str, error: io::Error },
    #[error("{option} {path:?}: {error}")]
    Read { option: &'static str, path: PathBuf, error: io::Error },
    #[error("{option} {path:?}: {error}")]
    Json { option: &'static str, path: PathBuf, error: serde_json::Error },
    #[error("--metadata {path:?}: {error}")]
    Metadata { path: PathBuf, error: MmdsError },
    #[error("--config-file {path:?}: {error}")]
    Config { path: PathBuf, error: ControlError },
}

impl ProgramError {
    /// The code to end with.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Read { .. } | Self::Json { .. } | Self::Metadata { .. } => ExitCode::BadConfiguration,
            Self::Config { error: ControlError::Start(_), .. } => ExitCode::Error,
            Self::Config { .. } => ExitCode::BadConfiguration,
            _ => ExitCode::Error,
        }
    }
}

fn host(what: &'static str) -> impl Fn(io::Error) -> ProgramError {
    move |error| ProgramError::Host { what, error }
}

/// Is a VMM until there is a reason to end.
pub fn run(options: Options) -> Result<ExitCode, ProgramError> {
    if let Some(path) = &options.exit_file {
        exit::record_in(path).map_err(|source| JailError::ExitFile { path: path.clone(), source })?;
    }
    if let Some(config) = &options.jail {
        jail::enter(config)?;
    }
    if let Some(path) = &options.pid_file {
        jail::write_pid_file(path)?;
    }
    logger::init(&options.id);
    if let Some(config) = &options.logger {
        logger::configure(config)?;
    }
    if let Some(path) = &options.metrics_path {
        let config = MetricsConfig { metrics_path: path.clone(), ..Default::default() };
        metrics::configure(&config, &options.id)?;
    }
    if options.pci_asked_for {
        log::warn!("--enable-pci has no effect: devices are on virtio-mmio");
    }
    if !options.seccomp {
        log::warn!("--no-seccomp: a guest that takes over this process may make any system call");
    }
    signals::install().map_err(host("handle signals"))?;
    install_panic_hook();
    let socket = options.api_socket.as_deref().map(ApiSocket::bind).transpose()?;
    if let Some(path) = &options.api_socket {
        signals::remove_at_crash(path);
    }
    let result = Program::new(socket, &options).and_then(|program| program.run(&options));
    signals::restore_terminal();
    result
}

/// A panic ends the process without dropping anything. Not by aborting: in a jail the process is the first
/// of its pid namespace, which no signal of its own ends.
fn install_panic_hook() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        signals::clean_up_at_crash();
        default(info);
        metrics::flush_in_panic();
        exit::record(ExitCode::Panicked);
        // SAFETY: ends the process without running anything of it.
        unsafe { libc::_exit(i32::from(ExitCode::Panicked.code())) }
    }));
}

/// The parts, in the order in which they are dropped.
struct Program {
    controller: Controller,
    server: Option<ApiServer>,
    end_requests: EndRequests,
    stop: StopSink,
    event_loop: Rc<RefCell<EventLoop>>,
}

impl Program {
    fn new(socket: Option<ApiSocket>, options: &Options) -> Result<Self, ProgramError> {
        let event_loop = EventLoop::new().map_err(host("wait for events"))?;
        let events = event_loop.own_events();
        let event_loop = Rc::new(RefCell::new(event_loop));
        let server = match socket {
            Some(socket) => Some(ApiServer::new(socket, events.clone(), TOKEN_API, options.payload_limit)?),
            None => None,
        };
        report_start(options);
        let end_requests = EndRequests::new().map_err(host("wait for signals"))?;
        let stop = StopSink::new().map_err(host("make an event descriptor"))?;
        events.add(&end_requests, TOKEN_SIGNAL, EventSet::IN).map_err(host("wait for signals"))?;
        events.add(stop.event(), TOKEN_STOP, EventSet::IN).map_err(host("wait for events"))?;

        let mmds = Arc::new(Mutex::new(Mmds::new(options.mmds_limit)));
        let builder = KvmBuilder {
            event_loop: event_loop.clone(),
            stop: stop.clone(),
            boot_timer: options.boot_timer,
            mmds: mmds.clone(),
            filters: if options.seccomp { Filters::Ready } else { Filters::Off },
        };
        let controller = Controller::new(options.id.clone(), mmds, Box::new(builder));
        Ok(Self { controller, server, end_requests, stop, event_loop })
    }

    fn run(mut self, options: &Options) -> Result<ExitCode, ProgramError> {
        if let Some(path) = &options.metadata {
            let document = read_json("--metadata", path)?;
            let metadata_error = |error| ProgramError::Metadata { path: path.clone(), error };
            self.controller.put_metadata(document).map_err(metadata_error)?;
        }
        if let Some(path) = &options.config_file {
            let full: FullVmConfig = read_json("--config-file", path)?;
            let config_error = |error| ProgramError::Config { path: path.clone(), error };
            self.controller.load(full).map_err(config_error)?;
            self.controller.handle(api::Action::Start).map_err(config_error)?;
        }
        let code = self.main_loop()?;
        drop(self);
        if let Err(error) = metrics::flush() {
            log::error!("{error}");
        }
        Ok(code)
    }

    fn main_loop(&mut self) -> Result<ExitCode, ProgramError> {
        loop {
            let timeout = millis(metrics::flush_if_due());
            let events = self.event_loop.borrow_mut().run_once(timeout);
            for event in events.map_err(host("wait for events"))? {
                if let Some(code) = self.dispatch(&event) {
                    return Ok(code);
                }
            }
            if let Some(reason) = self.stop.reason() {
                return Ok(ending(&reason, self.controller.stop_asked_for()));
            }
        }
    }

    /// Takes an event of the program's own. The code if the process is to end.
    fn dispatch(&mut self, event: &OwnEvent) -> Option<ExitCode> {
        match event.token {
            TOKEN_SIGNAL => {
                let (signal, code) = self.end_requests.take()?;
                log::info!("The process was asked to end by {signal}.");
                Some(code)
            }
            TOKEN_STOP => None,
            token => {
                let controller = &mut self.controller;
                let mut handler =
                    |method: &str, path: &str, body: &[u8]| serve(controller, method, path, body);
                self.server.as_mut()?.process(token, &mut handler);
                None
            }
        }
    }
}

/// Logs why the machine ended and returns the code for it.
fn ending(reason: &StopReason, stop_asked_for: bool) -> ExitCode {
    match reason {
        StopReason::PowerOff => {
            log::info!("The guest powered off.");
            ExitCode::Ok
        }
        StopReason::Reset => {
            log::info!("The guest reset itself.");
            if stop_asked_for { ExitCode::Ok } else { ExitCode::GuestReboot }
        }
        StopReason::Panic => {
            log::error!("The guest's kernel panicked.");
            ExitCode::GuestPanic
        }
        StopReason::TripleFault => {
            log::error!("A vCPU shut down after a triple fault.");
            ExitCode::TripleFault
        }
        StopReason::Failure(problem) => {
            log::error!("KVM cannot go on: {problem}");
            ExitCode::KvmError
        }
    }
}

/// As `epoll_wait` takes it: rounded up, so that what is due is due.
fn millis(timeout: Option<Duration>) -> i32 {
    let millis = |timeout: Duration| timeout.as_millis().saturating_add(1);
    timeout.map_or(-1, |timeout| i32::try_from(millis(timeout)).unwrap_or(i32::MAX))
}

/// Records how long it took to get here, for starters that said when they began.
fn report_start(options: &Options) {
    let now = |clock| clock_gettime(clock).map(|t| Duration::from(t).as_micros() as u64).unwrap_or(0);
    let api = &METRICS.api_server;
    if let Some(start) = options.start_time_us {
        api.process_startup_time_us.set(now(ClockId::CLOCK_MONOTONIC).saturating_sub(start));
    }
    if let Some(start) = options.start_time_cpu_us {
        let own = now(ClockId::CLOCK_PROCESS_CPUTIME_ID).saturating_sub(start);
        let parent = options.parent_cpu_time_us.unwrap_or(0);
        api.process_startup_time_cpu_us.set(own.saturating_add(parent));
    }
}

fn read_json<T: serde::de::DeserializeOwned>(option: &'static str, path: &Path) -> Result<T, ProgramError> {
    let bytes =
        std::fs::read(path).map_err(|error| ProgramError::Read { option, path: path.to_owned(), error })?;
    serde_json::from_slice(&bytes).map_err(|error| ProgramError::Json {
        option,
        path: path.to_owned(),
        error,
    })
}

/// Writes to standard output; that it may be closed is no reason to fail.
pub fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}
