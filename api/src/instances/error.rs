//! Why a request was not fulfilled. No HTTP here: `http::error` maps these to status and code, in one place.

use crate::files::FileError;
use crate::image::ImageError;
use crate::microvm::RequestError;
use crate::model::{Kind, NameError};
use crate::network::NetworkError;
use crate::store::StoreError;
use crate::volume::VolumeError;

/// See the module's text. The messages are for the one who asked, and say what to do where that is known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no {} {id:?}; `{}` shows those there are", kind.noun(), kind.list_command())]
    NotFound { kind: Kind, id: String },
    #[error("there is already a {} named {name:?}", kind.noun())]
    Exists { kind: Kind, name: String },
    #[error("{} {id} is in use by {by}", kind.noun())]
    InUse { kind: Kind, id: String, by: String },
    /// A port of the host that is to lead somewhere.
    #[error("port {port} of the host is in use by {by}: choose another, or free it first")]
    PortInUse { port: String, by: String },
    /// It cannot be done to something in this state.
    #[error("{} {id} is {state}; {needed}", kind.noun())]
    State { kind: Kind, id: String, state: String, needed: &'static str },
    #[error("{field}: {problem}")]
    Invalid { field: &'static str, problem: String },
    #[error("{0}")]
    NoCapacity(String),
    #[error("network {network} has no free address: terminate instances or use another network")]
    NoAddress { network: String },
    #[error("client_token {0:?} was used for another request: use a new one for each request")]
    TokenReused(String),
    #[error("the request would have succeeded, but dry_run is set")]
    DryRun,
    #[error("instance {0} is protected: set termination_protection to false first")]
    Protected(String),
    /// Never, for things of this kind.
    #[error("{0}")]
    NotPermitted(String),
    #[error("instance {instance} has as many volumes as it can have: {most}, besides its root disk")]
    AttachmentLimit { instance: String, most: usize },
    /// The guest did not do its part.
    #[error("instance {id}: {problem}")]
    Guest { id: String, problem: String },
    #[error("it took longer than {0} s")]
    Timeout(u64),
    #[error(transparent)]
    Machine(#[from] RequestError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("the host's network: {0}")]
    Network(#[from] NetworkError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// For the log, not for the one who asked.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    pub fn not_found(kind: Kind, id: &str) -> Self {
        Error::NotFound { kind, id: id.to_owned() }
    }

    pub fn invalid(field: &'static str, problem: impl ToString) -> Self {
        Error::Invalid { field, problem: problem.to_string() }
    }
}

/// Work in a thread of its own panicked, or the runtime ends.
impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        Error::Internal(error.to_string())
    }
}

impl From<NameError> for Error {
    fn from(error: NameError) -> Self {
        let field = match error {
            NameError::Name(_) => "name",
            NameError::TooManyTags(_) | NameError::Tag(_) => "tags",
        };
        Error::invalid(field, error)
    }
}
