//! Layers are plain, gzip or zstd; their first bytes tell which.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

/// The most memory that one zstd frame may ask for, as a power of two; what the zstd program accepts too.
const ZSTD_WINDOW_LOG: u32 = 27;

/// Opens a layer. Data that is cut off, or damaged where the format can tell, is an error of the reader.
///
/// # Errors
///
/// The first bytes cannot be read.
pub fn decompress<'a>(from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut from = BufReader::with_capacity(1 << 17, from);
    let start = from.fill_buf()?;
    if start.starts_with(b"\x1f\x8b") {
        return Ok(Box::new(BufReader::with_capacity(1 << 17, MultiGzDecoder::new(from))));
    }
    if start.starts_with(b"\x28\xb5\x2f\xfd") {
        let mut decoder = zstd::Decoder::with_buffer(from)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(from))
}

/// Passes on at most `limit` bytes; what would be more is an error, not an end.
pub struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R> Bounded<R> {
    pub fn new(inner: R, limit: u64) -> Self {
        Bounded { inner, left: limit }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, "unpacked, it is larger than images may be")
        })?;
        Ok(count)
    }
}
