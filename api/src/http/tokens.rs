//! Tokens for those who come over TCP.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::auth::{Role, hash};
use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path};
use super::{Api, List};
use crate::instances::Error;
use crate::model::{ApiToken, Kind, check_name, id};

/// A request to make a token.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// Unique; in the audit log.
    pub name: String,
    pub role: Role,
    /// How long it is good for; forever if absent.
    #[serde(default)]
    pub lifetime_seconds: Option<u32>,
}

/// A token, and its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct CreatedToken {
    #[serde(flatten)]
    pub token: ApiToken,
    /// To be sent as `Authorization: Bearer SECRET`. Shown this once and kept nowhere.
    pub secret: String,
}

/// List the tokens.
#[utoipa::path(get, path = "/v1/tokens", tag = "tokens",
    responses((status = 200, description = "All tokens.", body = List<ApiToken>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(State(api): State<Arc<Api>>) -> Json<List<ApiToken>> {
    let tables = api.instances.host().records.read();
    Json(List::all(tables.api_tokens.iter().cloned().collect()))
}

/// Make a token.
#[utoipa::path(post, path = "/v1/tokens", tag = "tokens", request_body = CreateToken,
    responses((status = 201, description = "The token, and its secret.", body = CreatedToken), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn create(
    State(api): State<Arc<Api>>,
    Body(request): Body<CreateToken>,
) -> Result<(StatusCode, Json<CreatedToken>), Refusal> {
    check_name(&request.name).map_err(Error::from)?;
    let host = api.instances.host();
    let secret = format!("pulau_{}", id::hex(&id::random::<32>()));
    let lifetime = request.lifetime_seconds.map(|seconds| Duration::from_secs(seconds.into()));
    let now = host.now();
    let token = ApiToken {
        id: id::new(id::API_TOKEN),
        name: request.name,
        role: request.role,
        hash: hash(&secret),
        created: now,
        expires: lifetime
            .and_then(|lifetime| now.checked_add_signed(chrono::Duration::from_std(lifetime).ok()?)),
    };
    host.records
        .update(|tables, changes| {
            if tables.api_tokens.iter().any(|known| known.name == token.name) {
                return Err(Error::Exists { kind: Kind::Token, name: token.name.clone() });
            }
            changes.create(&token);
            Ok(())
        })
        .await?;
    Ok((StatusCode::CREATED, Json(CreatedToken { token, secret })))
}

/// Take a token away. Whoever has it is refused from then on.
#[utoipa::path(delete, path = "/v1/tokens/{id}", tag = "tokens", params(("id" = String, Path, description = "Id or name.")),
    responses((status = 204, description = "Done."), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn delete(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<StatusCode, Refusal> {
    api.instances
        .host()
        .records
        .update(|tables, changes| {
            let known = tables.api_tokens.iter().find(|token| token.id == id || token.name == id);
            let known = known.ok_or_else(|| Error::not_found(Kind::Token, &id))?;
            changes.delete::<ApiToken>(tables, &known.id);
            Ok::<_, Error>(())
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
