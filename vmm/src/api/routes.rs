//! From method, path and body to an [`Action`], and from what became of it to a response: all that is
//! HTTP about the control API. The paths, messages and status codes are Firecracker's.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Action, Answer};
use crate::config::{
    ActionConfig, ActionType, BalloonHintingStart, DriveConfig, DriveUpdate, Fault, MachineConfigUpdate,
    MmdsConfig, MmdsVersion, NetworkInterfaceConfig, NetworkInterfaceUpdate, PmemConfig, PmemUpdate,
    SnapshotLoadConfig, Version, VmStateChange, VmStateUpdate, VsockConfig,
};
use crate::control::ControlError;
use crate::http::{Response, Status};

/// Why a request asks for nothing the VMM can do. Always answered with 400.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("Invalid request method and/or path: {method} {path}.")]
    NoRoute { method: String, path: String },
    #[error("{method} request cannot have a body.")]
    UnexpectedBody { method: &'static str },
    #[error("Empty {method} request.")]
    EmptyBody { method: &'static str },
    #[error("The ID cannot be empty.")]
    EmptyId,
    #[error("The id from the path [{path}] does not match the id from the body [{body}]!")]
    IdMismatch { path: String, body: String },
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(#[from] serde_json::Error),
}

/// What a request asks for.
#[derive(Debug)]
pub struct Routed {
    pub action: Action,
    /// Why the client should ask in another way next time.
    pub deprecated: Option<&'static str>,
}

impl From<Action> for Routed {
    fn from(action: Action) -> Self {
        Self { action, deprecated: None }
    }
}

/// Finds out what a request asks for. An absent body is an empty one.
pub fn route(method: &str, path: &str, body: &[u8]) -> Result<Routed, RouteError> {
    // As Firecracker does it: slashes at the beginning and one at the end do not matter.
    let trimmed = path.trim_start_matches('/');
    let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
    let mut parts = trimmed.split('/');
    let segments = [parts.next().unwrap_or_default(), parts.next().unwrap_or_default()];
    let rest = [parts.next().unwrap_or_default(), parts.next().unwrap_or_default()];
    let no_route = || RouteError::NoRoute { method: short(method), path: short(path) };
    if parts.next().is_some() || !rest[1].is_empty() {
        return Err(no_route());
    }
    let routed = match method {
        "GET" if !body.is_empty() => return Err(RouteError::UnexpectedBody { method: "GET" }),
        "DELETE" if !body.is_empty() => return Err(RouteError::UnexpectedBody { method: "DELETE" }),
        "PUT" if body.is_empty() => return Err(RouteError::EmptyBody { method: "PUT" }),
        "GET" => get(segments, rest[0]).map(Routed::from),
        "PUT" if rest[0].is_empty() => put(segments, body)?,
        "PATCH" => patch(segments, rest[0], body)?,
        "DELETE" if rest[0].is_empty() => delete(segments)?,
        _ => None,
    };
    routed.ok_or_else(no_route)
}

/// A client's text as it may go into a message.
fn short(text: &str) -> String {
    text.chars().take(128).collect()
}

fn get(segments: [&str; 2], third: &str) -> Option<Action> {
    Some(match (segments, third) {
        (["", ""], "") => Action::GetInstanceInfo,
        (["version", ""], "") => Action::GetVersion,
        (["vm", "config"], "") => Action::GetFullConfig,
        (["machine-config", ""], "") => Action::GetMachineConfig,
        (["mmds", ""], "") => Action::GetMmds,
        (["metrics", ""], "") => Action::GetMetrics,
        (["balloon", ""], "") => Action::GetBalloon,
        (["balloon", "statistics"], "") => Action::GetBalloonStats,
        (["balloon", "hinting"], "status") => Action::GetBalloonHinting,
        (["hotplug", "memory"], "") => Action::Unsupported("Memory hotplug is"),
        _ => return None,
    })
}

fn put(segments: [&str; 2], body: &[u8]) -> Result<Option<Routed>, RouteError> {
    let mut deprecated = None;
    let action = match segments {
        ["actions", ""] => match json::<ActionConfig>(body)?.action_type {
            ActionType::InstanceStart => Action::Start,
            ActionType::FlushMetrics => Action::FlushMetrics,
            ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
        },
        ["machine-config", ""] => {
            let config: crate::config::MachineConfig = json(body)?;
            deprecated = config
                .cpu_template
                .is_some()
                .then_some("PUT /machine-config: cpu_template field is deprecated.");
            Action::SetMachineConfig(config)
        }
        ["boot-source", ""] => Action::SetBootSource(json(body)?),
        ["cpu-config", ""] => Action::SetCpuConfig(json(body)?),
        ["drives", id] => {
            let config: DriveConfig = with_id(id, body, |c: &DriveConfig| &c.drive_id)?;
            Action::SetDrive(config)
        }
        ["pmem", id] => Action::SetPmem(with_id(id, body, |c: &PmemConfig| &c.id)?),
        ["network-interfaces", id] => {
            let config = with_id(id, body, |c: &NetworkInterfaceConfig| &c.iface_id)?;
            Action::SetNetworkInterface(config)
        }
        ["vsock", ""] => {
            let config: VsockConfig = json(body)?;
            deprecated = config.vsock_id.is_some().then_some("PUT /vsock: vsock_id field is deprecated.");
            Action::SetVsock(config)
        }
        ["entropy", ""] => Action::SetEntropy(json(body)?),
        ["serial", ""] => Action::SetSerial(json(body)?),
        ["balloon", ""] => Action::SetBalloon(json(body)?),
        ["logger", ""] => Action::SetLogger(json(body)?),
        ["metrics", ""] => Action::SetMetrics(json(body)?),
        ["mmds", ""] => Action::PutMmds(json(body)?),
        ["mmds", "config"] => {
            let config: MmdsConfig = json(body)?;
            deprecated = (config.version == MmdsVersion::V1)
                .then_some("PUT /mmds/config: V1 is deprecated. Use V2 instead.");
            Action::SetMmdsConfig(config)
        }
        ["snapshot", "create"] => Action::CreateSnapshot(json(body)?),
        ["snapshot", "load"] => {
            let config: SnapshotLoadConfig = json(body)?;
            config.backend().map_err(<serde_json::Error as serde::de::Error>::custom)?;
            deprecated = (config.mem_file_path.is_some() || config.enable_diff_snapshots).then_some(
                "PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated.",
            );
            Action::LoadSnapshot(config)
        }
        ["hotplug", "memory"] => Action::Unsupported("Memory hotplug is"),
        _ => return Ok(None),
    };
    Ok(Some(Routed { action, deprecated }))
}

fn patch(segments: [&str; 2], third: &str, body: &[u8]) -> Result<Option<Routed>, RouteError> {
    // The two requests that may come without a body.
    match (segments, third) {
        (["balloon", "hinting"], "start") => {
            let start = if body.is_empty() { BalloonHintingStart::default() } else { json(body)? };
            return Ok(Some(Action::StartBalloonHinting(start).into()));
        }
        (["balloon", "hinting"], "stop") => return Ok(Some(Action::StopBalloonHinting.into())),
        (_, "") => {}
        _ => return Ok(None),
    }
    if body.is_empty() {
        return Err(RouteError::EmptyBody { method: "PATCH" });
    }
    let mut deprecated = None;
    let action = match segments {
        ["vm", ""] => match json::<VmStateUpdate>(body)?.state {
            VmStateChange::Paused => Action::Pause,
            VmStateChange::Resumed => Action::Resume,
        },
        ["machine-config", ""] => {
            let update: MachineConfigUpdate = json(body)?;
            if update.is_empty() {
                return Err(RouteError::EmptyBody { method: "PATCH" });
            }
            deprecated = update
                .cpu_template
                .is_some()
                .then_some("PATCH /machine-config: cpu_template field is deprecated.");
            Action::UpdateMachineConfig(update)
        }
        ["drives", id] => Action::UpdateDrive(with_id(id, body, |u: &DriveUpdate| &u.drive_id)?),
        ["pmem", id] => Action::UpdatePmem(with_id(id, body, |u: &PmemUpdate| &u.id)?),
        ["network-interfaces", id] => {
            let update = with_id(id, body, |u: &NetworkInterfaceUpdate| &u.iface_id)?;
            Action::UpdateNetworkInterface(update)
        }
        ["balloon", ""] => Action::UpdateBalloon(json(body)?),
        ["balloon", "statistics"] => Action::UpdateBalloonStats(json(body)?),
        ["mmds", ""] => Action::PatchMmds(json(body)?),
        ["hotplug", "memory"] => Action::Unsupported("Memory hotplug is"),
        _ => return Ok(None),
    };
    Ok(Some(Routed { action, deprecated }))
}

fn delete(segments: [&str; 2]) -> Result<Option<Routed>, RouteError> {
    match segments {
        ["drives" | "pmem" | "network-interfaces", ""] => Err(RouteError::EmptyId),
        ["drives" | "pmem" | "network-interfaces", _] => {
            Ok(Some(Action::Unsupported("Hot unplug of devices is").into()))
        }
        _ => Ok(None),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, RouteError> {
    Ok(serde_json::from_slice(body)?)
}

/// A body that repeats the id of the path.
fn with_id<T: DeserializeOwned>(
    id: &str,
    body: &[u8],
    id_of: impl Fn(&T) -> &String,
) -> Result<T, RouteError> {
    if id.is_empty() {
        return Err(RouteError::EmptyId);
    }
    let value: T = json(body)?;
    let in_body = id_of(&value);
    if in_body != id {
        return Err(RouteError::IdMismatch { path: short(id), body: short(in_body) });
    }
    Ok(value)
}

/// The response to a request the VMM understood.
pub fn respond(result: &Result<Answer, ControlError>) -> Response {
    let ok = |body: String| Response::json(Status::Ok, body);
    match result {
        Ok(Answer::Done) => Response::empty(Status::NoContent),
        Ok(Answer::InstanceInfo(info)) => ok(to_json(info)),
        Ok(Answer::Version(version)) => ok(to_json(&Version { firecracker_version: version.clone() })),
        Ok(Answer::FullConfig(config)) => ok(to_json(config)),
        Ok(Answer::MachineConfig(config)) => ok(to_json(config)),
        Ok(Answer::Balloon(config)) => ok(to_json(config)),
        Ok(Answer::BalloonStats(stats)) => ok(to_json(stats)),
        Ok(Answer::BalloonHinting(status)) => ok(to_json(status)),
        Ok(Answer::Mmds(text) | Answer::Metrics(text)) => ok(text.clone()),
        Err(error) => {
            let too_large = matches!(error, ControlError::MmdsTooLarge(_));
            fault(if too_large { Status::PayloadTooLarge } else { Status::BadRequest }, error)
        }
    }
}

/// The response to a request that failed.
pub fn fault(status: Status, error: &dyn std::fmt::Display) -> Response {
    Response::json(status, to_json(&Fault { fault_message: error.to_string() }))
}

/// Our own types have only string keys and no serializer that fails.
fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
#[path = "routes_tests.rs"]
mod tests;
