//! The host over HTTP.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Api;
use super::error::{ErrorBody, Refusal};
use super::extract::Body;
use crate::instances::{DrainHost, HostReport};

/// Show the host: what it has, what instances take of it, and whether it is cordoned.
#[utoipa::path(get, path = "/v1/host", tag = "host",
    responses((status = 200, description = "The host.", body = HostReport),
        (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn show(State(api): State<Arc<Api>>) -> Json<HostReport> {
    Json(api.instances.host_report())
}

/// Cordon the host: no instance is run on it until that is taken back. Those that exist stay as they are, and may
/// be started and stopped.
#[utoipa::path(post, path = "/v1/host/cordon", tag = "host",
    responses((status = 200, description = "The host, cordoned.", body = HostReport),
        (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn cordon(State(api): State<Arc<Api>>) -> Result<Json<HostReport>, Refusal> {
    Ok(Json(api.instances.cordon().await?))
}

/// Take back that the host is cordoned.
#[utoipa::path(post, path = "/v1/host/uncordon", tag = "host",
    responses((status = 200, description = "The host.", body = HostReport),
        (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn uncordon(State(api): State<Arc<Api>>) -> Result<Json<HostReport>, Refusal> {
    Ok(Json(api.instances.uncordon().await?))
}

/// Drain the host: cordon it, and have all its instances stop or end. That has only begun when this is answered;
/// the host's `used` and `instances` tell how far it is.
#[utoipa::path(post, path = "/v1/host/drain", tag = "host", request_body = DrainHost,
    responses((status = 202, description = "The host, cordoned.", body = HostReport),
        (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn drain(
    State(api): State<Arc<Api>>,
    Body(how): Body<DrainHost>,
) -> Result<(StatusCode, Json<HostReport>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.drain(how).await?)))
}
