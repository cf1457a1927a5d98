//! Turns what the guest's kernel says into what the host is told: a code for programs and a sentence for
//! people. Every request's handler fails with an [`ErrorReply`].

use std::fmt::Display;
use std::io;

use nix::errno::Errno;
use pulau_agent_protocol::message::{ErrorCode, ErrorReply};

/// The protocol's code for an error of the kernel's.
pub fn code(error: &io::Error) -> ErrorCode {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO | Errno::ESRCH) => ErrorCode::NotFound,
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ENOEXEC | Errno::ETXTBSY) => {
            ErrorCode::PermissionDenied
        }
        Some(Errno::EISDIR | Errno::ENOTDIR) => ErrorCode::WrongType,
        Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG | Errno::ENOMEM) => ErrorCode::NoSpace,
        Some(Errno::EAGAIN | Errno::EMFILE | Errno::ENFILE) => ErrorCode::Busy,
        _ => ErrorCode::Failed,
    }
}

/// Adds what was attempted to an error.
pub trait Context<T> {
    /// `what` says what was attempted, and on what: `set hostname "web"`.
    fn context(self, what: impl Display) -> Result<T, ErrorReply>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl Display) -> Result<T, ErrorReply> {
        self.map_err(|e| {
            let error = e.into();
            ErrorReply::new(code(&error), format!("{what}: {error}"))
        })
    }
}

/// A request that makes no sense.
pub fn bad_request(message: impl Into<String>) -> ErrorReply {
    ErrorReply::new(ErrorCode::BadRequest, message)
}
