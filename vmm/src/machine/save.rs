//! A paused machine as a snapshot.

use super::Machine;
use crate::arch::vcpu_state::{StateError, VcpuState};
use crate::arch::vm_state::VmState;
use crate::config::{FullVmConfig, SnapshotCreateConfig, SnapshotType, VmConfig};
use crate::event_loop::lock;
use crate::snapshot::{self, State, state};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Why there is no snapshot. Nothing of it is left then, and what was there before is.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// KVM did not tell.
    #[error("snapshot: vCPU {index}: {source}")]
    Vcpu {
        /// Which.
        index: usize,
        /// Why not.
        source: StateError,
    },
    /// KVM did not tell.
    #[error("snapshot: {0}")]
    Vm(#[from] StateError),
    /// The configuration cannot be written.
    #[error("snapshot: configuration: {0}")]
    Config(#[from] serde_json::Error),
    /// A file cannot be written.
    #[error("snapshot: {field}: cannot write {}: {source}", .path.display())]
    File {
        /// API field.
        field: &'static str,
        /// The path given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not this kind.
    #[error("snapshot: snapshot_type Diff is not supported: use Full")]
    Diff,
}

impl Machine {
    /// Writes a snapshot of the machine, which is paused and was made as `config` says.
    pub(super) fn save(&self, request: &SnapshotCreateConfig, config: &VmConfig) -> Result<(), SaveError> {
        if request.snapshot_type == SnapshotType::Diff {
            return Err(SaveError::Diff);
        }
        let state = self.state(config)?;
        let error = |field, path: &Path, source| SaveError::File { field, path: path.to_owned(), source };
        let memory_error = |source| error("mem_file_path", &request.mem_file_path, source);
        let state_error = |source| error("snapshot_path", &request.snapshot_path, source);
        let memory = Unfinished::create(&request.mem_file_path).map_err(memory_error)?;
        let mut file = Unfinished::create(&request.snapshot_path).map_err(state_error)?;
        snapshot::memory::write_full(&self.memory, &memory.file).map_err(memory_error)?;
        snapshot::file::write(&state, &mut file.file).map_err(|e| state_error(io::Error::other(e)))?;
        memory.finish().map_err(memory_error)?;
        file.finish().map_err(state_error)
    }

    fn state(&self, config: &VmConfig) -> Result<State, SaveError> {
        let read = |(index, vcpu): (usize, &crate::vcpu::Vcpu)| {
            VcpuState::read(&vcpu.fd(), self.vm.msrs()).map_err(|source| SaveError::Vcpu { index, source })
        };
        let vcpus = self.vcpus.iter().enumerate().map(read).collect::<Result<_, _>>()?;
        Ok(State {
            made_by: env!("CARGO_PKG_VERSION").to_owned(),
            config: serde_json::to_string(&FullVmConfig::from(config))?,
            memory: state::regions(&self.memory),
            vm: VmState::read(self.vm.fd())?,
            vcpus,
            transports: self.transports.iter().map(|transport| transport.save()).collect(),
            balloon: self.devices.balloon().map(|balloon| lock(balloon).save()),
            serial: lock(&self.console).save(),
            keyboard: self.keyboard.save(),
            acpi: self.acpi,
        })
    }
}

/// A file that is written beside its place: machines may be running on what is there.
struct Unfinished {
    file: File,
    beside: PathBuf,
    path: PathBuf,
    finished: bool,
}

impl Unfinished {
    fn create(path: &Path) -> io::Result<Self> {
        let mut beside = path.as_os_str().to_owned();
        beside.push(".part");
        let beside = PathBuf::from(beside);
        let mut options = OpenOptions::new();
        // Read too, as whoever maps it does.
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        Ok(Self { file, beside, path: path.to_owned(), finished: false })
    }

    fn finish(mut self) -> io::Result<()> {
        std::fs::rename(&self.beside, &self.path)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.beside);
        }
    }
}
