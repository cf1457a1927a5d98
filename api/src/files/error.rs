//! What goes wrong with files, whoever works on them.

use std::io;
use std::path::{Path, PathBuf};

/// Work on files failed. Whatever was begun has been removed again.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The caller gave up.
    #[error("cancelled")]
    Cancelled,
    /// Sizes in bytes; `needed` is None if the disk filled up while it was written to.
    #[error("{}", no_space(dir, *needed, *available))]
    NoSpace { dir: PathBuf, needed: Option<u64>, available: u64 },
    /// A program this host should have is missing, or did not do what it is for.
    #[error("{program}: {why}")]
    Tool { program: &'static str, why: String },
    /// Not a regular file, where one is needed.
    #[error("{} is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
}

fn no_space(dir: &Path, needed: Option<u64>, available: u64) -> String {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let dir = dir.display();
    let free = mib(available);
    match needed {
        Some(needed) => format!(
            "not enough space in {dir}: {} MiB are needed and {free} MiB may be used; remove images, volumes or \
             snapshots, or give the file system more space",
            mib(needed)
        ),
        None => format!("the file system of {dir} is full; remove images, volumes or snapshots"),
    }
}

/// Says what was being done to which file when an I/O error came.
pub trait IoContext<T> {
    /// # Errors
    ///
    /// [`FileError::Io`], or [`FileError::NoSpace`] where the disk is full.
    fn context(self, doing: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|e| FileError::io(doing, path, e.into()))
    }
}

impl FileError {
    /// The error of an operation on `path`. An error that already came as a [`FileError`] through a reader or
    /// writer stays what it was.
    pub fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        if source.get_ref().is_some_and(|inner| inner.is::<FileError>()) {
            return match source.into_inner().map(|inner| inner.downcast::<FileError>()) {
                Some(Ok(inner)) => *inner,
                // The check above excludes it.
                _ => FileError::Cancelled,
            };
        }
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FileError::NoSpace {
                dir: path.parent().unwrap_or(path).to_owned(),
                needed: None,
                available: 0,
            },
            _ => FileError::Io { doing, path: path.to_owned(), source },
        }
    }
}

/// So that it passes through readers and writers.
impl From<FileError> for io::Error {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io { source, .. } => source,
            other => io::Error::other(other),
        }
    }
}
