//! Load balancers over HTTP.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path, Query};
use super::list::ListNamed;
use super::{Api, List};
use crate::balancer::{CreateLoadBalancer, ModifyLoadBalancer};
use crate::model::LoadBalancer;

/// List load balancers, in order of their ids.
#[utoipa::path(get, path = "/v1/load-balancers", tag = "load balancers", params(ListNamed),
    responses((status = 200, description = "Load balancers.", body = List<LoadBalancer>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<ListNamed>,
) -> Result<Json<List<LoadBalancer>>, Refusal> {
    Ok(Json(query.page(api.instances.host().records.read().load_balancers.iter())?))
}

/// Make a load balancer: what comes in at a port of the host is handed on to healthy instances.
#[utoipa::path(post, path = "/v1/load-balancers", tag = "load balancers", request_body = CreateLoadBalancer,
    responses((status = 202, description = "The load balancer.", body = LoadBalancer), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateLoadBalancer>,
) -> Result<(StatusCode, Json<Arc<LoadBalancer>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.balancers.create(request).await?)))
}

/// Show a load balancer, with the health of its targets.
#[utoipa::path(get, path = "/v1/load-balancers/{id}", tag = "load balancers", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The load balancer.", body = LoadBalancer), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<LoadBalancer>>, Refusal> {
    Ok(Json(api.balancers.get(&id)?))
}

/// Change a load balancer. Open connections are not disturbed.
#[utoipa::path(patch, path = "/v1/load-balancers/{id}", tag = "load balancers", params(("id" = String, Path, description = "Id or name.")),
    request_body = ModifyLoadBalancer,
    responses((status = 200, description = "The load balancer.", body = LoadBalancer), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn modify(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<ModifyLoadBalancer>,
) -> Result<Json<Arc<LoadBalancer>>, Refusal> {
    Ok(Json(api.balancers.modify(&id, request).await?))
}

/// Delete a load balancer. Connections through it are closed.
#[utoipa::path(delete, path = "/v1/load-balancers/{id}", tag = "load balancers", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 204, description = "Done."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<StatusCode, Refusal> {
    api.balancers.delete(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
