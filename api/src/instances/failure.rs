//! Why work behind a request failed, for programs: whose fault it was, and a name that never changes. The same
//! names are the codes of the API's refusals; see `http::error`.

use std::io;

use super::error::Error;
use crate::files::FileError;
use crate::image::ImageError;
use crate::model::StateReason;
use crate::volume::VolumeError;

/// Whose fault something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// What was asked for cannot be, or somebody gave it up.
    Client,
    /// The host, or another that it needs.
    Server,
}

pub type Failure = (By, &'static str);

/// Of an error of files, images or volumes; anything else is the host's.
pub fn of(error: &Error) -> Failure {
    match error {
        Error::Image(error) => of_image(error),
        Error::Volume(error) => of_volume(error),
        Error::File(error) => of_file(error),
        Error::NotFound { .. } => (By::Client, "NotFound"),
        Error::State { .. } => (By::Client, "IncorrectState"),
        Error::Guest { .. } | Error::Machine(_) => (By::Server, "MachineUnavailable"),
        _ => (By::Server, "InternalError"),
    }
}

pub fn of_image(error: &ImageError) -> Failure {
    match error {
        ImageError::Invalid { .. } => (By::Client, "InvalidImage"),
        ImageError::Digest { .. } => (By::Client, "InvalidImage.DigestMismatch"),
        ImageError::TooLarge { .. } => (By::Client, "InvalidImage.TooLarge"),
        ImageError::NotFound { .. } => (By::Client, "InvalidImageReference.NotFound"),
        ImageError::Denied { .. } => (By::Client, "RegistryAccessDenied"),
        ImageError::Registry { .. } => (By::Server, "RegistryUnavailable"),
        ImageError::MissingBlob(_) => (By::Server, "ImageDataMissing"),
        ImageError::File(error) => of_file(error),
    }
}

pub fn of_volume(error: &VolumeError) -> Failure {
    match error {
        VolumeError::NotFound { .. } => (By::Client, "InvalidVolume.NotFound"),
        VolumeError::Shrink { .. } | VolumeError::Size { .. } | VolumeError::TooSmall { .. } => {
            (By::Client, "InvalidParameterValue")
        }
        VolumeError::Name { .. } | VolumeError::Exists { .. } => (By::Server, "InternalError"),
        VolumeError::File(error) => of_file(error),
    }
}

pub fn of_file(error: &FileError) -> Failure {
    match error {
        FileError::Cancelled => (By::Client, "Cancelled"),
        FileError::NoSpace { .. } => (By::Server, "InsufficientStorageCapacity"),
        FileError::NotAFile { .. } => (By::Client, "InvalidFile"),
        FileError::Io { source, .. } => match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory => {
                (By::Client, "InvalidFile")
            }
            _ => (By::Server, "InternalError"),
        },
        FileError::Tool { .. } => (By::Server, "InternalError"),
    }
}

/// What is written into a record.
pub fn reason(error: &Error) -> StateReason {
    let (by, name) = of(error);
    let by = match by {
        By::Client => "Client",
        By::Server => "Server",
    };
    StateReason { code: format!("{by}.{name}"), message: error.to_string() }
}
