//! Copying files into and out of a guest. Both use the connection up.

use std::io::{self, Read, Write};

use super::{ClientError, Connection, Stream, unexpected};
use crate::frame::{Kind, MAX_DATA};
use crate::message::{CopyIn, CopyOut, FileInfo, Reply, Request};

impl<S: Stream> Connection<S> {
    /// Puts the `request.size` bytes that `from` yields into the guest. When this returns the file is in
    /// place; when it fails, the guest's file is as it was before.
    ///
    /// # Errors
    /// [`ClientError::Local`] if `from` fails or yields fewer bytes; [`ClientError::Agent`] with what the
    /// guest had against it; those of the connection.
    pub fn copy_in(mut self, request: &CopyIn, from: impl Read) -> Result<(), ClientError> {
        match self.request(&Request::CopyIn(request.clone()))? {
            Reply::Ready => {}
            other => return Err(unexpected(&other)),
        }
        match self.send_file(request.size, from) {
            Ok(()) => {}
            // The agent may have given up and said why before this side could not write any more.
            Err(ClientError::Disconnected) => {
                return Err(match self.wire.expect::<Reply>(Kind::Reply) {
                    Err(why @ ClientError::Agent(_)) => why,
                    _ => ClientError::Disconnected,
                });
            }
            Err(e) => return Err(e),
        }
        match self.wire.expect(Kind::Reply)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn send_file(&mut self, size: u64, mut from: impl Read) -> Result<(), ClientError> {
        let mut buf = vec![0; MAX_DATA];
        let mut left = size;
        while left > 0 {
            let wanted = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
            let n = match from.read(&mut buf[..wanted]) {
                Ok(0) => {
                    return Err(ClientError::Local(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("the data ended {left} bytes before its announced size of {size}"),
                    )));
                }
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(ClientError::Local(e)),
            };
            self.wire.send_bytes(Kind::FileData, &buf[..n])?;
            left -= n as u64;
        }
        self.wire.send_bytes(Kind::FileEnd, &[])
    }

    /// Writes a file of the guest to `to`. When this returns all of it has been written.
    ///
    /// # Errors
    /// [`ClientError::Local`] if `to` fails; [`ClientError::Agent`] if the guest cannot read it, with
    /// `truncated` if it became shorter meanwhile; [`ClientError::Protocol`] if it is not of the size the
    /// agent said.
    pub fn copy_out(mut self, path: &str, to: &mut dyn Write) -> Result<FileInfo, ClientError> {
        let info = match self.request(&Request::CopyOut(CopyOut { path: path.to_owned() }))? {
            Reply::File(info) => info,
            other => return Err(unexpected(&other)),
        };
        let mut left = info.size;
        loop {
            match self.wire.receive()? {
                (Kind::FileData, bytes) => {
                    left = left.checked_sub(bytes.len() as u64).ok_or_else(|| {
                        ClientError::Protocol(format!("more than the announced {} bytes", info.size))
                    })?;
                    to.write_all(bytes).map_err(ClientError::Local)?;
                }
                (Kind::FileEnd, _) if left == 0 => break,
                (Kind::FileEnd, _) => {
                    return Err(ClientError::Protocol(format!(
                        "the file ended {left} bytes before its announced size of {}",
                        info.size
                    )));
                }
                (kind, _) => return Err(ClientError::Protocol(format!("{kind:?} in the middle of a file"))),
            }
        }
        to.flush().map_err(ClientError::Local)?;
        Ok(info)
    }
}
