//! What instances are made of, over HTTP: key pairs, networks, security groups.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path};
use super::{Api, List};
use crate::instances::{
    CreateKeyPair, CreateNetwork, CreateSecurityGroup, CreatedKeyPair, Error, ModifyRules,
};
use crate::model::{KeyPair, Kind, Network, SecurityGroup};

/// List key pairs.
#[utoipa::path(get, path = "/v1/key-pairs", tag = "key pairs",
    responses((status = 200, description = "All key pairs.", body = List<KeyPair>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn key_pairs(State(api): State<Arc<Api>>) -> Json<List<KeyPair>> {
    Json(List::all(api.instances.key_pairs()))
}

/// Make a key pair, or import one.
#[utoipa::path(post, path = "/v1/key-pairs", tag = "key pairs", request_body = CreateKeyPair,
    responses((status = 201, description = "The key pair, and its private half if it was made here.", body = CreatedKeyPair), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create_key_pair(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateKeyPair>,
) -> Result<(StatusCode, Json<CreatedKeyPair>), Refusal> {
    Ok((StatusCode::CREATED, Json(api.instances.create_key_pair(request).await?)))
}

/// Show a key pair: its public half.
#[utoipa::path(get, path = "/v1/key-pairs/{id}", tag = "key pairs", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The key pair.", body = KeyPair), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn key_pair(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<KeyPair>>, Refusal> {
    let found = api.instances.key_pairs().into_iter().find(|key| key.id == id || key.name == id);
    Ok(Json(found.ok_or_else(|| Error::not_found(Kind::KeyPair, &id))?))
}

/// Delete a key pair. Instances that have it keep it.
#[utoipa::path(delete, path = "/v1/key-pairs/{id}", tag = "key pairs", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 204, description = "Done."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete_key_pair(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Refusal> {
    api.instances.delete_key_pair(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List networks.
#[utoipa::path(get, path = "/v1/networks", tag = "networks",
    responses((status = 200, description = "All networks.", body = List<Network>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn networks(State(api): State<Arc<Api>>) -> Json<List<Network>> {
    Json(List::all(api.instances.networks()))
}

/// Make a network, with a security group `default`.
#[utoipa::path(post, path = "/v1/networks", tag = "networks", request_body = CreateNetwork,
    responses((status = 201, description = "The network.", body = Network), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create_network(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateNetwork>,
) -> Result<(StatusCode, Json<Arc<Network>>), Refusal> {
    Ok((StatusCode::CREATED, Json(api.instances.create_network(request).await?)))
}

/// Show a network.
#[utoipa::path(get, path = "/v1/networks/{id}", tag = "networks", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 200, description = "The network.", body = Network), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn network(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<Network>>, Refusal> {
    let found = api.instances.networks().into_iter().find(|network| network.id == id || network.name == id);
    Ok(Json(found.ok_or_else(|| Error::not_found(Kind::Network, &id))?))
}

/// Delete a network that no instance is in, with its security groups.
#[utoipa::path(delete, path = "/v1/networks/{id}", tag = "networks", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 204, description = "Done."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete_network(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Refusal> {
    api.instances.delete_network(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List security groups.
#[utoipa::path(get, path = "/v1/security-groups", tag = "security groups",
    responses((status = 200, description = "All security groups.", body = List<SecurityGroup>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn security_groups(State(api): State<Arc<Api>>) -> Json<List<SecurityGroup>> {
    Json(List::all(api.instances.security_groups()))
}

/// Make a security group.
#[utoipa::path(post, path = "/v1/security-groups", tag = "security groups", request_body = CreateSecurityGroup,
    responses((status = 201, description = "The security group.", body = SecurityGroup), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create_security_group(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateSecurityGroup>,
) -> Result<(StatusCode, Json<Arc<SecurityGroup>>), Refusal> {
    Ok((StatusCode::CREATED, Json(api.instances.create_security_group(request).await?)))
}

/// Show a security group.
#[utoipa::path(get, path = "/v1/security-groups/{id}", tag = "security groups", params(("id" = String, Path, description = "Id of the security group.")),
    responses((status = 200, description = "The security group.", body = SecurityGroup), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn security_group(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<SecurityGroup>>, Refusal> {
    let found = api.instances.host().records.get::<SecurityGroup>(&id);
    Ok(Json(found.ok_or_else(|| Error::not_found(Kind::SecurityGroup, &id))?))
}

/// Replace a security group's rules. Members feel it at once.
#[utoipa::path(patch, path = "/v1/security-groups/{id}", tag = "security groups", params(("id" = String, Path, description = "Id of the security group.")),
    request_body = ModifyRules,
    responses((status = 200, description = "The security group.", body = SecurityGroup), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn modify_rules(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<ModifyRules>,
) -> Result<Json<Arc<SecurityGroup>>, Refusal> {
    Ok(Json(api.instances.modify_rules(&id, &request).await?))
}

/// Delete a security group that nothing uses.
#[utoipa::path(delete, path = "/v1/security-groups/{id}", tag = "security groups", params(("id" = String, Path, description = "Id of the security group.")),
    responses((status = 204, description = "Done."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete_security_group(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Refusal> {
    api.instances.delete_security_group(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
