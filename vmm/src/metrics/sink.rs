//! A file or named pipe that is appended to and never waited for.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A file or named pipe that is appended to and never waited for: where a reader of the pipe is too
/// slow, lines are lost, but whole ones.
#[derive(Debug)]
pub(crate) struct NonBlockingFile {
    file: File,
    /// The rest of a line of which a part has been written.
    rest: Vec<u8>,
}

impl AsRawFd for NonBlockingFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl NonBlockingFile {
    /// Opens `path`, or makes a file there that only its owner may read.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Open for reading too: a pipe then opens without a reader, and writing to it never raises
        // SIGPIPE.
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        Ok(Self { file, rest: Vec::new() })
    }

    /// Writes a line, or with an error nothing of it.
    pub fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        while !self.rest.is_empty() {
            let written = self.file.write(&self.rest)?;
            self.rest.drain(..written);
        }
        let mut written = 0;
        while written < line.len() {
            match self.file.write(&line[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if written == 0 => return Err(error),
                Err(_) => {
                    self.rest.extend_from_slice(&line[written..]);
                    break;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_full_pipe_loses_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut sink = NonBlockingFile::open(&path).unwrap();
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let line = |n: usize| format!("{n:0>6999}\n");
        let mut accepted: Vec<usize> =
            (0..20).filter(|n| sink.write_line(line(*n).as_bytes()).is_ok()).collect();
        assert!(accepted.len() < 20);
        let mut got = vec![0; 1 << 20];
        let mut len = reader.read(&mut got).unwrap();
        sink.write_line(line(99).as_bytes()).unwrap();
        accepted.push(99);
        len += reader.read(&mut got[len..]).unwrap();
        let expected: String = accepted.iter().map(|n| line(*n)).collect();
        assert!(got[..len] == *expected.as_bytes());
    }
}
