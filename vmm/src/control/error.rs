//! Why an action could not be done.

use std::path::PathBuf;

use super::{MachineError, StartError};
use crate::config::ConfigError;
use crate::logger::LoggerError;
use crate::metrics::MetricsError;
use crate::mmds::MmdsError;

/// Why an action could not be done. The message is for the client; it names the field, file or device.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("The requested operation is not supported after starting the microVM.")]
    NotAfterStart,
    #[error("The requested operation is not supported before starting the microVM.")]
    NotBeforeStart,
    #[error("snapshot: the microVM must be paused first: PATCH /vm with state Paused")]
    NotPaused,
    #[error("snapshot: a snapshot is loaded into a microVM of which nothing has been configured")]
    Configured,
    #[error("Load microVM snapshot error: {0}")]
    Load(#[source] StartError),
    #[error("{0} not supported.")]
    Unsupported(&'static str),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{section}: {field} {path:?}: {problem}", path = path.display().to_string())]
    File { section: &'static str, field: &'static str, path: PathBuf, problem: String },
    #[error("cpu-config: file {path:?}: {problem}", path = path.display().to_string())]
    CpuFile { path: PathBuf, problem: String },
    #[error("drives: an update of drive {id} needs path_on_host or rate_limiter")]
    EmptyDriveUpdate { id: String },
    #[error("balloon: no balloon was configured before the start")]
    NoBalloon,
    #[error("balloon: stats_polling_interval_s was 0 at the start, so there are no statistics")]
    NoBalloonStats,
    #[error("balloon: stats_polling_interval_s cannot become 0 after the start")]
    BalloonStatsOff,
    #[error("balloon: free_page_hinting was not enabled before the start")]
    NoBalloonHinting,
    #[error(transparent)]
    Logger(#[from] LoggerError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Mmds(MmdsError),
    #[error("{0}")]
    MmdsTooLarge(MmdsError),
    #[error("Start microvm error: {0}")]
    Start(#[from] StartError),
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl From<MmdsError> for ControlError {
    fn from(error: MmdsError) -> Self {
        match error {
            MmdsError::TooLarge { .. } => Self::MmdsTooLarge(error),
            _ => Self::Mmds(error),
        }
    }
}
