//! Snapshots over HTTP.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path, Query};
use super::list::ListSnapshots;
use super::{Api, List};
use crate::instances::{CreateSnapshot, Error};
use crate::model::{Kind, Snapshot};

/// List snapshots, in order of their ids.
#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshots", params(ListSnapshots),
    responses((status = 200, description = "Snapshots.", body = List<Snapshot>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<ListSnapshots>,
) -> Result<Json<List<Snapshot>>, Refusal> {
    Ok(Json(query.page(api.instances.host().records.read().snapshots.iter())?))
}

/// Take a snapshot of a volume. It is `pending` at first; look again until it is `completed` or `error`.
#[utoipa::path(post, path = "/v1/snapshots", tag = "snapshots", request_body = CreateSnapshot,
    responses((status = 202, description = "The snapshot.", body = Snapshot), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateSnapshot>,
) -> Result<(StatusCode, Json<Arc<Snapshot>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.create_snapshot(request).await?)))
}

/// Show a snapshot.
#[utoipa::path(get, path = "/v1/snapshots/{id}", tag = "snapshots", params(("id" = String, Path, description = "Id of the snapshot.")),
    responses((status = 200, description = "The snapshot.", body = Snapshot), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<Snapshot>>, Refusal> {
    let found = api.instances.host().records.get::<Snapshot>(&id);
    Ok(Json(found.ok_or_else(|| Error::not_found(Kind::Snapshot, &id))?))
}

/// Delete a snapshot. One that is being taken is given up. Volumes made of it stay.
#[utoipa::path(delete, path = "/v1/snapshots/{id}", tag = "snapshots", params(("id" = String, Path, description = "Id of the snapshot.")),
    responses((status = 204, description = "Done."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<StatusCode, Refusal> {
    api.instances.delete_snapshot(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
