//! A piece of work that takes a while: how far it is, and whether it is still wanted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::FileError;

/// How long a cancelled task may go unnoticed by those who only wait.
const NOTICE: Duration = Duration::from_millis(100);

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Bytes come over the network.
    Download,
    /// Bytes are copied and hashed.
    Copy,
    /// A disk image is made into a raw one.
    Convert,
    /// Layers are read and put over one another.
    Layers,
    /// A file system is written.
    Write,
    /// Bytes are compared with their digest.
    Verify,
}

/// How far a task is. `total` is None where it cannot be known beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    pub phase: Phase,
    /// Bytes.
    pub done: u64,
    /// Bytes.
    pub total: Option<u64>,
}

type Report = dyn Fn(Progress) + Send + Sync;

/// Shared by who does the work and who waits for it.
#[derive(Clone)]
pub struct Task {
    cancelled: Arc<AtomicBool>,
    report: Arc<Report>,
}

impl Task {
    /// `report` is called often, from the thread that works: it should only take note.
    pub fn new(report: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Task { cancelled: Arc::default(), report: Arc::new(report) }
    }

    /// A task nobody watches.
    pub fn quiet() -> Self {
        Self::new(|_| {})
    }

    /// Asks whoever works on it to stop. Takes effect within a few megabytes of work.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// # Errors
    ///
    /// [`FileError::Cancelled`] once it has been.
    pub fn check(&self) -> Result<(), FileError> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(FileError::Cancelled),
            false => Ok(()),
        }
    }

    /// Returns once it has been cancelled, about.
    pub async fn cancelled(&self) {
        while self.check().is_ok() {
            tokio::time::sleep(NOTICE).await;
        }
    }

    /// Reports progress.
    ///
    /// # Errors
    ///
    /// [`FileError::Cancelled`].
    pub fn at(&self, phase: Phase, done: u64, total: Option<u64>) -> Result<(), FileError> {
        (self.report)(Progress { phase, done, total });
        self.check()
    }

    /// Cancels the task when dropped: kept by a future whose work goes on in another thread, so that giving up
    /// the future gives up the work.
    pub fn cancel_on_drop(&self) -> CancelOnDrop {
        CancelOnDrop(Some(self.clone()))
    }
}

/// See [`Task::cancel_on_drop`].
pub struct CancelOnDrop(Option<Task>);

impl CancelOnDrop {
    /// The work has ended by itself: the task stays as it is, for more work.
    pub fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.cancel();
        }
    }
}
