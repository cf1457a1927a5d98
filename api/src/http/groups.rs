//! Groups over HTTP.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path, Query};
use super::list::ListNamed;
use super::{Api, List};
use crate::groups::{CreateGroup, DeleteGroup, ModifyGroup, RollGroup};
use crate::model::Group;

/// List groups, in order of their ids.
#[utoipa::path(get, path = "/v1/groups", tag = "groups", params(ListNamed),
    responses((status = 200, description = "Groups.", body = List<Group>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<ListNamed>,
) -> Result<Json<List<Group>>, Refusal> {
    Ok(Json(query.page(api.instances.host().records.read().groups.iter())?))
}

/// Make a group: so many instances of a template are kept from then on.
#[utoipa::path(post, path = "/v1/groups", tag = "groups", request_body = CreateGroup,
    responses((status = 202, description = "The group.", body = Group), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateGroup>,
) -> Result<(StatusCode, Json<Arc<Group>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.groups.create(request).await?)))
}

/// Show a group, with its members.
#[utoipa::path(get, path = "/v1/groups/{id}", tag = "groups", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The group.", body = Group), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn get(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Arc<Group>>, Refusal> {
    Ok(Json(api.groups.get(&id)?))
}

/// Change a group.
#[utoipa::path(patch, path = "/v1/groups/{id}", tag = "groups", params(("id" = String, Path, description = "Id or name.")),
    request_body = ModifyGroup,
    responses((status = 202, description = "The group.", body = Group), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn modify(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<ModifyGroup>,
) -> Result<(StatusCode, Json<Arc<Group>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.groups.modify(&id, request).await?)))
}

/// Delete a group, with its instances unless they are to stay. It is there until they are gone.
#[utoipa::path(delete, path = "/v1/groups/{id}", tag = "groups", params(("id" = String, Path, description = "Id or name."), DeleteGroup),
    responses((status = 202, description = "It is being deleted."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Query(how): Query<DeleteGroup>,
) -> Result<StatusCode, Refusal> {
    api.groups.delete(&id, how).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Replace all members of a group, a few at a time, by ones of another image or template. If a new one does not
/// become healthy, the group goes back to what it was.
#[utoipa::path(post, path = "/v1/groups/{id}/roll", tag = "groups", params(("id" = String, Path, description = "Id or name.")),
    request_body = RollGroup,
    responses((status = 202, description = "The group.", body = Group), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn roll(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<RollGroup>,
) -> Result<(StatusCode, Json<Arc<Group>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.groups.roll(&id, request).await?)))
}

/// Take back a roll that is under way.
#[utoipa::path(post, path = "/v1/groups/{id}/rollback", tag = "groups", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 202, description = "The group.", body = Group), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn roll_back(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Arc<Group>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.groups.roll_back(&id).await?)))
}

/// Pause a group: nothing is launched or terminated until it is resumed.
#[utoipa::path(post, path = "/v1/groups/{id}/pause", tag = "groups", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The group.", body = Group), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn pause(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Arc<Group>>, Refusal> {
    Ok(Json(api.groups.pause(&id).await?))
}

/// Resume a group that was paused, or that waits because launches failed.
#[utoipa::path(post, path = "/v1/groups/{id}/resume", tag = "groups", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The group.", body = Group), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn resume(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<Group>>, Refusal> {
    Ok(Json(api.groups.resume(&id).await?))
}
