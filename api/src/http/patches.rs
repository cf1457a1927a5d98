//! Updates of guests' packages over HTTP.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::Api;
use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path};
use crate::instances::PatchInstances;
use crate::model::Patch;

/// Requests to update instances.
#[derive(Debug, Serialize, ToSchema)]
pub struct Patches {
    pub items: Vec<Arc<Patch>>,
}

/// List the requests to update instances that are kept, the last one first.
#[utoipa::path(get, path = "/v1/patches", tag = "patches",
    responses((status = 200, description = "Requests, with what came of them so far.", body = Patches), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(State(api): State<Arc<Api>>) -> Json<Patches> {
    Json(Patches { items: api.instances.patches() })
}

/// Update the packages in instances, by the package managers of their guests.
///
/// It goes on when the answer is given, and whatever becomes of the daemon: ask for it until it has a final state.
#[utoipa::path(post, path = "/v1/patches", tag = "patches", request_body = PatchInstances,
    responses((status = 202, description = "It has been begun.", body = Patch), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create(
    State(api): State<Arc<Api>>,
    Body(request): Body<PatchInstances>,
) -> Result<(StatusCode, Json<Arc<Patch>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.patch_instances(request).await?)))
}

/// Show a request to update instances, with what came of it so far.
#[utoipa::path(get, path = "/v1/patches/{id}", tag = "patches", params(("id" = String, Path, description = "Id of the request.")),
    responses((status = 200, description = "The request.", body = Patch), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn get(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Arc<Patch>>, Refusal> {
    Ok(Json(api.instances.patch(&id)?))
}

/// Leave off updating: what has not begun is left alone, what is under way is told to stop.
#[utoipa::path(post, path = "/v1/patches/{id}/cancel", tag = "patches", params(("id" = String, Path, description = "Id of the request.")),
    responses((status = 202, description = "The request.", body = Patch), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn cancel(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Arc<Patch>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.cancel_patch(&id).await?)))
}
