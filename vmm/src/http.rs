//! HTTP/1.1 messages as bytes: reading a request, writing a response. Used by the control API and by
//! the metadata service the guest sees; both take bytes from someone not to be trusted.
//!
//! It does no I/O and keeps no state. What it does not do: chunked bodies, trailers, upgrades.

use std::fmt::Write;

/// How large a request may be.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of request line and headers together.
    pub head: usize,
    /// Bytes of the body.
    pub body: usize,
}

/// The most headers a request has.
const MAX_HEADERS: usize = 64;

/// Why bytes are not a request that can be answered. Where the next request begins is then unknown, so
/// the connection must be closed behind the answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("The request is malformed: {0}.")]
    Malformed(&'static str),
    #[error("The request line and headers are larger than the limit of {limit} bytes.")]
    HeadTooLarge { limit: usize },
    #[error("Request payload with size {size} is larger than the limit of {limit} allowed by server.")]
    BodyTooLarge { size: u64, limit: usize },
    #[error("Transfer-Encoding is not supported: give a Content-Length.")]
    TransferEncoding,
}

impl ParseError {
    /// The status that says so.
    pub fn status(&self) -> Status {
        match self {
            Self::Malformed(_) => Status::BadRequest,
            Self::HeadTooLarge { .. } => Status::HeaderFieldsTooLarge,
            Self::BodyTooLarge { .. } => Status::PayloadTooLarge,
            Self::TransferEncoding => Status::LengthRequired,
        }
    }
}

/// Request line and headers.
#[derive(Debug)]
pub struct Head<'b> {
    pub method: &'b str,
    /// The target's path, without scheme and host where the client sent them.
    pub path: &'b str,
    /// Whether the connection stays open after the answer.
    pub keep_alive: bool,
    /// Whether the client waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
    /// Length of the body in bytes; within the limit.
    pub content_length: usize,
    /// Length of the head itself in bytes.
    pub len: usize,
    headers: [httparse::Header<'b>; MAX_HEADERS],
}

impl<'b> Head<'b> {
    /// Reads the head at the beginning of `bytes`; `None` if it is not all there yet.
    ///
    /// After an answer of `None`, bytes without a line feed cannot make it complete.
    pub fn parse(bytes: &'b [u8], limits: Limits) -> Result<Option<Self>, ParseError> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let too_large = ParseError::HeadTooLarge { limit: limits.head };
        let window = &bytes[..bytes.len().min(limits.head)];
        let len = match request.parse(window).map_err(malformed)? {
            httparse::Status::Complete(len) => len,
            httparse::Status::Partial if window.len() == limits.head => return Err(too_large),
            httparse::Status::Partial => return Ok(None),
        };
        let target = request.path.unwrap_or_default();
        let mut head = Self {
            method: request.method.unwrap_or_default(),
            path: path_of(target).ok_or(ParseError::Malformed("the target is not a path"))?,
            keep_alive: request.version == Some(1),
            expects_continue: false,
            content_length: 0,
            len,
            headers,
        };
        head.read_framing(limits)?;
        Ok(Some(head))
    }

    /// The value of a header, where it is there and is text. Names are compared without case.
    pub fn header(&self, name: &str) -> Option<&'b str> {
        let header = self.headers().find(|h| h.name.eq_ignore_ascii_case(name))?;
        Some(std::str::from_utf8(header.value).ok()?.trim())
    }

    fn headers(&self) -> impl Iterator<Item = &httparse::Header<'b>> {
        self.headers.iter().take_while(|h| !h.name.is_empty())
    }

    /// Reads the headers that say how long the request is and what becomes of the connection.
    fn read_framing(&mut self, limits: Limits) -> Result<(), ParseError> {
        let (mut length, mut keep_alive, mut expects) = (None, self.keep_alive, false);
        for header in self.headers() {
            let value = header.value.trim_ascii();
            if header.name.eq_ignore_ascii_case("content-length") {
                let parsed = decimal(value).ok_or(ParseError::Malformed("bad Content-Length"))?;
                // Two lengths are an old trick to make two readers see two different requests.
                if length.is_some_and(|l| l != parsed) {
                    return Err(ParseError::Malformed("two Content-Lengths"));
                }
                length = Some(parsed);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                return Err(ParseError::TransferEncoding);
            } else if header.name.eq_ignore_ascii_case("connection") {
                for option in value.split(|&b| b == b',').map(<[u8]>::trim_ascii) {
                    if option.eq_ignore_ascii_case(b"close") {
                        keep_alive = false;
                    } else if option.eq_ignore_ascii_case(b"keep-alive") {
                        keep_alive = true;
                    }
                }
            } else if header.name.eq_ignore_ascii_case("expect") {
                expects = value.eq_ignore_ascii_case(b"100-continue");
            }
        }
        (self.keep_alive, self.expects_continue) = (keep_alive, expects);
        let size = length.unwrap_or(0);
        let limit = limits.body;
        match usize::try_from(size) {
            Ok(length) if length <= limit => self.content_length = length,
            _ => return Err(ParseError::BodyTooLarge { size, limit }),
        }
        Ok(())
    }
}

fn malformed(error: httparse::Error) -> ParseError {
    ParseError::Malformed(match error {
        httparse::Error::HeaderName => "a header's name is not valid",
        httparse::Error::HeaderValue => "a header's value is not valid",
        httparse::Error::NewLine => "a line does not end with CR LF",
        httparse::Error::Token => "the request line is not valid",
        httparse::Error::TooManyHeaders => "there are too many headers",
        httparse::Error::Version => "the protocol is not HTTP/1.0 or HTTP/1.1",
        httparse::Error::Status => "the request line is not valid",
    })
}

/// The path of a target in origin form (`/a/b`) or absolute form (`http://host/a/b`).
fn path_of(target: &str) -> Option<&str> {
    match target.strip_prefix("http://") {
        Some(rest) => Some(rest.find('/').map_or("/", |slash| &rest[slash..])),
        None => target.starts_with('/').then_some(target),
    }
}

/// A number of decimal digits and nothing else (no sign, no space).
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A status of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok,
    NoContent,
    BadRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    LengthRequired,
    PayloadTooLarge,
    HeaderFieldsTooLarge,
    InternalServerError,
    NotImplemented,
}

impl Status {
    /// The number.
    pub fn code(self) -> u16 {
        match self {
            Self::Ok => 200,
            Self::NoContent => 204,
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::LengthRequired => 411,
            Self::PayloadTooLarge => 413,
            Self::HeaderFieldsTooLarge => 431,
            Self::InternalServerError => 500,
            Self::NotImplemented => 501,
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::NoContent => "No Content",
            Self::BadRequest => "Bad Request",
            Self::Unauthorized => "Unauthorized",
            Self::NotFound => "Not Found",
            Self::MethodNotAllowed => "Method Not Allowed",
            Self::LengthRequired => "Length Required",
            Self::PayloadTooLarge => "Payload Too Large",
            Self::HeaderFieldsTooLarge => "Request Header Fields Too Large",
            Self::InternalServerError => "Internal Server Error",
            Self::NotImplemented => "Not Implemented",
        }
    }
}

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: Status,
    /// Type of the body.
    pub content_type: &'static str,
    /// The body; a response with [`Status::NoContent`] has none.
    pub body: String,
    /// Further headers. Names and values are the program's own: they are written as they are.
    pub headers: Vec<(&'static str, String)>,
}

impl Response {
    /// A response without a body.
    pub fn empty(status: Status) -> Self {
        Self { status, content_type: "text/plain", body: String::new(), headers: Vec::new() }
    }

    /// A response with a body of JSON.
    pub fn json(status: Status, body: String) -> Self {
        Self { status, content_type: "application/json", body, headers: Vec::new() }
    }

    /// A response with a body of plain text.
    pub fn text(status: Status, body: String) -> Self {
        Self { status, content_type: "text/plain", body, headers: Vec::new() }
    }

    /// With one more header.
    pub fn with_header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Appends the response as bytes. `server` names the program, `keep_alive` says whether the
    /// connection stays open.
    pub fn write(&self, out: &mut Vec<u8>, server: &str, keep_alive: bool) {
        let mut head = String::with_capacity(160);
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let (code, reason) = (self.status.code(), self.status.reason());
        // Writing to a String does not fail.
        let _ = write!(head, "HTTP/1.1 {code} {reason}\r\nServer: {server}\r\nConnection: {connection}\r\n");
        for (name, value) in &self.headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        // RFC 9110, 8.6: a 204 has no Content-Length.
        if self.status != Status::NoContent {
            let (kind, length) = (self.content_type, self.body.len());
            let _ = write!(head, "Content-Type: {kind}\r\nContent-Length: {length}\r\n");
        }
        head.push_str("\r\n");
        out.reserve(head.len() + self.body.len());
        out.extend_from_slice(head.as_bytes());
        if self.status != Status::NoContent {
            out.extend_from_slice(self.body.as_bytes());
        }
    }
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
