//! A guest's console kept in a file that does not grow without bound.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A file that a guest's console is appended to, by one microVM after another. Its directory must be one that
/// no guest or other user writes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleLog {
    pub path: PathBuf,
    /// Once it is larger, it becomes the file of its name with `.1` added, in place of the one before, and
    /// begins anew. It is looked at now and then, so it may become larger by what a guest writes meanwhile.
    pub max_bytes: u64,
}

impl ConsoleLog {
    /// The file where what is older is.
    pub fn rotated(&self) -> PathBuf {
        let mut name = OsString::from(&self.path);
        name.push(".1");
        name.into()
    }

    fn is_full(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|meta| meta.len() > self.max_bytes)
    }

    /// Opens it for a VMM.
    pub(super) fn open(&self) -> io::Result<File> {
        if self.is_full() {
            fs::rename(&self.path, self.rotated())?;
        }
        open_log(&self.path)
    }

    /// Keeps it within its bound while a VMM writes to it. What the VMM writes at this moment may be lost.
    pub(super) fn bound(&self) -> io::Result<()> {
        if !self.is_full() {
            return Ok(());
        }
        // The VMM holds this very file, which it opened to append: it has to be emptied, not replaced.
        let copied = fs::copy(&self.path, self.rotated());
        OpenOptions::new().write(true).open(&self.path)?.set_len(0)?;
        copied.map(drop)
    }
}

/// Opens a file to append to, made if need be, that only we may read.
pub(super) fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_full_file_is_set_aside_and_one_before_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let log = ConsoleLog { path: dir.path().join("c.log"), max_bytes: 4 };
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        log.open().unwrap().write_all(b"first").unwrap();
        let mut file = log.open().unwrap();
        assert_eq!((read(&log.path).as_str(), read(&log.rotated()).as_str()), ("", "first"));
        file.write_all(b"ab").unwrap();
        log.bound().unwrap();
        assert_eq!(read(&log.path), "ab");
        file.write_all(b"cdef").unwrap();
        log.bound().unwrap();
        assert_eq!((read(&log.path).as_str(), read(&log.rotated()).as_str()), ("", "abcdef"));
        file.write_all(b"goes on").unwrap();
        assert_eq!(read(&log.path), "goes on", "in the place where there was nothing any more");
    }
}
