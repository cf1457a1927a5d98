//! Connections that become something else: a client asks to upgrade, and from then on bytes go both ways
//! between it and a guest's agent or console. Nothing here looks at them.
//!
//! They are few ([`super::Api::long_lived`]), and one on which nothing is said costs nothing. When either end
//! closes its side, both are closed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt as _, copy, split};
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;

use super::Api;
use super::error::{ErrorBody, Refusal};
use super::extract::Path;

/// The agent's protocol, as clients ask for it.
pub const AGENT: &str = "pulau-agent";
/// A serial console.
pub const CONSOLE: &str = "pulau-console";
/// An agent that does not answer by then is not there.
const AGENT_WITHIN: Duration = Duration::from_secs(10);

/// Talk to the agent in a running instance: to run commands with a terminal, and to copy files.
///
/// The request must ask for an upgrade: `Connection: Upgrade`, `Upgrade: pulau-agent`. After the answer 101 the
/// connection is one to the agent and speaks its protocol, hello first.
#[utoipa::path(get, path = "/v1/instances/{id}/agent", tag = "instances",
    params(("id" = String, Path, description = "Id of the instance.")),
    responses((status = 101, description = "From here on the agent's protocol is spoken."),
        (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn agent(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    mut request: Request,
) -> Result<Response, Refusal> {
    let (upgrade, permit) = (asked(&mut request, AGENT)?, api.long_lived()?);
    let stream = api.instances.agent_stream(&id, AGENT_WITHIN).await?;
    Ok(join(upgrade, stream, permit, AGENT))
}

/// Attach to the serial console of a running instance, to read and to type.
///
/// The request must ask for an upgrade: `Connection: Upgrade`, `Upgrade: pulau-console`. After the answer 101 what
/// is sent is typed, and what the guest writes is received. One at a time may be attached.
#[utoipa::path(get, path = "/v1/instances/{id}/console/attach", tag = "instances",
    params(("id" = String, Path, description = "Id of the instance.")),
    responses((status = 101, description = "From here on the bytes are the console's."),
        (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn console(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    mut request: Request,
) -> Result<Response, Refusal> {
    let (upgrade, permit) = (asked(&mut request, CONSOLE)?, api.long_lived()?);
    let stream = api.instances.attach_console(&id).await?;
    Ok(join(upgrade, stream, permit, CONSOLE))
}

/// The upgrade to `protocol` that the client asks for.
fn asked(request: &mut Request, protocol: &str) -> Result<OnUpgrade, Refusal> {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    upgrade.filter(|_| asks_for(request.headers(), protocol)).ok_or_else(|| {
        Refusal::malformed(format!("ask for it with `Connection: Upgrade` and `Upgrade: {protocol}`"))
    })
}

fn asks_for(headers: &HeaderMap, protocol: &str) -> bool {
    let names = |name, word: &str| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(word))
    };
    names(header::CONNECTION, "upgrade") && names(header::UPGRADE, protocol)
}

/// Says yes, and copies as soon as the client has heard it.
fn join(
    upgrade: OnUpgrade,
    guest: UnixStream,
    permit: OwnedSemaphorePermit,
    protocol: &'static str,
) -> Response {
    tokio::spawn(async move {
        // If this fails the client has gone.
        let Ok(client) = upgrade.await else { return };
        let (mut from_client, mut to_client) = split(TokioIo::new(client));
        let (mut from_guest, mut to_guest) = guest.into_split();
        tokio::select! {
            _ = copy(&mut from_client, &mut to_guest) => {}
            _ = copy(&mut from_guest, &mut to_client) => {}
        }
        // Either may have gone already.
        let _ = to_client.shutdown().await;
        drop(permit);
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, header::HeaderValue::from_static(protocol));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upgrade_is_asked_for_by_two_headers() {
        let headers = |connection: &'static str, upgrade: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONNECTION, header::HeaderValue::from_static(connection));
            headers.insert(header::UPGRADE, header::HeaderValue::from_static(upgrade));
            headers
        };
        assert!(asks_for(&headers("keep-alive, Upgrade", AGENT), AGENT));
        assert!(!asks_for(&headers("keep-alive", AGENT), AGENT));
        assert!(!asks_for(&headers("upgrade", "websocket"), AGENT));
        assert!(!asks_for(&HeaderMap::new(), AGENT));
    }
}
