//! What goes wrong with images.

use crate::files::FileError;

use super::Digest;

/// An image could not be imported or read. What was begun has been removed again.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// What was given is not what it should be; the sentence says what to give instead, if that is known.
    #[error("{what} cannot be used: {why}")]
    Invalid { what: String, why: String },
    #[error("{what} does not match its digest: expected {expected}, found {found}")]
    Digest { what: String, expected: Digest, found: Digest },
    /// Sizes in bytes.
    #[error("{what} is too large: {size} bytes, and at most {limit} are accepted")]
    TooLarge { what: String, size: u64, limit: u64 },
    /// A blob is not there, though something refers to it.
    #[error("the image's data is missing: {0}; import the image again")]
    MissingBlob(Digest),
    /// The registry has no such image.
    #[error("{registry} has no {image}, or shows it to others only")]
    NotFound { registry: String, image: String },
    /// The registry wants another user or password.
    #[error("{registry} denies access to {image}: {why}")]
    Denied { registry: String, image: String, why: String },
    /// The registry could not be reached, broke off for good, or answered nonsense.
    #[error("{registry}: {why}")]
    Registry { registry: String, why: String },
    #[error(transparent)]
    File(#[from] FileError),
}

impl ImageError {
    pub(super) fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        ImageError::Invalid { what: what.into(), why: why.into() }
    }
}
