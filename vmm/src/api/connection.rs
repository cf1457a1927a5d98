//! One client's connection: bytes in, requests out, responses in, bytes out. It never waits, and what it
//! keeps is bounded whatever the client does:
//!
//! - at most one request and one read beyond it are buffered;
//! - while a response has not been taken, nothing more is read;
//! - a request that comes byte by byte is looked at again only when it can have become complete.
//!
//! A request that is not HTTP is answered, and the connection then closed: the sending half at once, the
//! whole once the client has stopped sending or has sent much more, so that it gets to read the answer.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::routes::fault;
use crate::http::{Head, Limits, Response};
use crate::metrics::METRICS;

/// The name in the `Server` header.
const SERVER: &str = "pulau-vmm";
/// Bytes read at once.
const CHUNK: usize = 8192;
/// While more response bytes than this wait to be sent, no further request is handled.
const OUTPUT_LIMIT: usize = 65_536;
/// Bytes thrown away behind a request that was refused, before the connection is closed for good.
const DRAIN_LIMIT: usize = 1 << 20;
/// A buffer that has grown beyond this is given back once it is empty.
const KEPT: usize = 16_384;

/// A stream whose sending half can be closed.
pub(super) trait Stream: Read + Write {
    fn finish(&self);
}

impl Stream for UnixStream {
    fn finish(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Read,
    Write,
    /// Nothing: it is to be dropped.
    Close,
}

/// Answers a request: method, path, body.
pub type Handler<'a> = dyn FnMut(&str, &str, &[u8]) -> Response + 'a;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Requests are answered.
    Open,
    /// Once everything is sent, the connection is closed.
    Closing,
    /// The same, but the client may still be sending.
    Refusing,
    /// Everything is sent; what comes is thrown away, this many bytes yet.
    Draining(usize),
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Connection<S> {
    stream: S,
    phase: Phase,
    input: Vec<u8>,
    /// With fewer bytes than this in `input`, there is no complete request.
    needed: usize,
    /// Whether the request in `input` has been answered with `100 Continue`.
    continued: bool,
    output: Vec<u8>,
    /// Bytes of `output` that have been sent.
    sent: usize,
}

impl<S: Stream> Connection<S> {
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            phase: Phase::Open,
            input: Vec::new(),
            needed: 0,
            continued: false,
            output: Vec::new(),
            sent: 0,
        }
    }

    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Whether no request is under way.
    pub fn is_idle(&self) -> bool {
        self.input.is_empty() && self.output.is_empty()
    }

    /// Goes on as far as it can without waiting, with one read at most.
    pub fn advance(&mut self, limits: Limits, handler: &mut Handler<'_>) -> Next {
        if let Some(next) = self.answer(limits, handler) {
            return next;
        }
        let mut chunk = [0; CHUNK];
        let count = loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Next::Close,
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Next::Read,
                Err(_) => return Next::Close,
            }
        };
        if let Phase::Draining(left) = &mut self.phase {
            *left = left.saturating_sub(count);
            return if *left == 0 { Next::Close } else { Next::Read };
        }
        let old = self.input.len();
        self.input.extend_from_slice(&chunk[..count]);
        // A head ends with a line feed.
        if self.needed == 0 && !self.input[old..].contains(&b'\n') && self.input.len() < limits.head {
            return Next::Read;
        }
        self.answer(limits, handler).unwrap_or(Next::Read)
    }

    /// Answers what requests there are and sends what there is to send. `None` if more input is wanted.
    fn answer(&mut self, limits: Limits, handler: &mut Handler<'_>) -> Option<Next> {
        loop {
            let more = self.answer_some(limits, handler);
            match self.send() {
                Ok(()) if !self.output.is_empty() => return Some(Next::Write),
                Ok(()) if more => {}
                Ok(()) => break,
                Err(_) => return Some(Next::Close),
            }
        }
        match self.phase {
            Phase::Open | Phase::Draining(_) => None,
            Phase::Closing => Some(Next::Close),
            Phase::Refusing => {
                self.stream.finish();
                self.phase = Phase::Draining(DRAIN_LIMIT);
                None
            }
        }
    }

    /// Answers requests until there is no further one, or much to send. Whether it was the latter.
    fn answer_some(&mut self, limits: Limits, handler: &mut Handler<'_>) -> bool {
        let mut consumed = 0;
        while self.phase == Phase::Open && self.output.len() < OUTPUT_LIMIT {
            match self.answer_one(consumed, limits, handler) {
                Some(len) => consumed += len,
                None => break,
            }
        }
        self.input.drain(..consumed);
        let large = self.input.is_empty() && self.input.capacity() > KEPT;
        if large || self.phase != Phase::Open {
            self.input = Vec::new();
        }
        self.output.len() >= OUTPUT_LIMIT && self.phase == Phase::Open
    }

    /// Answers the request at `start` of the input, and returns its length; `None` if it is not complete.
    fn answer_one(&mut self, start: usize, limits: Limits, handler: &mut Handler<'_>) -> Option<usize> {
        let bytes = &self.input[start..];
        if bytes.is_empty() || bytes.len() < self.needed {
            return None;
        }
        let head = match Head::parse(bytes, limits) {
            Ok(head) => head?,
            Err(error) => {
                METRICS.api_server.malformed_requests.inc();
                log::debug!("API: {error}");
                self.phase = Phase::Refusing;
                fault(error.status(), &error).write(&mut self.output, SERVER, false);
                return None;
            }
        };
        let len = head.len + head.content_length;
        if bytes.len() < len {
            self.needed = len;
            if head.expects_continue && !self.continued {
                self.continued = true;
                self.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            return None;
        }
        let response = handler(head.method, head.path, &bytes[head.len..len]);
        response.write(&mut self.output, SERVER, head.keep_alive);
        if !head.keep_alive {
            self.phase = Phase::Closing;
        }
        (self.needed, self.continued) = (0, false);
        Some(len)
    }

    /// Sends as much as the client takes.
    fn send(&mut self) -> std::io::Result<()> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.sent = 0;
        if self.output.capacity() > KEPT {
            self.output = Vec::new();
        } else {
            self.output.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
