//! Volumes over HTTP.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path, Query};
use super::list::ListVolumes;
use super::{Api, List};
use crate::instances::{AttachVolume, CreateVolume, Error, ModifyVolume};
use crate::model::{Kind, Volume};

/// List volumes, in order of their ids. Root disks are among them.
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", params(ListVolumes),
    responses((status = 200, description = "Volumes.", body = List<Volume>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<ListVolumes>,
) -> Result<Json<List<Volume>>, Refusal> {
    Ok(Json(query.page(api.instances.host().records.read().volumes.iter())?))
}

/// Make a volume: blank, or of a snapshot. It is `creating` at first; look again until it is `available` or `error`.
#[utoipa::path(post, path = "/v1/volumes", tag = "volumes", request_body = CreateVolume,
    responses((status = 202, description = "The volume.", body = Volume), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateVolume>,
) -> Result<(StatusCode, Json<Arc<Volume>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.create_volume(request).await?)))
}

/// Show a volume.
#[utoipa::path(get, path = "/v1/volumes/{id}", tag = "volumes", params(("id" = String, Path, description = "Id of the volume.")),
    responses((status = 200, description = "The volume.", body = Volume), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn get(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Arc<Volume>>, Refusal> {
    let found = api.instances.host().records.get::<Volume>(&id);
    Ok(Json(found.ok_or_else(|| Error::not_found(Kind::Volume, &id))?))
}

/// Change a volume: make it larger, or give it other tags.
#[utoipa::path(patch, path = "/v1/volumes/{id}", tag = "volumes", params(("id" = String, Path, description = "Id of the volume.")),
    request_body = ModifyVolume,
    responses((status = 200, description = "The volume.", body = Volume), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn modify(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<ModifyVolume>,
) -> Result<Json<Arc<Volume>>, Refusal> {
    Ok(Json(api.instances.modify_volume(&id, &request).await?))
}

/// Delete a volume that is not attached. One that is being made is given up.
#[utoipa::path(delete, path = "/v1/volumes/{id}", tag = "volumes", params(("id" = String, Path, description = "Id of the volume.")),
    responses((status = 202, description = "The volume, which is `deleting`.", body = Volume), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Arc<Volume>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.delete_volume(&id).await?)))
}

/// Attach an available volume to a stopped instance, behind the disks it has.
#[utoipa::path(post, path = "/v1/volumes/{id}/attach", tag = "volumes", params(("id" = String, Path, description = "Id of the volume.")),
    request_body = AttachVolume,
    responses((status = 200, description = "The volume.", body = Volume), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn attach(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<AttachVolume>,
) -> Result<Json<Arc<Volume>>, Refusal> {
    Ok(Json(api.instances.attach_volume(&id, &request).await?))
}

/// Detach a volume from its instance, which must be stopped.
#[utoipa::path(post, path = "/v1/volumes/{id}/detach", tag = "volumes", params(("id" = String, Path, description = "Id of the volume.")),
    responses((status = 200, description = "The volume.", body = Volume), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn detach(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<Volume>>, Refusal> {
    Ok(Json(api.instances.detach_volume(&id).await?))
}
