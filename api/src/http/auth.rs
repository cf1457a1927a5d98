//! Who asks, and what they may.
//!
//! Whoever can open the daemon's Unix socket may do everything: the socket's permissions decide. Over TCP a
//! request needs `Authorization: Bearer TOKEN`. Tokens are random and kept only as hashes, so comparing hashes
//! tells nothing by how long it takes.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Refusal;
use super::{Api, web};
use crate::image::Digest;
use crate::model::ApiToken;

/// What somebody may do. Each may what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Look.
    Read,
    /// Run and change instances and what they are made of.
    Operate,
    /// Give and take away tokens, cordon the host.
    Admin,
}

/// Who makes a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// For the audit log: a token's name, or `local`.
    pub name: String,
    pub role: Role,
}

/// How a request came in; put there by the listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    UnixSocket,
    Tcp,
}

/// Paths that tell nothing about the host's instances.
const OPEN: [&str; 2] = ["/healthz", "/openapi.json"];

/// Middleware: finds out who asks, and refuses what they may not.
pub async fn authorize(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let caller = match caller(&api, &request) {
        Ok(caller) => caller,
        Err(refusal) => return refusal.into_response(),
    };
    let needed = needed_role(request.method(), request.uri().path());
    if caller.role < needed {
        let message = format!("this takes the role {needed:?}, and {} has {:?}", caller.name, caller.role);
        let refusal = Refusal::new(StatusCode::FORBIDDEN, "UnauthorizedOperation", message);
        let mut response = refusal.into_response();
        response.extensions_mut().insert(caller);
        return response;
    }
    request.extensions_mut().insert(caller.clone());
    let mut response = next.run(request).await;
    response.extensions_mut().insert(caller);
    response
}

fn caller(api: &Api, request: &Request) -> Result<Caller, Refusal> {
    if request.extensions().get() == Some(&Door::UnixSocket) {
        return Ok(Caller { name: "local".into(), role: Role::Admin });
    }
    let path = request.uri().path();
    if OPEN.contains(&path) || web::PATHS.contains(&path) {
        return Ok(Caller { name: "anonymous".into(), role: Role::Read });
    }
    let refused = |message: &str| Refusal::new(StatusCode::UNAUTHORIZED, "AuthFailure", message);
    let header = request.headers().get(header::AUTHORIZATION);
    let header = header.ok_or_else(|| {
        refused("send `Authorization: Bearer TOKEN`; `pulau token create` on the host makes one")
    })?;
    let token = header.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
    let hash = hash(token.ok_or_else(|| refused("the Authorization header is not `Bearer TOKEN`"))?);
    let tables = api.instances.host().records.read();
    let known = tables.api_tokens.iter().find(|known| known.hash == hash);
    let known: &ApiToken = known.ok_or_else(|| refused("this token is not known here (any more)"))?;
    if let Some(expires) = known.expires.filter(|expires| *expires <= api.instances.host().now()) {
        let when = expires.format("%FT%TZ");
        let message =
            format!("token {} expired at {when}: ask for another (`pulau token create`)", known.name);
        return Err(refused(&message));
    }
    Ok(Caller { name: known.name.clone(), role: known.role })
}

/// The hash a token is kept as.
pub fn hash(token: &str) -> String {
    Digest::of(token.as_bytes()).hex()
}

fn needed_role(method: &Method, path: &str) -> Role {
    match *method {
        _ if path.starts_with("/v1/tokens") => Role::Admin,
        Method::GET | Method::HEAD if !path.ends_with("/agent") && !path.ends_with("/console/attach") => {
            Role::Read
        }
        _ if path.starts_with("/v1/host/") => Role::Admin,
        _ => Role::Operate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_takes_less_than_changing_and_that_less_than_giving_rights() {
        assert_eq!(needed_role(&Method::GET, "/v1/instances"), Role::Read);
        assert_eq!(needed_role(&Method::GET, "/v1/instances/i-1/agent"), Role::Operate);
        assert_eq!(needed_role(&Method::DELETE, "/v1/instances/i-1"), Role::Operate);
        assert_eq!(needed_role(&Method::GET, "/v1/tokens"), Role::Admin);
        assert_eq!(needed_role(&Method::POST, "/v1/host/cordon"), Role::Admin);
        assert!(Role::Read < Role::Operate && Role::Operate < Role::Admin);
    }
}
