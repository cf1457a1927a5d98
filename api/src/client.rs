//! A client of the daemon's API, for the command line: one connection a request, over the Unix socket or TCP.

pub mod events;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

/// No answer is longer.
const LONGEST_ANSWER: usize = 64 << 20;

/// Where the daemon is.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// Its Unix socket.
    Socket(PathBuf),
    /// `host:port`, a token, and for TLS what is trusted.
    Tcp { address: String, token: Option<String>, tls: Option<Arc<ClientConfig>> },
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

    /// The body of an answer, as it comes.
    pub async fn stream(&self, path: &str) -> anyhow::Result<Incoming> {
        let response = self.request(Method::GET, path, None::<&()>).await?;
        Ok(successful(response).await?.into_body())
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
        let body = successful(response).await?.into_body();
        Ok(Limited::new(body, LONGEST_ANSWER).collect().await.map_err(broke_off)?.to_bytes())
    }

    /// Sends a request and returns the answer as it comes.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = self.builder(method, path);
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                serde_json::to_vec(body)?
            }
            None => Vec::new(),
        };
        self.transmit(request.body(Full::new(Bytes::from(bytes)))?).await
    }

    /// Asks for a connection on which `protocol` is spoken from then on. Blocks when it is read and written; the
    /// runtime has to be running meanwhile.
    pub async fn upgrade(
        &self,
        path: &str,
        protocol: &str,
    ) -> anyhow::Result<std::os::unix::net::UnixStream> {
        let request = self.builder(Method::GET, path);
        let request = request.header(header::CONNECTION, "upgrade").header(header::UPGRADE, protocol);
        let response = self.transmit(request.body(Full::default())?).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            successful(response).await?;
            bail!("the daemon does not speak {protocol}: is it of another version?");
        }
        let daemon = hyper::upgrade::on(response).await.map_err(broke_off)?;
        // It may be a Unix socket or TCP; what reads it wants the one.
        let (mut near, far) = UnixStream::pair()?;
        tokio::spawn(async move {
            // When one end goes, so does the other; the one who reads sees it.
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(daemon), &mut near).await;
        });
        let far = far.into_std()?;
        far.set_nonblocking(false)?;
        Ok(far)
    }

    /// The beginning of a request.
    fn builder(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        let request = Request::builder().method(method).uri(path).header(header::HOST, "pulau");
        match &self.0 {
            Endpoint::Tcp { token: Some(token), .. } => {
                request.header(header::AUTHORIZATION, format!("Bearer {token}"))
            }
            _ => request,
        }
    }

    async fn transmit(&self, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Incoming>> {
        match &self.0 {
            Endpoint::Socket(path) => {
                let stream = UnixStream::connect(path).await.with_context(|| {
                    format!("cannot reach the daemon at {}: start it with `pulau serve`, or name another place with --socket or --url", path.display())
                })?;
                exchange(stream, request).await
            }
            Endpoint::Tcp { address, tls, .. } => {
                let context = || format!("cannot reach the daemon at {address}");
                let stream = TcpStream::connect(address).await.with_context(context)?;
                let Some(tls) = tls else { return exchange(stream, request).await };
                let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
                let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
                let connecting = TlsConnector::from(tls.clone()).connect(name, stream);
                let stream = connecting
                    .await
                    .with_context(|| format!("{}: is its certificate signed by one in --ca?", context()))?;
                exchange(stream, request).await
            }
        }
    }
}

/// The answer, unless it is a refusal.
async fn successful(response: Response<Incoming>) -> anyhow::Result<Response<Incoming>> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await;
    let answer: Value = serde_json::from_slice(&body.map_err(broke_off)?.to_bytes()).unwrap_or_default();
    let field = |name: &str| answer["error"][name].as_str().map(str::to_owned);
    Err(Refused {
        status: status.as_u16(),
        code: field("code").unwrap_or_else(|| status.to_string()),
        message: field("message").unwrap_or_else(|| "the daemon refused".to_owned()),
    }
    .into())
}

fn broke_off(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("the daemon broke off: {error}")
}

/// Percent-encodes what is not plain.
pub fn escape(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(encode).collect()
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<Response<Incoming>> {
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    match sender.send_request(request).await {
        Ok(response) => Ok(response),
        Err(error) => Err(broke_off(error)),
    }
}
