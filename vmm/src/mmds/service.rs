//! The service as the guest sees it: from the bytes of a request to those of a response.
//!
//! `GET /path` reads; with version 2 only with a token, which `PUT /latest/api/token` gives. Headers have
//! Firecracker's names or EC2's.

use std::time::Instant;

use super::Mmds;
use super::store::{Format, MmdsError};
use super::token::TTL_SECONDS;
use crate::config::MmdsVersion;
use crate::http::{Head, Limits, Response, Status};
use crate::metrics::METRICS;

/// How large a request of the guest may be. Its connection needs no larger buffer.
pub const GUEST_LIMITS: Limits = Limits { head: 4096, body: 1024 };

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];

/// What became of the bytes at the beginning of a connection's buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum Served {
    /// More bytes are needed.
    Incomplete,
    /// There was a request.
    Response {
        /// Bytes of the buffer it took.
        consumed: usize,
        /// The response.
        bytes: Vec<u8>,
        /// Whether the connection stays open behind it.
        keep_alive: bool,
    },
}

impl Mmds {
    /// Answers the request at the beginning of `bytes`, as of the time `now`.
    pub fn serve(&mut self, bytes: &[u8], now: Instant) -> Served {
        let (consumed, keep_alive, response) = match Head::parse(bytes, GUEST_LIMITS) {
            Ok(None) => return Served::Incomplete,
            Ok(Some(head)) => {
                let consumed = head.len + head.content_length;
                if bytes.len() < consumed {
                    return Served::Incomplete;
                }
                METRICS.mmds.rx_accepted.inc();
                (consumed, head.keep_alive, self.respond(&head, now))
            }
            Err(error) => {
                METRICS.mmds.rx_accepted_err.inc();
                (bytes.len(), false, Response::text(error.status(), error.to_string()))
            }
        };
        let mut out = Vec::new();
        response.write(&mut out, "Pulau MMDS", keep_alive);
        Served::Response { consumed, bytes: out, keep_alive }
    }

    fn respond(&mut self, head: &Head<'_>, now: Instant) -> Response {
        match head.method {
            "GET" => self.get(head, now),
            "PUT" => self.put_token(head, now),
            _ => Response::text(Status::MethodNotAllowed, "Not allowed HTTP method.".to_owned())
                .with_header("Allow", "GET, PUT"),
        }
    }

    fn get(&self, head: &Head<'_>, now: Instant) -> Response {
        let refusal = match find(head, TOKEN) {
            Some((_, token)) if self.tokens.is_valid(token, now) => None,
            Some(_) => {
                METRICS.mmds.rx_invalid_token.inc();
                Some("MMDS token not valid.")
            }
            None => {
                METRICS.mmds.rx_no_token.inc();
                Some(
                    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` \
                     header to specify the session token.",
                )
            }
        };
        if let (MmdsVersion::V2, Some(refusal)) = (self.version, refusal) {
            return Response::text(Status::Unauthorized, refusal.to_owned());
        }
        let json = !self.imds_compat && head.header("Accept").is_some_and(accepts_json);
        let format = if json { Format::Json } else { Format::Imds };
        match self.store.get(head.path, format) {
            Ok(body) if json => Response::json(Status::Ok, body),
            Ok(body) => Response::text(Status::Ok, body),
            Err(error @ MmdsError::UnsupportedType) => {
                Response::text(Status::NotImplemented, error.to_string())
            }
            Err(_) => not_found(head.path),
        }
    }

    fn put_token(&mut self, head: &Head<'_>, now: Instant) -> Response {
        let bad = |message: String| Response::text(Status::BadRequest, message);
        // A proxy that was tricked into passing a request on would add it.
        if head.header("X-Forwarded-For").is_some() {
            return bad("Unsupported header name. Key: X-Forwarded-For".to_owned());
        }
        if head.path.split('/').filter(|s| !s.is_empty()).ne(TOKEN_PATH.split('/').skip(1)) {
            return not_found(head.path);
        }
        let Some((name, value)) = find(head, TTL) else {
            return bad("Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                        `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime."
                .to_owned());
        };
        let Some(seconds) = value.parse().ok().filter(|s| TTL_SECONDS.contains(s)) else {
            let (min, max) = (TTL_SECONDS.start(), TTL_SECONDS.end());
            return bad(format!(
                "Invalid time to live value provided for token. Please provide a value between {min} \
                 and {max}."
            ));
        };
        match self.tokens.create(seconds, now) {
            Ok(token) => Response::text(Status::Ok, token).with_header(name, seconds.to_string()),
            Err(error) => {
                log::error!("mmds: no random bytes for a token: {error}");
                Response::text(Status::InternalServerError, "Failed to generate a key.".to_owned())
            }
        }
    }
}

fn not_found(path: &str) -> Response {
    Response::text(Status::NotFound, format!("Resource not found: {path}."))
}

/// The first of two headers that is there, with its name.
fn find<'b>(head: &Head<'b>, names: [&'static str; 2]) -> Option<(&'static str, &'b str)> {
    names.into_iter().find_map(|name| Some((name, head.header(name)?)))
}

/// Whether an `Accept` header names JSON.
fn accepts_json(accept: &str) -> bool {
    accept.split(',').any(|range| {
        let kind = range.split(';').next().unwrap_or_default();
        kind.trim().eq_ignore_ascii_case("application/json")
    })
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
