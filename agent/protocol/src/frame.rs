//! Frames: how messages are cut out of a byte stream.
//!
//! A frame is a little-endian `u32` payload length, one byte of [`Kind`], and the payload. This module
//! knows lengths and kinds only: it never looks into a payload and never does I/O except through the
//! `Read` and `Write` it is handed. The bytes come from the other side of a virtual machine, so every
//! length is checked before memory is set aside for it, and memory grows only as bytes arrive.

use std::io::{self, Read, Write};
use std::ops::Range;

/// Bytes before the payload: length and kind.
pub const HEADER_LEN: usize = 5;
/// Largest payload of a frame that carries JSON.
pub const MAX_MESSAGE: usize = 1024 * 1024;
/// Largest payload of a frame that carries raw bytes.
pub const MAX_DATA: usize = 64 * 1024;

/// What a payload is. The numbers are the wire format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// JSON [`ClientHello`](crate::message::ClientHello) or [`AgentHello`](crate::message::AgentHello).
    Hello = 1,
    /// JSON [`Request`](crate::message::Request), host to agent.
    Request = 2,
    /// JSON [`Reply`](crate::message::Reply), agent to host.
    Reply = 3,
    /// JSON [`ErrorReply`](crate::message::ErrorReply), agent to host; ends what was under way.
    Error = 4,
    /// JSON [`ExecControl`](crate::message::ExecControl), host to agent, during an exec.
    Control = 5,
    /// JSON [`ExecEvent`](crate::message::ExecEvent), agent to host, during an exec.
    Event = 6,
    /// Raw bytes for the process's standard input; an empty payload ends it.
    Stdin = 16,
    /// Raw bytes from the process's standard output, or from its terminal.
    Stdout = 17,
    /// Raw bytes from the process's standard error.
    Stderr = 18,
    /// Raw bytes of a file being copied.
    FileData = 19,
    /// Empty: all bytes of the file have been sent.
    FileEnd = 20,
}

impl Kind {
    fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::Request,
            3 => Self::Reply,
            4 => Self::Error,
            5 => Self::Control,
            6 => Self::Event,
            16 => Self::Stdin,
            17 => Self::Stdout,
            18 => Self::Stderr,
            19 => Self::FileData,
            20 => Self::FileEnd,
            _ => return None,
        })
    }

    /// The largest payload this kind may have, in bytes.
    pub fn max_payload(self) -> usize {
        match self {
            Self::Hello | Self::Request | Self::Reply | Self::Error | Self::Control | Self::Event => {
                MAX_MESSAGE
            }
            Self::Stdin | Self::Stdout | Self::Stderr | Self::FileData => MAX_DATA,
            Self::FileEnd => 0,
        }
    }
}

/// Why a byte stream is not a sequence of frames. The stream cannot be used any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    #[error("a {kind:?} frame of {len} bytes is larger than the limit of {max}")]
    TooLarge { kind: Kind, len: usize, max: usize },
    #[error("the stream ended inside a frame")]
    Truncated,
}

/// The five bytes that go before a payload of `len` bytes.
///
/// # Errors
/// [`FrameError::TooLarge`] if the kind does not allow that many.
pub fn header(kind: Kind, len: usize) -> Result<[u8; HEADER_LEN], FrameError> {
    let max = kind.max_payload();
    let too_large = FrameError::TooLarge { kind, len, max };
    if len > max {
        return Err(too_large);
    }
    let [a, b, c, d] = u32::try_from(len).map_err(|_| too_large)?.to_le_bytes();
    Ok([a, b, c, d, kind as u8])
}

/// Appends one whole frame to `out`.
///
/// # Errors
/// [`FrameError::TooLarge`]; `out` is then unchanged.
pub fn encode(out: &mut Vec<u8>, kind: Kind, payload: &[u8]) -> Result<(), FrameError> {
    out.extend_from_slice(&header(kind, payload.len())?);
    out.extend_from_slice(payload);
    Ok(())
}

/// Writes one whole frame in a single `write_all`, so that it is not sent as two packets.
///
/// # Errors
/// Those of the writer; `InvalidInput` if the payload is too large.
pub fn write(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
    encode(&mut frame, kind, payload).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    to.write_all(&frame)
}

/// Cuts frames out of bytes as they arrive, for blocking and non-blocking streams alike.
///
/// Fill it with [`fill`](Self::fill) and take frames out with [`take`](Self::take) until it returns none.
#[derive(Debug, Default)]
pub struct Decoder {
    buf: Vec<u8>,
    /// The bytes of `buf` not yet taken out.
    live: Range<usize>,
}

/// How much a single [`Decoder::fill`] asks the stream for.
const FILL: usize = HEADER_LEN + MAX_DATA;

impl Decoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads once from `from`. Returns the number of bytes read, 0 at the end of the stream.
    ///
    /// # Errors
    /// Those of the reader, `WouldBlock` among them.
    pub fn fill(&mut self, from: &mut impl Read) -> io::Result<usize> {
        if self.live.is_empty() {
            self.live = 0..0;
        } else if self.live.start > 0 && self.buf.len() - self.live.end < FILL {
            self.buf.copy_within(self.live.clone(), 0);
            self.live = 0..self.live.len();
        }
        let wanted = self.live.end + FILL;
        if self.buf.len() < wanted {
            self.buf.resize(wanted, 0);
        }
        let n = from.read(&mut self.buf[self.live.end..])?;
        self.live.end += n;
        Ok(n)
    }

    /// The kind and payload length of the next whole frame, if one has arrived; leaves it in.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn peek(&self) -> Result<Option<(Kind, usize)>, FrameError> {
        let live = &self.buf[self.live.clone()];
        let Some((&[a, b, c, d, kind], rest)) = live.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        let kind = Kind::from_wire(kind).ok_or(FrameError::UnknownKind(kind))?;
        let max = kind.max_payload();
        let len = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        if len > max {
            return Err(FrameError::TooLarge { kind, len, max });
        }
        Ok((rest.len() >= len).then_some((kind, len)))
    }

    /// Takes the next whole frame out, if one has arrived.
    ///
    /// # Errors
    /// [`FrameError::UnknownKind`] or [`FrameError::TooLarge`] as soon as a header is seen to be bad; the
    /// same error again on every later call.
    pub fn take(&mut self) -> Result<Option<(Kind, &[u8])>, FrameError> {
        Ok(self.peek()?.map(|(kind, len)| {
            let start = self.live.start + HEADER_LEN;
            self.live.start = start + len;
            (kind, &self.buf[start..start + len])
        }))
    }

    /// To be asked at the end of the stream.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] if the stream ended inside a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        if self.live.is_empty() { Ok(()) } else { Err(FrameError::Truncated) }
    }

    /// Reads from a blocking stream until a whole frame is there, and leaves it in. `None` at a clean end
    /// of the stream.
    ///
    /// # Errors
    /// Those of the reader, and those of [`take`](Self::take) and [`finish`](Self::finish) as `InvalidData`
    /// (`UnexpectedEof` for a truncated frame) with the [`FrameError`] as source.
    pub fn wait(&mut self, from: &mut impl Read) -> io::Result<Option<Kind>> {
        loop {
            if let Some((kind, _)) = self.peek().map_err(invalid_data)? {
                return Ok(Some(kind));
            }
            match self.fill(from) {
                Ok(0) => {
                    self.finish().map_err(|e| io::Error::new(io::ErrorKind::UnexpectedEof, e))?;
                    return Ok(None);
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// [`wait`](Self::wait), then [`take`](Self::take).
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn read(&mut self, from: &mut impl Read) -> io::Result<Option<(Kind, &[u8])>> {
        match self.wait(from)? {
            None => Ok(None),
            Some(_) => self.take().map_err(invalid_data),
        }
    }
}

fn invalid_data(e: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
