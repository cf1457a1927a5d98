//! What is done to every request: an id, bounds, a line in the log.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::time::{Instant, timeout};
use tracing::Instrument as _;

use super::Api;
use super::audit::Entry;
use super::auth::Caller;
use super::error::{Refusal, complete};
use crate::model::id;

/// A request that takes longer is given up. Longer than the longest wait a request may ask for.
const LONGEST: Duration = Duration::from_secs(660);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Middleware around everything else.
pub async fn frame(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let id = id::new("req");
    let span = tracing::info_span!("request", id, method = %request.method(), path = request.uri().path());
    let mut response = async {
        let begun = Instant::now();
        let Ok(_permit) = api.under_way.clone().try_acquire_owned() else {
            let message = "too many requests are under way: try again in a moment";
            return Refusal::new(StatusCode::TOO_MANY_REQUESTS, "RequestLimitExceeded", message)
                .into_response();
        };
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
        let response = timeout(LONGEST, next.run(request)).await.unwrap_or_else(|_| {
            let message = format!("it took longer than {} s", LONGEST.as_secs());
            Refusal::new(StatusCode::GATEWAY_TIMEOUT, "RequestTimeout", message).into_response()
        });
        let caller = response.extensions().get::<Caller>().map_or("-", |caller| caller.name.as_str());
        let (status, took_ms) = (response.status().as_u16(), begun.elapsed().as_millis() as u64);
        let route = route.as_deref().unwrap_or("-");
        api.metrics.answered(route, known(&method), status, begun.elapsed());
        // A connection into a guest is one to be remembered.
        if !method.is_safe() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            tracing::info!(caller, status, took_ms, "done");
            let code = response.extensions().get::<Refusal>().map(|refusal| refusal.code);
            let (request_id, method) = (id.as_str(), method.as_str());
            let time = chrono::Utc::now();
            api.audit.write(&Entry { time, request_id, caller, method, path: &path, status, code, took_ms });
        } else {
            tracing::debug!(caller, status, took_ms, "done");
        }
        response
    }
    .instrument(span)
    .await;
    if let Some(refusal) = response.extensions_mut().remove::<Refusal>() {
        response = complete(refusal, &id, response.headers());
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// A method for metrics, which are not to grow by what clients invent.
fn known(method: &Method) -> &str {
    match *method {
        Method::GET | Method::HEAD | Method::POST | Method::PATCH | Method::PUT | Method::DELETE => {
            method.as_str()
        }
        _ => "other",
    }
}
