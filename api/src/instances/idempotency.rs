//! Requests that can be sent again: the same token gives the same answer, and makes nothing twice.

use serde::Serialize;

use super::error::Error;
use super::host::Host;
use crate::image::Digest;
use crate::records::{Changes, Tables, Token};

/// Longest token, in bytes: EC2's limit.
const LENGTH: usize = 64;

/// Whether a request with this token was fulfilled before: ids of what it made then.
///
/// # Errors
///
/// The token is malformed, or was used for a request that is not the same.
pub fn find(
    tables: &Tables,
    operation: &str,
    token: Option<&str>,
    request: &impl Serialize,
) -> Result<Option<Vec<String>>, Error> {
    let Some(token) = token else { return Ok(None) };
    if !(1..=LENGTH).contains(&token.len()) || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Error::invalid("client_token", "must be 1 to 64 visible ASCII characters"));
    }
    match tables.tokens.get(&id(operation, token)) {
        Some(known) if known.request == hash(request) => Ok(Some(known.made.clone())),
        Some(_) => Err(Error::TokenReused(token.to_owned())),
        None => Ok(None),
    }
}

/// Has the request remembered together with what it makes.
pub fn remember(
    host: &Host,
    changes: &mut Changes,
    operation: &str,
    token: Option<&str>,
    request: &impl Serialize,
    made: Vec<String>,
) {
    let Some(token) = token else { return };
    let id = id(operation, token);
    changes.create(&Token { id, request: hash(request), made, created: host.now() });
}

fn id(operation: &str, token: &str) -> String {
    format!("{operation}/{token}")
}

fn hash(request: &impl Serialize) -> String {
    let bytes = serde_json::to_vec(request).unwrap_or_default();
    Digest::of(&bytes).hex()
}
