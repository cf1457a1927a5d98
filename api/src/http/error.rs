//! The one place where what went wrong gets a status and a code.
//!
//! Codes are for programs and never change; they are EC2's where EC2 has the error. Messages are for people,
//! and say what to do. What is nobody's business but the operator's goes to the log, under the request's id.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::instances::{Error, failure};
use crate::microvm::RequestError;
use crate::model::Kind;
use crate::store::StoreError;

/// The body of every answer that is no success.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For programs: `InvalidInstanceID.NotFound`, for one.
    #[schema(value_type = String)]
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// Also in the answer's `x-request-id`, and in the daemon's log.
    pub request_id: String,
}

/// A refusal on its way to the client.
#[derive(Clone, Debug)]
pub struct Refusal {
    pub status: StatusCode,
    pub code: &'static str,
    pub message: String,
}

impl Refusal {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Refusal { status, code, message: message.into() }
    }

    /// A request that cannot be understood.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "MalformedRequest", message)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        // The middleware that knows the request's id writes the body.
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The answer with its body. `headers` are those of the answer so far.
pub fn complete(refusal: Refusal, request_id: &str, headers: &HeaderMap) -> Response {
    let Refusal { status, code, message } = refusal;
    let error = ErrorDetail { code, message, request_id: request_id.to_owned() };
    let mut response = (status, Json(ErrorBody { error })).into_response();
    // RFC 9110, sections 15.5.6 and 15.5.2: what would do.
    if let Some(methods) = headers.get(header::ALLOW) {
        response.headers_mut().insert(header::ALLOW, methods.clone());
    }
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let (status, code) = classify(&error);
        if status.is_server_error() && status != StatusCode::INSUFFICIENT_STORAGE {
            tracing::error!(code, "{error}");
            if matches!(error, Error::Internal(_)) {
                return Refusal::new(status, code, "the host failed to do this; its log says why");
            }
        }
        Refusal::new(status, code, error.to_string())
    }
}

fn classify(error: &Error) -> (StatusCode, &'static str) {
    match error {
        Error::NotFound { kind, .. } => (StatusCode::NOT_FOUND, not_found(*kind)),
        Error::Exists { kind, .. } => (StatusCode::CONFLICT, exists(*kind)),
        Error::InUse { kind, .. } => (StatusCode::CONFLICT, in_use(*kind)),
        Error::PortInUse { .. } => (StatusCode::CONFLICT, "PortInUse"),
        Error::State { kind: Kind::Group, .. } => (StatusCode::CONFLICT, "IncorrectGroupState"),
        Error::State { kind: Kind::Instance, .. } => (StatusCode::CONFLICT, "IncorrectInstanceState"),
        Error::State { .. } => (StatusCode::CONFLICT, "IncorrectState"),
        Error::Invalid { .. } => (StatusCode::BAD_REQUEST, "InvalidParameterValue"),
        Error::NoCapacity(_) => (StatusCode::INSUFFICIENT_STORAGE, "InsufficientInstanceCapacity"),
        Error::NoAddress { .. } => (StatusCode::INSUFFICIENT_STORAGE, "InsufficientFreeAddressesInSubnet"),
        Error::TokenReused(_) => (StatusCode::CONFLICT, "IdempotentParameterMismatch"),
        Error::DryRun => (StatusCode::PRECONDITION_FAILED, "DryRunOperation"),
        Error::Protected(_) | Error::NotPermitted(_) => (StatusCode::CONFLICT, "OperationNotPermitted"),
        Error::AttachmentLimit { .. } => (StatusCode::CONFLICT, "AttachmentLimitExceeded"),
        Error::Guest { .. } => (StatusCode::BAD_GATEWAY, "GuestUnavailable"),
        Error::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "RequestTimeout"),
        Error::Machine(RequestError::Busy) => (StatusCode::TOO_MANY_REQUESTS, "RequestLimitExceeded"),
        Error::Machine(RequestError::NotRunning) => (StatusCode::CONFLICT, "IncorrectInstanceState"),
        Error::Machine(_) => (StatusCode::BAD_GATEWAY, "MachineUnavailable"),
        Error::Image(_) | Error::Volume(_) | Error::File(_) => of_files(failure::of(error)),
        Error::Network(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        Error::Store(StoreError::Conflict) => (StatusCode::CONFLICT, "ConcurrentModification"),
        Error::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "Unavailable"),
        Error::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
    }
}

fn not_found(kind: Kind) -> &'static str {
    match kind {
        Kind::Group => "InvalidAutoScalingGroup.NotFound",
        Kind::Image => "InvalidImageID.NotFound",
        Kind::Instance => "InvalidInstanceID.NotFound",
        Kind::InstanceType => "InvalidInstanceType",
        Kind::KeyPair => "InvalidKeyPair.NotFound",
        Kind::LoadBalancer => "LoadBalancerNotFound",
        Kind::Network => "InvalidNetworkID.NotFound",
        Kind::Patch => "InvalidPatchID.NotFound",
        Kind::PublishedPort => "InvalidPort.NotFound",
        Kind::SecurityGroup => "InvalidGroup.NotFound",
        Kind::Snapshot => "InvalidSnapshot.NotFound",
        Kind::Token => "InvalidToken.NotFound",
        Kind::Volume => "InvalidVolume.NotFound",
    }
}

fn exists(kind: Kind) -> &'static str {
    match kind {
        Kind::Group => "InvalidAutoScalingGroup.Duplicate",
        Kind::Image => "InvalidImageName.Duplicate",
        Kind::KeyPair => "InvalidKeyPair.Duplicate",
        Kind::LoadBalancer => "DuplicateLoadBalancerName",
        Kind::Network => "InvalidNetworkName.Duplicate",
        Kind::SecurityGroup => "InvalidGroup.Duplicate",
        Kind::Token => "InvalidToken.Duplicate",
        Kind::Instance
        | Kind::InstanceType
        | Kind::Patch
        | Kind::PublishedPort
        | Kind::Snapshot
        | Kind::Volume => "Duplicate",
    }
}

fn in_use(kind: Kind) -> &'static str {
    match kind {
        Kind::Image => "InvalidImage.InUse",
        Kind::SecurityGroup => "InvalidGroup.InUse",
        Kind::Snapshot => "InvalidSnapshot.InUse",
        Kind::Volume => "VolumeInUse",
        _ => "DependencyViolation",
    }
}

/// Of work on files: the codes are those that records of failed work have, too.
fn of_files((by, code): failure::Failure) -> (StatusCode, &'static str) {
    let status = match (code, by) {
        ("InvalidVolume.NotFound" | "InvalidImageReference.NotFound", _) => StatusCode::NOT_FOUND,
        ("RegistryAccessDenied", _) => StatusCode::FORBIDDEN,
        ("RegistryUnavailable", _) => StatusCode::BAD_GATEWAY,
        ("InsufficientStorageCapacity", _) => StatusCode::INSUFFICIENT_STORAGE,
        ("Cancelled", _) => StatusCode::CONFLICT,
        (_, failure::By::Client) => StatusCode::BAD_REQUEST,
        (_, failure::By::Server) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, code)
}
