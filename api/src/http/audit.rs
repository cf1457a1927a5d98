//! The audit log: who asked for what, when, and what came of it, for every request that may change something or
//! leads into a guest. Refused ones are in it, too.
//!
//! One JSON document a line, in `logs/audit.jsonl` of the data directory, readable by the daemon's user alone. When it
//! is large it becomes `audit.jsonl.1`, and so on; the oldest goes.

use std::fs::{File, OpenOptions, rename};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use chrono::{DateTime, Utc};
use serde::Serialize;

/// A file is set aside when it is larger, in bytes.
const LARGE: u64 = 16 << 20;
/// Files that were set aside and are kept.
const KEPT: u32 = 4;

/// One request.
#[derive(Debug, Serialize)]
pub struct Entry<'a> {
    pub time: DateTime<Utc>,
    /// As in the answer's `x-request-id`.
    pub request_id: &'a str,
    /// A token's name, `local` for the Unix socket, `-` if it is not known who it was.
    pub caller: &'a str,
    pub method: &'a str,
    /// Without what is behind a `?`.
    pub path: &'a str,
    pub status: u16,
    /// Of the error, if it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'a str>,
    pub took_ms: u64,
}

/// See the module's text.
pub struct Audit {
    path: PathBuf,
    file: Mutex<Option<(File, u64)>>,
}

impl Audit {
    /// A log at this place. It is made when there is something to write.
    pub fn new(path: PathBuf) -> Self {
        Audit { path, file: Mutex::new(None) }
    }

    /// Writes an entry. What cannot be written goes to the daemon's log.
    pub fn write(&self, entry: &Entry) {
        let mut line = serde_json::to_vec(entry).unwrap_or_default();
        line.push(b'\n');
        if let Err(error) = self.append(&line) {
            let line = String::from_utf8_lossy(&line);
            tracing::error!("the audit log {} cannot be written: {error}; {line}", self.path.display());
        }
    }

    fn append(&self, line: &[u8]) -> io::Result<()> {
        let mut open = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut file, length) = match open.take() {
            Some((_, length)) if length >= LARGE => {
                self.set_aside()?;
                self.open()?
            }
            Some(open) => open,
            None => self.open()?,
        };
        file.write_all(line)?;
        *open = Some((file, length.saturating_add(line.len() as u64)));
        Ok(())
    }

    fn open(&self) -> io::Result<(File, u64)> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
        let length = file.metadata()?.len();
        Ok((file, length))
    }

    fn set_aside(&self) -> io::Result<()> {
        for number in (1..KEPT).rev() {
            match rename(self.aside(number), self.aside(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        rename(&self.path, self.aside(1))
    }

    fn aside(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_log_is_set_aside_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        for round in 0..7 {
            let file = File::options().create(true).append(true).open(&path).unwrap();
            file.set_len(LARGE).unwrap();
            let audit = Audit::new(path.clone());
            // The first opens it, and the second finds it large.
            audit.append(b"first\n").unwrap();
            audit.append(format!("{round}\n").as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "6\n");
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(
            names,
            ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.3", "audit.jsonl.4"]
        );
    }
}
