//! Makes machines over KVM, for the controller.

use std::cell::RefCell;
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, IntoRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use crate::config::{
    ConfigError, HugePages, MemBackendType, SerialConfig, SnapshotHugePages, SnapshotLoadConfig, VmConfig,
};
use crate::control::{self, MachineBuilder, StartError};
use crate::devices::serial::{ConsoleSocket, Input, Sink};
use crate::event_loop::EventLoop;
use crate::jail;
use crate::machine::{Machine, Resources};
use crate::memory::{self, Memory, MemoryError};
use crate::mmds::SharedMmds;
use crate::seccomp::{self, Thread};
use crate::signals;
use crate::snapshot;
use crate::stop::StopSink;

/// Why a machine could not be started, before it came to building it.
#[derive(Debug, thiserror::Error)]
enum StartFailure {
    #[error("machine-config: mem_size_mib {mem_size_mib} is more than this host's memory, {host_mib} MiB")]
    Memory { mem_size_mib: u64, host_mib: u64 },
    #[error("snapshot_path {path:?}: {error}")]
    State { path: PathBuf, error: Box<dyn Error + Send + Sync> },
    #[error("mem_backend {path:?}: {error}")]
    MemoryFile { path: PathBuf, error: MemoryError },
    #[error(transparent)]
    Backend(ConfigError),
    #[error("mem_backend: backend_type Uffd is not supported: use File")]
    Uffd,
    #[error("huge_pages: memory in 2 MiB pages cannot be a mapping of a file: use None")]
    HugeFile,
    #[error("cannot open /dev/kvm: {0}")]
    Kvm(io::Error),
    #[error("serial: serial_out_path {path:?}: {error}")]
    SerialOutput { path: PathBuf, error: io::Error },
    #[error("serial: socket_path {path:?}: {error}")]
    SerialSocket { path: PathBuf, error: io::Error },
    #[error("cannot filter system calls: {0}")]
    Filter(io::Error),
    #[error("the console cannot use standard input and output: {0}")]
    Console(io::Error),
}

/// Makes machines over KVM, in the program's event loop.
pub(super) struct KvmBuilder {
    pub event_loop: Rc<RefCell<EventLoop>>,
    pub stop: StopSink,
    pub boot_timer: bool,
    pub mmds: SharedMmds,
    pub filters: Filters,
}

/// System call filters of the threads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Filters {
    /// There are none.
    Off,
    /// There will be.
    Ready,
    /// The main thread is under its first.
    Setup,
}

impl Filters {
    /// From here on, files of the guest's owner are read.
    fn set_up(&mut self) -> io::Result<()> {
        if *self == Self::Ready {
            seccomp::apply(Thread::Setup)?;
            *self = Self::Setup;
        }
        Ok(())
    }

    fn vcpu(self) -> fn() -> io::Result<()> {
        if self == Self::Off { || Ok(()) } else { || seccomp::apply(Thread::Vcpu) }
    }

    /// From here on, the guest runs.
    fn run(self) -> io::Result<()> {
        if self == Self::Off { Ok(()) } else { seccomp::apply(Thread::Vmm) }
    }
}

impl MachineBuilder for KvmBuilder {
    fn start(&mut self, config: &VmConfig) -> Result<Box<dyn control::Machine>, StartError> {
        let machine = self.make(config, |resources| Ok(Machine::build(config, resources)?))?;
        machine.run();
        Ok(Box::new(machine))
    }

    fn load(
        &mut self,
        request: &SnapshotLoadConfig,
    ) -> Result<(Box<dyn control::Machine>, VmConfig), StartError> {
        let fail = |failure: StartFailure| StartError(failure.into());
        self.set_up_filters()?;
        let wrong = |error: Box<dyn Error + Send + Sync>| {
            fail(StartFailure::State { path: request.snapshot_path.clone(), error })
        };
        let state = snapshot::file::read(&request.snapshot_path).map_err(|error| wrong(error.into()))?;
        let mut config = state.configuration().map_err(|error| wrong(error.into()))?;
        request.apply(&mut config).map_err(|error| StartError(error.into()))?;
        let memory = map_memory(request, &config).map_err(fail)?;
        let machine = self.make(&config, |resources| {
            Ok(Machine::restore(&state, &config, memory, request.clock_realtime, resources)?)
        })?;
        Ok((Box::new(machine), config))
    }
}

impl KvmBuilder {
    fn set_up_filters(&mut self) -> Result<(), StartError> {
        self.filters.set_up().map_err(|error| StartError(StartFailure::Filter(error).into()))
    }

    /// Has `make` make the machine of `config`, and leaves nothing if it cannot.
    fn make(
        &mut self,
        config: &VmConfig,
        make: impl FnOnce(Resources) -> Result<Machine, Box<dyn Error + Send + Sync>>,
    ) -> Result<Machine, StartError> {
        self.set_up_filters()?;
        let subscribers = self.event_loop.borrow().subscribers();
        let made = self.build(config, make);
        match &made {
            Ok(_) => {
                // Its own from now on: before, what is at these paths may be somebody else's.
                let console = config.serial.as_ref().and_then(|serial| serial.socket_path.as_deref());
                let vsock = config.vsock.as_ref().map(|vsock| vsock.uds_path.as_path());
                console.into_iter().chain(vsock).for_each(signals::remove_at_crash);
            }
            // What of the machine had come as far as the event loop goes with it.
            Err(_) => self.event_loop.borrow_mut().unsubscribe_from(subscribers),
        }
        made
    }

    fn build(
        &self,
        config: &VmConfig,
        make: impl FnOnce(Resources) -> Result<Machine, Box<dyn Error + Send + Sync>>,
    ) -> Result<Machine, StartError> {
        let fail = |failure: StartFailure| StartError(failure.into());
        check_memory(config.machine.mem_size_mib).map_err(fail)?;
        let console = console(config.serial.as_ref()).map_err(fail)?;
        let uses_terminal = matches!(console.input, Input::File(_));
        let kvm = open_kvm().map_err(StartFailure::Kvm).map_err(fail)?;
        let resources = Resources {
            kvm: &kvm,
            event_loop: &mut self.event_loop.borrow_mut(),
            stop: self.stop.clone(),
            boot_timer: self.boot_timer,
            console,
            mmds: self.mmds.clone(),
            prepare_vcpu: self.filters.vcpu(),
        };
        let machine = make(resources).map_err(StartError)?;
        if uses_terminal {
            signals::raw_terminal().map_err(StartFailure::Console).map_err(fail)?;
        }
        self.filters.run().map_err(StartFailure::Filter).map_err(fail)?;
        Ok(machine)
    }
}

/// Memory out of the snapshot's file.
fn map_memory(request: &SnapshotLoadConfig, config: &VmConfig) -> Result<Arc<Memory>, StartFailure> {
    let backend = request.backend().map_err(StartFailure::Backend)?;
    let path = &backend.backend_path;
    if backend.backend_type == MemBackendType::Uffd {
        return Err(StartFailure::Uffd);
    }
    let huge = match request.huge_pages {
        SnapshotHugePages::Snapshot => config.machine.huge_pages,
        SnapshotHugePages::None => HugePages::None,
        SnapshotHugePages::Transparent => HugePages::Transparent,
        SnapshotHugePages::Hugetlbfs2M => HugePages::Hugetlbfs2M,
    };
    if huge == HugePages::Hugetlbfs2M {
        return Err(StartFailure::HugeFile);
    }
    let error = |error| StartFailure::MemoryFile { path: path.clone(), error };
    let file = File::open(path).map_err(|e| {
        error(MemoryError::Map { size_mib: config.machine.mem_size_mib, huge: false, source: e })
    })?;
    Ok(Arc::new(memory::map(&file, config.machine.mem_size_mib).map_err(error)?))
}

/// Guests may together be promised more memory than there is, but none alone.
fn check_memory(mem_size_mib: u64) -> Result<(), StartFailure> {
    let Some(info) = memory::of_host() else { return Ok(()) };
    let host_mib = info.totalram.saturating_mul(info.mem_unit.into()) >> 20;
    if mem_size_mib > host_mib {
        return Err(StartFailure::Memory { mem_size_mib, host_mib });
    }
    Ok(())
}

fn open_kvm() -> io::Result<Kvm> {
    let fd = jail::devices::kvm()?.into_raw_fd();
    // SAFETY: the descriptor is that of /dev/kvm and nobody else's.
    Ok(unsafe { <Kvm as std::os::fd::FromRawFd>::from_raw_fd(fd) })
}

/// What the configuration connects the console with; the process's own input and output where it says nothing.
fn console(config: Option<&SerialConfig>) -> Result<Sink, StartFailure> {
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    let file = config.and_then(|config| config.serial_out_path.as_deref());
    let output = match file {
        Some(path) => {
            open_output(path).map_err(|error| StartFailure::SerialOutput { path: path.to_owned(), error })?
        }
        None => own(io::stdout().as_fd()).map_err(StartFailure::Console)?,
    };
    let input = match config.and_then(|config| config.socket_path.as_deref()) {
        Some(path) => {
            let error = |error| StartFailure::SerialSocket { path: path.to_owned(), error };
            let socket = ConsoleSocket::bind(path).map_err(error)?;
            Input::Client(socket)
        }
        None if file.is_some() => Input::None,
        // In the background of a terminal, keys are the shell's: waiting for them here would take some away.
        None if signals::input_is_anothers() => Input::None,
        None => Input::File(own(io::stdin().as_fd()).map_err(StartFailure::Console)?),
    };
    Ok(Sink { output, input })
}

/// Opens a file to append to, made if missing, or a named pipe, which need not have a reader yet.
fn open_output(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK);
    options.open(path)
}
