//! Instances over HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::error::{ErrorBody, Refusal};
use super::extract::{Body, Path, Query};
use super::list::ListInstances;
use super::{Api, List, follow};
use crate::instances::{Error, ModifyInstance, RunInstances, StopInstance};
use crate::microvm::Usage;
use crate::model::{INSTANCE_TYPES, Instance, InstanceState, InstanceType, PublishedPort};

/// Longest wait for a state.
const LONGEST_WAIT: u64 = 600;

/// Instances that a request made.
#[derive(Debug, Serialize, ToSchema)]
pub struct Ran {
    pub instances: Vec<Arc<Instance>>,
}

/// List instances, in order of their ids.
#[utoipa::path(get, path = "/v1/instances", tag = "instances", params(ListInstances),
    responses((status = 200, description = "Instances.", body = List<Instance>), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn list(
    State(api): State<Arc<Api>>,
    Query(query): Query<ListInstances>,
) -> Result<Json<List<Instance>>, Refusal> {
    Ok(Json(query.page(api.instances.host().records.read().instances.iter())?))
}

/// Run instances: all that were asked for at least, or none.
#[utoipa::path(post, path = "/v1/instances", tag = "instances", request_body = RunInstances,
    responses((status = 201, description = "The instances that were run.", body = Ran), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn run(
    State(api): State<Arc<Api>>,
    Body(request): Body<RunInstances>,
) -> Result<(StatusCode, Json<Ran>), Refusal> {
    Ok((StatusCode::CREATED, Json(Ran { instances: api.instances.run(request).await? })))
}

/// Show an instance.
#[utoipa::path(get, path = "/v1/instances/{id}", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    responses((status = 200, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn get(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<Json<Arc<Instance>>, Refusal> {
    Ok(Json(api.instances.get(&id)?))
}

/// Change an instance.
#[utoipa::path(patch, path = "/v1/instances/{id}", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    request_body = ModifyInstance,
    responses((status = 200, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn modify(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<ModifyInstance>,
) -> Result<Json<Arc<Instance>>, Refusal> {
    Ok(Json(api.instances.modify(&id, &request).await?))
}

/// Terminate an instance: end it for good, with its root disk and the volumes that are to go with it.
#[utoipa::path(delete, path = "/v1/instances/{id}", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    responses((status = 202, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn terminate(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Arc<Instance>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.terminate(&id).await?)))
}

/// Start a stopped instance.
#[utoipa::path(post, path = "/v1/instances/{id}/start", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    responses((status = 202, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn start(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Arc<Instance>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.start(&id).await?)))
}

/// Stop an instance. It keeps its id, disks and address.
#[utoipa::path(post, path = "/v1/instances/{id}/stop", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    request_body = StopInstance,
    responses((status = 202, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn stop(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(how): Body<StopInstance>,
) -> Result<(StatusCode, Json<Arc<Instance>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.stop(&id, how).await?)))
}

/// Boot a running instance anew.
#[utoipa::path(post, path = "/v1/instances/{id}/reboot", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    responses((status = 202, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn reboot(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Arc<Instance>>), Refusal> {
    Ok((StatusCode::ACCEPTED, Json(api.instances.reboot(&id).await?)))
}

/// Publish a port of an instance: have a port of the host lead to it, whatever its security groups say.
#[utoipa::path(post, path = "/v1/instances/{id}/publish", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    request_body = PublishedPort,
    responses((status = 200, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn publish(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(port): Body<PublishedPort>,
) -> Result<Json<Arc<Instance>>, Refusal> {
    Ok(Json(api.instances.publish(&id, port).await?))
}

/// Take back that a port is published. Connections that exist go on.
#[utoipa::path(post, path = "/v1/instances/{id}/unpublish", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    request_body = PublishedPort,
    responses((status = 200, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn unpublish(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(port): Body<PublishedPort>,
) -> Result<Json<Arc<Instance>>, Refusal> {
    Ok(Json(api.instances.unpublish(&id, port).await?))
}

/// What to wait for.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct WaitFor {
    /// The state to wait for.
    pub state: InstanceState,
    /// Whether the agent in the guest must answer, too.
    #[serde(default)]
    pub agent: bool,
    /// 1 to 600; 60 if absent.
    #[serde(default)]
    #[param(minimum = 1, maximum = 600)]
    pub timeout_seconds: Option<u64>,
}

/// Wait until an instance is in a state, or cannot come there any more by itself.
#[utoipa::path(get, path = "/v1/instances/{id}/wait", tag = "instances", params(("id" = String, Path, description = "Id of the instance."), WaitFor),
    responses((status = 200, description = "The instance.", body = Instance), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn wait(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Query(wait): Query<WaitFor>,
) -> Result<Json<Arc<Instance>>, Refusal> {
    let seconds = wait.timeout_seconds.unwrap_or(60);
    if !(1..=LONGEST_WAIT).contains(&seconds) {
        return Err(Error::invalid("timeout_seconds", format_args!("must be 1 to {LONGEST_WAIT}")).into());
    }
    let waiting = api.instances.wait(&id, wait.state, wait.agent);
    match tokio::time::timeout(Duration::from_secs(seconds), waiting).await {
        Ok(instance) => Ok(Json(instance?)),
        Err(_) => Err(Error::Timeout(seconds).into()),
    }
}

/// How to show a console.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ShowConsole {
    /// Whether to go on with what comes, until the connection is closed.
    #[serde(default)]
    pub follow: bool,
}

/// Show what an instance wrote to its serial console: the last 64 KiB, over all its boots.
#[utoipa::path(get, path = "/v1/instances/{id}/console", tag = "instances", params(("id" = String, Path, description = "Id of the instance."), ShowConsole),
    responses((status = 200, description = "The end of what it wrote.", content_type = "text/plain", body = String), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn console(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Query(how): Query<ShowConsole>,
) -> Result<impl IntoResponse, Refusal> {
    let body = if how.follow {
        let log = api.instances.console_log(&id)?;
        follow::console(&api, id, log)?
    } else {
        api.instances.console(&id).await?.into()
    };
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body))
}

/// Show what a running instance uses of the host.
#[utoipa::path(get, path = "/v1/instances/{id}/metrics", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    responses((status = 200, description = "What it uses now, and has used since it was started.", body = Object), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn metrics(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Usage>, Refusal> {
    let usage = api.instances.machine(&id)?.usage().await.map_err(Error::from)?;
    Ok(Json(usage))
}

/// A command for a guest.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Given to it as standard input.
    #[serde(default)]
    pub stdin: String,
    /// User of the guest; root if absent.
    #[serde(default)]
    pub user: Option<String>,
    /// 1 to 600; 60 if absent.
    #[serde(default)]
    pub timeout_seconds: Option<u64>,
}

/// How a command ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExecResult {
    /// Its exit code, or 128 and the number of the signal that ended it.
    pub exit_code: i32,
    /// As UTF-8, what is none replaced; at most 1 MiB.
    pub stdout: String,
    pub stderr: String,
    /// Whether it wrote more than that to either.
    pub truncated: bool,
}

/// Run a command in a guest by its agent, and wait for it.
#[utoipa::path(post, path = "/v1/instances/{id}/exec", tag = "instances", params(("id" = String, Path, description = "Id of the instance.")),
    request_body = Exec,
    responses((status = 200, description = "How the command ended, and what it wrote.", body = ExecResult), (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn exec(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    Body(request): Body<Exec>,
) -> Result<Json<ExecResult>, Refusal> {
    let seconds = request.timeout_seconds.unwrap_or(60);
    if !(1..=LONGEST_WAIT).contains(&seconds) {
        return Err(Error::invalid("timeout_seconds", format_args!("must be 1 to {LONGEST_WAIT}")).into());
    }
    if request.argv.is_empty() {
        return Err(Error::invalid("argv", "must not be empty").into());
    }
    let limit = Duration::from_secs(seconds);
    let (output, truncated) =
        api.instances.exec(&id, request.argv, request.stdin, request.user, limit).await?;
    Ok(Json(ExecResult {
        exit_code: output.status.shell_code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        truncated,
    }))
}

/// The sizes that have names.
#[derive(Debug, Serialize, ToSchema)]
pub struct Types {
    pub items: Vec<InstanceType>,
}

/// List the instance types.
#[utoipa::path(get, path = "/v1/instance-types", tag = "instances", responses((status = 200, description = "The sizes that have names.", body = Types)))]
pub async fn types() -> Json<Types> {
    Json(Types { items: INSTANCE_TYPES.to_vec() })
}
