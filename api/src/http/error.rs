//! The one place where what went wrong gets a status and a code.
//!
//! Codes are for programs and never change; they are EC2's where EC2 has the error. Messages are for people,
//! and say what to do. What is nobody's business but the operator's goes to the log, under the request's id.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::image::ImageError;
use crate::instances::Error;
use crate::microvm::RequestError;
use crate::model::Kind;
use crate::store::StoreError;
use crate::volume::VolumeError;

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
        Error::State { kind: Kind::Instance, .. } => (StatusCode::CONFLICT, "IncorrectInstanceState"),
        Error::State { .. } => (StatusCode::CONFLICT, "IncorrectState"),
        Error::Invalid { .. } => (StatusCode::BAD_REQUEST, "InvalidParameterValue"),
        Error::NoCapacity(_) => (StatusCode::INSUFFICIENT_STORAGE, "InsufficientInstanceCapacity"),
        Error::NoAddress { .. } => (StatusCode::INSUFFICIENT_STORAGE, "InsufficientFreeAddressesInSubnet"),
        Error::TokenReused(_) => (StatusCode::CONFLICT, "IdempotentParameterMismatch"),
        Error::DryRun => (StatusCode::PRECONDITION_FAILED, "DryRunOperation"),
        Error::Protected(_) => (StatusCode::CONFLICT, "OperationNotPermitted"),
        Error::Guest { .. } => (StatusCode::BAD_GATEWAY, "GuestUnavailable"),
        Error::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "RequestTimeout"),
        Error::Machine(RequestError::Busy) => (StatusCode::TOO_MANY_REQUESTS, "RequestLimitExceeded"),
        Error::Machine(RequestError::NotRunning) => (StatusCode::CONFLICT, "IncorrectInstanceState"),
        Error::Machine(_) => (StatusCode::BAD_GATEWAY, "MachineUnavailable"),
        Error::Image(error) => of_image(error),
        Error::Volume(error) => of_volume(error),
        Error::File(_) | Error::Network(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        Error::Store(StoreError::Conflict) => (StatusCode::CONFLICT, "ConcurrentModification"),
        Error::Store(_) => (StatusCode::SERVICE_UNAVAILABLE, "Unavailable"),
        Error::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
    }
}

fn not_found(kind: Kind) -> &'static str {
    match kind {
        Kind::Image => "InvalidImageID.NotFound",
        Kind::Instance => "InvalidInstanceID.NotFound",
        Kind::InstanceType => "InvalidInstanceType",
        Kind::KeyPair => "InvalidKeyPair.NotFound",
        Kind::Network => "InvalidNetworkID.NotFound",
        Kind::SecurityGroup => "InvalidGroup.NotFound",
        Kind::Token => "InvalidToken.NotFound",
        Kind::Volume => "InvalidVolume.NotFound",
    }
}

fn exists(kind: Kind) -> &'static str {
    match kind {
        Kind::Image => "InvalidImageName.Duplicate",
        Kind::KeyPair => "InvalidKeyPair.Duplicate",
        Kind::Network => "InvalidNetworkName.Duplicate",
        Kind::SecurityGroup => "InvalidGroup.Duplicate",
        Kind::Token => "InvalidToken.Duplicate",
        Kind::Instance | Kind::InstanceType | Kind::Volume => "Duplicate",
    }
}

fn in_use(kind: Kind) -> &'static str {
    match kind {
        Kind::Image => "InvalidImage.InUse",
        Kind::SecurityGroup => "InvalidGroup.InUse",
        Kind::Volume => "VolumeInUse",
        _ => "DependencyViolation",
    }
}

fn of_image(error: &ImageError) -> (StatusCode, &'static str) {
    match error {
        ImageError::File(_) => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        _ => (StatusCode::BAD_REQUEST, "InvalidImage"),
    }
}

fn of_volume(error: &VolumeError) -> (StatusCode, &'static str) {
    match error {
        VolumeError::NotFound { .. } => (StatusCode::NOT_FOUND, not_found(Kind::Volume)),
        VolumeError::Shrink { .. } => (StatusCode::BAD_REQUEST, "InvalidParameterValue"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
    }
}
