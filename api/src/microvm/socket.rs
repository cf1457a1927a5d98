//! Sockets in a place where a hostile process may have put something else under their name.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A socket that was looked up once. What happens to its name later does not matter.
#[derive(Debug)]
pub struct PinnedSocket(File);

impl PinnedSocket {
    /// Looks `path` up.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if it is anything but a socket, also a symbolic link to one; those of `open`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
        if !file.metadata()?.file_type().is_socket() {
            let message = format!("{} is not a socket", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(PinnedSocket(file))
    }

    /// A path to connect to, good while `self` lives. Short, wherever the socket is.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn connects_by_the_pinned_path_even_when_the_name_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = UnixListener::bind(&path).unwrap();
        let pinned = PinnedSocket::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        UnixStream::connect(pinned.path()).unwrap();
    }

    #[test]
    fn refuses_links_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link, file) = (dir.path().join("s"), dir.path().join("l"), dir.path().join("f"));
        let _listener = UnixListener::bind(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        std::fs::write(&file, "").unwrap();
        assert_eq!(PinnedSocket::open(&link).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(PinnedSocket::open(&file).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(PinnedSocket::open(&dir.path().join("x")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
