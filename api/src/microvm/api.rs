//! A client of the VMM's control API: one HTTP connection over its Unix socket, one request at a time.

use std::io;
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use pulau_vmm::config::Fault;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::socket::PinnedSocket;

/// No answer is longer. The VMM may be in the hands of its guest.
const MAX_ANSWER: usize = 1 << 20;

/// A request to the VMM that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The VMM says no, and why.
    #[error("{message}")]
    Refused {
        status: StatusCode,
        /// The answer's `fault_message`.
        message: String,
    },
    #[error("the VMM did not answer {request} within {} s", limit.as_secs())]
    TimedOut { request: String, limit: Duration },
    #[error("cannot connect to the VMM: {0}")]
    Connect(#[source] io::Error),
    #[error("the connection to the VMM broke during {request}: {cause}")]
    Broken { request: String, cause: String },
    #[error("the VMM's answer to {request} cannot be understood: {cause}")]
    Answer { request: String, cause: String },
}

/// A connection to one VMM.
#[derive(Debug)]
pub struct Api {
    sender: SendRequest<Full<Bytes>>,
    /// How long one request may take.
    limit: Duration,
}

impl Api {
    /// Connects to the socket at `path`, which must not be a symbolic link. Each request may take `limit`.
    ///
    /// # Errors
    ///
    /// [`ApiError::Connect`], also while the VMM has not made its socket yet.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, ApiError> {
        let socket = PinnedSocket::open(path).map_err(ApiError::Connect)?;
        let stream = UnixStream::connect(socket.path()).await.map_err(ApiError::Connect)?;
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(|e| ApiError::Connect(io::Error::other(e)))?;
        // Ends by itself when either side closes. What goes wrong is seen by the request under way.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Api { sender, limit })
    }

    /// From now on, each request may take `limit`.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Sets or does something: `PUT path`.
    pub async fn put(&mut self, path: &str, body: &impl Serialize) -> Result<(), ApiError> {
        self.send(Method::PUT, path, Some(body)).await.map(drop)
    }

    /// Changes something: `PATCH path`.
    pub async fn patch(&mut self, path: &str, body: &impl Serialize) -> Result<(), ApiError> {
        self.send(Method::PATCH, path, Some(body)).await.map(drop)
    }

    /// Asks for something: `GET path`.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, ApiError> {
        let answer = self.send(Method::GET, path, None::<&()>).await?;
        serde_json::from_slice(&answer)
            .map_err(|e| ApiError::Answer { request: format!("GET {path}"), cause: e.to_string() })
    }

    async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes, ApiError> {
        let name = format!("{method} {path}");
        let broken = |cause: String| ApiError::Broken { request: name.clone(), cause };
        let answer = |cause: String| ApiError::Answer { request: name.clone(), cause };
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|e| broken(e.to_string()))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Accept", "application/json")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| broken(e.to_string()))?;
        let limit = self.limit;
        let exchange = async {
            self.sender.ready().await.map_err(|e| broken(e.to_string()))?;
            let response = self.sender.send_request(request).await.map_err(|e| broken(e.to_string()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Ok((status, body.map_err(|e| answer(e.to_string()))?.to_bytes()))
        };
        let timed_out = |_| ApiError::TimedOut { request: name.clone(), limit };
        let (status, body) = timeout(limit, exchange).await.map_err(timed_out)??;
        if status.is_success() {
            Ok(body)
        } else {
            Err(ApiError::Refused { status, message: fault(status, &body) })
        }
    }
}

/// The reason in an error's body, or something in its place.
fn fault(status: StatusCode, body: &[u8]) -> String {
    match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => fault.fault_message,
        Err(_) => format!("the VMM answered {status} without a reason"),
    }
}

#[cfg(test)]
#[path = "api_tests.rs"]
mod tests;
