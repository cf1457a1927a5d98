//! What is kept of a simulated host in a directory, so that its microVMs outlive the process as real ones do: a
//! file for each, from before it exists until after it is gone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Guest;
use crate::microvm::console::ConsoleLog;
use crate::microvm::spec::{Console, Spec, furnish};

/// What of a microVM a later process needs to go on pretending.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    memory_mib: u64,
    console: Option<(PathBuf, u64)>,
    /// Whether its guest boots; one that was never told to is an unfinished start.
    started: bool,
}

/// Where microVMs are kept.
#[derive(Debug)]
pub(super) struct Directory(PathBuf);

impl Directory {
    /// Opens it, making it if need be, with what an earlier process left in it.
    pub fn open(path: PathBuf) -> io::Result<(Self, Vec<(String, Guest)>)> {
        fs::create_dir_all(&path)?;
        let mut guests = Vec::new();
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            let Ok(id) = entry.file_name().into_string() else { continue };
            // One whose file was cut short had not begun.
            let Ok(kept) = serde_json::from_slice::<Kept>(&fs::read(entry.path())?) else {
                fs::remove_file(entry.path())?;
                continue;
            };
            guests.push((id.clone(), kept.into_guest(id)));
        }
        Ok((Directory(path), guests))
    }

    /// Writes down a microVM as it is now.
    pub fn keep(&self, id: &str, guest: &Guest) -> io::Result<()> {
        let console = guest.spec.console.log.as_ref().map(|log| (log.path.clone(), log.max_bytes));
        let memory_mib = guest.spec.vm.machine.mem_size_mib;
        let kept = Kept { memory_mib, console, started: guest.started.is_some() };
        fs::write(self.path(id), serde_json::to_vec(&kept)?)
    }

    /// Forgets one that is gone.
    pub fn forget(&self, id: &str) {
        // Swept away at the next start if this fails.
        let _ = fs::remove_file(self.path(id));
    }

    fn path(&self, id: &str) -> PathBuf {
        self.0.join(Path::new(id).file_name().unwrap_or_default())
    }
}

impl Kept {
    fn into_guest(self, id: String) -> Guest {
        let log = self.console.map(|(path, max_bytes)| ConsoleLog { path, max_bytes });
        let mut spec = Spec { id, console: Console { log, attachable: true }, ..Spec::default() };
        spec.vm.machine.mem_size_mib = self.memory_mib;
        // Cannot fail for a new one; a guest without an agent is what would come of it.
        let _ = furnish(&mut spec.vm);
        let mut guest = Guest::new(spec);
        guest.driven = false;
        guest.started = self.started.then(Instant::now);
        guest
    }
}
