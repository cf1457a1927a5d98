//! Images over HTTP.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path};
use super::{Api, List};
use crate::instances::{CreateImage, Error, ImportImage};
use crate::model::{Image, Kind};

/// List images.
#[utoipa::path(get, path = "/v1/images", tag = "images",
    responses((status = 200, description = "All images.", body = List<Image>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(State(api): State<Arc<Api>>) -> Json<List<Image>> {
    Json(List::all(api.instances.images()))
}

/// Import an image. It is `pending` at first, with its progress; look again until it is `available` or `failed`.
#[utoipa::path(post, path = "/v1/images", tag = "images", request_body = ImportImage,
    responses((status = 202, description = "The image.", body = Image), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn import(
    State(api): State<Arc<Api>>,
    Body(request): Body<ImportImage>,
) -> Result<(StatusCode, Json<Arc<Image>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.import_image(request).await?)))
}

/// Show an image.
#[utoipa::path(get, path = "/v1/images/{id}", tag = "images", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The image.", body = Image), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn get(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Arc<Image>>, Refusal> {
    let found = api.instances.images().into_iter().find(|image| image.id == id || image.name == id);
    Ok(Json(found.ok_or_else(|| Error::not_found(Kind::Image, &id))?))
}

/// Delete an image that nothing is made of. One that is being made is given up.
#[utoipa::path(delete, path = "/v1/images/{id}", tag = "images", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 204, description = "Done."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<StatusCode, Refusal> {
    api.instances.delete_image(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Make an image of a stopped or running instance: of its root disk. A running one is paused while that is copied.
#[utoipa::path(post, path = "/v1/instances/{id}/images", tag = "images", params(("id" = String, Path, description = "Id of the instance.")),
    request_body = CreateImage,
    responses((status = 202, description = "The image, which is `pending` at first.", body = Image), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<CreateImage>,
) -> Result<(StatusCode, Json<Arc<Image>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.create_image(&id, request).await?)))
}
