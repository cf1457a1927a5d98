//! Hands requests of HTTP/1.1 on, by hyper's server and its client with a pool of connections to the targets.
//!
//! A request whose target does not take the connection goes to another one: nothing was sent. If the connection
//! breaks before an answer has begun, only a request that may be repeated without harm (RFC 9110, section 9.2.2)
//! and has no body goes to another one. The client's own headers about who asks are kept, and added to.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{Either, Full};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::targets::{Lease, Targets};
use super::tcp::CONNECT_WITHIN;
use crate::model::Algorithm;

/// For the beginning of an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// For a client's request line and headers.
const HEADERS_WITHIN: Duration = Duration::from_secs(30);
/// Unused connections to targets are closed after this.
const IDLE: Duration = Duration::from_secs(20);
/// Targets that one request is tried at.
const TRIES: usize = 3;

/// Headers of one connection, not of the message (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Connections to targets. Clones share them.
pub type Pool = Client<HttpConnector, Replayable>;

pub fn pool() -> Pool {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_WITHIN));
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new())
        .pool_idle_timeout(IDLE)
        .pool_timer(TokioTimer::new())
        .set_host(false)
        .build(connector)
}

/// Serves one client's connection, until it ends or `ended` says so, between two requests.
pub async fn serve(
    client: TcpStream,
    peer: IpAddr,
    targets: Arc<Targets>,
    algorithm: Algorithm,
    pool: Pool,
    mut ended: watch::Receiver<bool>,
) {
    let _ = client.set_nodelay(true);
    let service = service_fn(|request| {
        let (targets, pool) = (targets.clone(), pool.clone());
        async move { Ok::<_, Infallible>(hand_on(request, peer, &targets, algorithm, &pool).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .serve_connection(TokioIo::new(client), service);
    tokio::pin!(connection);
    tokio::select! {
        _ = &mut connection => return,
        _ = ended.wait_for(|ended| *ended) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

type Answer = Response<Either<Held, Full<Bytes>>>;

async fn hand_on(
    request: Request<Incoming>,
    peer: IpAddr,
    targets: &Targets,
    algorithm: Algorithm,
    pool: &Pool,
) -> Answer {
    targets.counts.requests.fetch_add(1, Ordering::Relaxed);
    if request.method() == Method::CONNECT {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "this leads to its own targets only\n");
    }
    let (mut parts, body) = request.into_parts();
    forwarded(&mut parts.headers, peer);
    let repeatable = body.is_end_stream() && parts.method.is_idempotent();
    let body = Replayable(Arc::new(Mutex::new(body)));
    let mut tried = Vec::new();
    while tried.len() < TRIES {
        let Some(mut lease) = targets.choose(algorithm, &tried) else { break };
        if !tried.is_empty() {
            targets.counts.retries.fetch_add(1, Ordering::Relaxed);
        }
        let Some(uri) = uri(lease.address(), &parts.uri) else {
            return plain(StatusCode::BAD_REQUEST, "the request's target cannot be understood\n");
        };
        let mut request = Request::new(body.clone());
        (*request.method_mut(), *request.uri_mut()) = (parts.method.clone(), uri);
        *request.version_mut() = Version::HTTP_11;
        *request.headers_mut() = parts.headers.clone();
        // Of a client that speaks HTTP/1.0.
        let own = HeaderValue::from_str(&lease.address().to_string());
        if let (false, Ok(own)) = (request.headers().contains_key(header::HOST), own) {
            request.headers_mut().insert(header::HOST, own);
        }
        let answered = tokio::select! {
            answered = tokio::time::timeout(ANSWER_WITHIN, pool.request(request)) => answered,
            () = lease.cut() => return plain(StatusCode::BAD_GATEWAY, "the target was taken away\n"),
        };
        match answered {
            Ok(Ok(response)) => return answer(response, lease),
            Ok(Err(error)) if error.is_connect() || repeatable => {
                tracing::debug!(target = %lease.address(), "is passed over: {error}");
                tried.push(lease.address());
            }
            Ok(Err(_)) => {
                targets.counts.refused.fetch_add(1, Ordering::Relaxed);
                return plain(StatusCode::BAD_GATEWAY, "the target broke off\n");
            }
            Err(_) => {
                targets.counts.refused.fetch_add(1, Ordering::Relaxed);
                return plain(StatusCode::GATEWAY_TIMEOUT, "the target does not answer\n");
            }
        }
    }
    targets.counts.refused.fetch_add(1, Ordering::Relaxed);
    match tried.is_empty() {
        true => plain(StatusCode::SERVICE_UNAVAILABLE, "there is no healthy target\n"),
        false => plain(StatusCode::BAD_GATEWAY, "no target takes the request\n"),
    }
}

fn plain(status: StatusCode, text: &'static str) -> Answer {
    let mut response = Response::new(Either::Right(Full::from(text)));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

fn answer(response: Response<Incoming>, mut lease: Lease) -> Answer {
    let (mut parts, body) = response.into_parts();
    strip(&mut parts.headers);
    parts.version = Version::HTTP_11;
    Response::from_parts(parts, Either::Left(Held { body, cut: Box::pin(async move { lease.cut().await }) }))
}

fn uri(at: SocketAddr, wanted: &Uri) -> Option<Uri> {
    let path = wanted.path_and_query().map_or("/", |path| path.as_str());
    Uri::builder().scheme("http").authority(at.to_string()).path_and_query(path).build().ok()
}

/// Removes what is of the connection, and says for whom it is.
fn forwarded(headers: &mut HeaderMap, peer: IpAddr) {
    strip(headers);
    let before: Vec<&str> =
        headers.get_all(FORWARDED_FOR).iter().filter_map(|value| value.to_str().ok()).collect();
    let chain = before.into_iter().map(str::to_owned).chain([peer.to_canonical().to_string()]);
    let chain = chain.collect::<Vec<_>>().join(", ");
    if let Ok(chain) = HeaderValue::from_str(&chain) {
        headers.insert(FORWARDED_FOR, chain);
    }
    headers.entry(FORWARDED_PROTO).or_insert(HeaderValue::from_static("http"));
    if let Some(host) = headers.get(header::HOST).cloned() {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
}

fn strip(headers: &mut HeaderMap) {
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// A request's body, which can be given to another target as long as none of it has been read.
#[derive(Clone)]
pub struct Replayable(Arc<Mutex<Incoming>>);

impl Body for Replayable {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).size_hint()
    }
}

/// An answer's body: its target is at work until it has gone. It breaks off if the target is taken away.
pub struct Held {
    body: Incoming,
    cut: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Body for Held {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.cut.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err("the target was taken away".into())));
        }
        Pin::new(&mut self.body).poll_frame(context).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_the_connection_stay_on_it() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("upgrade", "websocket"),
            ("host", "example.org"),
            ("x-forwarded-for", "192.0.2.1"),
            ("accept", "*/*"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        forwarded(&mut headers, "::ffff:203.0.113.5".parse().unwrap());
        let get = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        assert_eq!((get("connection"), get("x-secret"), get("upgrade")), (None, None, None));
        assert_eq!(get("x-forwarded-for"), Some("192.0.2.1, 203.0.113.5"));
        assert_eq!((get("x-forwarded-host"), get("accept")), (Some("example.org"), Some("*/*")));
        assert_eq!(
            uri("10.0.0.4:80".parse().unwrap(), &Uri::from_static("/a?b")).unwrap(),
            "http://10.0.0.4:80/a?b"
        );
    }
}
