//! A client of the control API, as small as the tests need it: one request per connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::PATIENCE;

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// HTTP status code.
    pub status: u16,
    /// Body; `Null` if there was none.
    pub body: Value,
}

impl Response {
    /// The message of an error.
    pub fn fault(&self) -> &str {
        self.body["fault_message"].as_str().unwrap_or_default()
    }

    /// Asserts that the request did what it should.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.body
    }

    /// Asserts that the request was refused with `status` and a message that contains `text`.
    #[track_caller]
    pub fn refused(self, status: u16, text: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.fault().contains(text), "{:?} does not say {text:?}", self.fault());
    }
}

/// Sends one request with raw body `body`.
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> std::io::Result<Response> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    let entity = if body.is_empty() && method == "GET" {
        "\r\n".to_owned()
    } else {
        format!("Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    stream.write_all(format!("{head}{entity}").as_bytes())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        if let Some(response) = parse(&answer) {
            return Ok(response);
        }
        match stream.read(&mut chunk)? {
            0 => {
                return Err(std::io::Error::other(format!(
                    "short answer {:?}",
                    String::from_utf8_lossy(&answer)
                )));
            }
            count => answer.extend_from_slice(&chunk[..count]),
        }
    }
}

/// Parses a complete answer, if it is one already.
fn parse(answer: &[u8]) -> Option<Response> {
    let text = std::str::from_utf8(answer).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let body = body.get(..length.unwrap_or(0))?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).ok()? };
    Some(Response { status, body })
}
