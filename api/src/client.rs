//! A client of the daemon's API, for the command line: one connection a request, over the Unix socket or TCP.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// No answer is longer.
const LONGEST_ANSWER: usize = 64 << 20;

/// Where the daemon is.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// Its Unix socket.
    Socket(PathBuf),
    /// `host:port`, and a token.
    Tcp { address: String, token: Option<String> },
}

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Client(pub Endpoint);

/// The daemon said no.
#[derive(Debug, thiserror::Error)]
#[error("{message} ({code})")]
pub struct Refused {
    pub status: u16,
    pub code: String,
    pub message: String,
}

impl Client {
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None::<&()>).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call(Method::POST, path, Some(body)).await
    }

    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    pub async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::DELETE, path, None::<&()>).await
    }

    /// The body of an answer that is not JSON.
    pub async fn text(&self, path: &str) -> anyhow::Result<String> {
        let body = self.send(Method::GET, path, None::<&()>).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let body = self.send(method, path, body).await?;
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body)
            .context("the daemon's answer is not understood: is it of another version?")
    }

    async fn send(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> anyhow::Result<Bytes> {
        let response = self.request(method, path, body).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!("the daemon broke off: {error}"))?.to_bytes();
        if status.is_success() {
            return Ok(body);
        }
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        let field = |name: &str| answer["error"][name].as_str().map(str::to_owned);
        Err(Refused {
            status: status.as_u16(),
            code: field("code").unwrap_or_else(|| status.to_string()),
            message: field("message").unwrap_or_else(|| "the daemon refused".to_owned()),
        }
        .into())
    }

    /// Sends a request and returns the answer as it comes.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "pulau");
        if let Endpoint::Tcp { token: Some(token), .. } = &self.0 {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                serde_json::to_vec(body)?
            }
            None => Vec::new(),
        };
        let request = request.body(Full::new(Bytes::from(bytes)))?;
        match &self.0 {
            Endpoint::Socket(path) => {
                let stream = UnixStream::connect(path).await.with_context(|| {
                    format!("cannot reach the daemon at {}: start it with `pulau serve`, or name another place with --socket or --url", path.display())
                })?;
                exchange(stream, request).await
            }
            Endpoint::Tcp { address, .. } => {
                let stream = TcpStream::connect(address).await;
                exchange(stream.with_context(|| format!("cannot reach the daemon at {address}"))?, request)
                    .await
            }
        }
    }
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<Response<Incoming>> {
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    match sender.send_request(request).await {
        Ok(response) => Ok(response),
        Err(error) => bail!("the daemon broke off: {error}"),
    }
}
