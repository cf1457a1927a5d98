//! Container images from registries: OCI distribution specification 1.1, pulling only, with the token
//! authentication that Docker's registries brought (`docs/spec/auth/token.md`).
//!
//! A registry is a stranger: what it sends is bounded in size and time and compared with its digest, and a transfer
//! that breaks off is taken up where it ended.

use std::fmt;
use std::io::Write;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use tokio::sync::Mutex;

use crate::files::{FileError, IoContext, Phase, Staged, Task};
use crate::image::blobs::Room;
use crate::image::digest::Hashing;
use crate::image::{Architecture, Digest, ImageError, Images};

use super::challenge::{Challenge, Scheme};
use super::document::{
    CONFIG_LIMIT, Descriptor, ImageConfig, ImageManifest, MANIFEST_LIMIT, Parsed, choose, parse,
};
use super::{Layer, Opened, Reference};

const CONNECT: Duration = Duration::from_secs(10);
/// Between two pieces of an answer.
const SILENCE: Duration = Duration::from_secs(30);
/// Tries of one request or transfer without any progress, with a pause before each but the first.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(200);
const TOKEN_LIMIT: u64 = 1 << 20;
const DOCUMENTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// A user of a registry. Not shown by `Debug`.
#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.user)
    }
}

/// A connection to one image in a registry.
pub struct Registry {
    client: Client,
    reference: Reference,
    credentials: Option<Credentials>,
    /// What the registry wants to see with every request, once it has said so.
    authorization: Mutex<Option<String>>,
}

impl Registry {
    /// Prepares to connect.
    ///
    /// # Errors
    ///
    /// TLS cannot be set up.
    pub fn new(reference: Reference, credentials: Option<Credentials>) -> Result<Self, ImageError> {
        let registry = &reference.registry;
        let failed = |why: String| ImageError::Registry { registry: registry.clone(), why };
        let mut roots = rustls::RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| failed(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut client = Client::builder();
        if reference.is_loopback() {
            client = client.no_proxy();
        }
        let client = client
            .tls_backend_preconfigured(tls)
            .user_agent(concat!("pulau/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE)
            .build()
            .map_err(|e| failed(explain(&e)))?;
        Ok(Registry { client, reference, credentials, authorization: Mutex::default() })
    }

    fn url(&self, kind: &str, selector: &str) -> String {
        let scheme = if self.reference.is_loopback() { "http" } else { "https" };
        let Reference { repository, .. } = &self.reference;
        format!("{scheme}://{}/v2/{repository}/{kind}/{selector}", self.reference.host())
    }

    fn failed(&self, why: impl Into<String>) -> ImageError {
        ImageError::Registry { registry: self.reference.registry.clone(), why: why.into() }
    }

    fn denied(&self, why: &str) -> ImageError {
        let Reference { registry, .. } = &self.reference;
        ImageError::Denied { registry: registry.clone(), image: self.reference.image(), why: why.to_owned() }
    }

    /// Sends a GET until there is an answer that counts.
    async fn get(&self, url: &str, from: u64) -> Result<Response, ImageError> {
        let mut last = String::new();
        let mut challenged = false;
        let mut tries = 0;
        while tries < TRIES {
            let mut request = self.client.get(url).header(ACCEPT, DOCUMENTS);
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            if let Some(authorization) = self.authorization.lock().await.as_ref() {
                request = request.header(AUTHORIZATION, authorization);
            }
            last = match request.send().await {
                Err(e) => explain(&e),
                Ok(answer) => match answer.status() {
                    status if status.is_success() => return Ok(answer),
                    // Once for the first request, and again when a token has run out.
                    StatusCode::UNAUTHORIZED if !challenged => {
                        challenged = true;
                        self.authorize(&answer).await?;
                        continue;
                    }
                    StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                        return Err(self.denied(match self.credentials {
                            Some(_) => "user or password are wrong, or the user may not read it",
                            None => "a user and password are needed, or there is no such image",
                        }));
                    }
                    StatusCode::NOT_FOUND => {
                        let Reference { registry, .. } = &self.reference;
                        let (registry, image) = (registry.clone(), self.reference.image());
                        return Err(ImageError::NotFound { registry, image });
                    }
                    StatusCode::TOO_MANY_REQUESTS => "it wants fewer requests; try again later".to_owned(),
                    status if status.is_server_error() => format!("it answers {status}"),
                    status => return Err(self.failed(format!("it answers {status}"))),
                },
            };
            tries += 1;
            tokio::time::sleep(PAUSE * 2u32.pow(tries)).await;
        }
        Err(self.failed(format!("{last} (tried {TRIES} times)")))
    }

    /// Does what a 401 asks for.
    async fn authorize(&self, answer: &Response) -> Result<(), ImageError> {
        let headers = answer.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<Challenge> =
            headers.iter().filter_map(|value| Challenge::parse(value.to_str().ok()?)).collect();
        let find = |scheme| challenges.iter().find(|challenge| challenge.scheme == scheme);
        let value = if let Some(challenge) = find(Scheme::Bearer) {
            format!("Bearer {}", self.token(challenge).await?)
        } else if find(Scheme::Basic).is_some() {
            let Some(Credentials { user, password }) = &self.credentials else {
                return Err(self.denied("a user and password are needed"));
            };
            // Only what is sent to the registry itself; reqwest drops it when redirected elsewhere.
            let request = self.client.get("http://unused").basic_auth(user, Some(password));
            header_of(request).ok_or_else(|| self.denied("the password cannot be sent"))?
        } else {
            return Err(self.failed("it wants an authentication that is not supported"));
        };
        *self.authorization.lock().await = Some(value);
        Ok(())
    }

    /// Fetches a token from where the registry says.
    async fn token(&self, challenge: &Challenge) -> Result<String, ImageError> {
        let bad = || self.failed("it names an unusable place to get a token from");
        let mut url = reqwest::Url::parse(challenge.get("realm").ok_or_else(bad)?).map_err(|_| bad())?;
        let safe = url.scheme() == "https" || (url.scheme() == "http" && self.reference.is_loopback());
        if !safe {
            return Err(self.failed("it wants the password sent without encryption"));
        }
        let scope = format!("repository:{}:pull", self.reference.repository);
        if let Some(service) = challenge.get("service") {
            url.query_pairs_mut().append_pair("service", service);
        }
        url.query_pairs_mut().append_pair("scope", &scope);
        let mut request = self.client.get(url);
        if let Some(Credentials { user, password }) = &self.credentials {
            request = request.basic_auth(user, Some(password));
        }
        let answer = request.send().await.map_err(|e| self.failed(explain(&e)))?;
        match answer.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(self.denied("user or password are wrong"));
            }
            status => return Err(self.failed(format!("where it gives out tokens, the answer is {status}"))),
        }
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let body = self.body(answer, TOKEN_LIMIT).await?;
        let token: Token = serde_json::from_slice(&body).map_err(|_| bad())?;
        token.token.or(token.access_token).ok_or_else(bad)
    }

    /// All of a short answer.
    async fn body(&self, mut answer: Response, limit: u64) -> Result<Vec<u8>, ImageError> {
        let mut body = Vec::new();
        loop {
            match answer.chunk().await.map_err(|e| self.failed(explain(&e)))? {
                None => return Ok(body),
                Some(chunk) => body.extend_from_slice(&chunk),
            }
            let size = body.len() as u64;
            if size > limit {
                let what = format!("what {} sends", self.reference.registry);
                return Err(ImageError::TooLarge { what, size, limit });
            }
        }
    }

    /// A document, compared with its digest if there is one.
    async fn document(
        &self,
        kind: &str,
        selector: &str,
        expected: Option<Digest>,
        limit: u64,
    ) -> Result<Vec<u8>, ImageError> {
        let url = self.url(kind, selector);
        let mut tries = 1;
        let bytes = loop {
            let answer = self.get(&url, 0).await?;
            match self.body(answer, limit).await {
                Err(ImageError::Registry { .. }) if tries < TRIES => tries += 1,
                result => break result?,
            }
        };
        let found = Digest::of(&bytes);
        match expected.filter(|expected| *expected != found) {
            None => Ok(bytes),
            Some(expected) => Err(ImageError::Digest {
                what: format!("{kind}/{selector} of {}", self.reference),
                expected,
                found,
            }),
        }
    }

    /// The manifest for an architecture.
    async fn manifest(&self, architecture: Architecture) -> Result<ImageManifest, ImageError> {
        let name = self.reference.to_string();
        let (selector, digest) = (self.reference.selector(), self.reference.digest);
        let bytes = self.document("manifests", &selector, digest, MANIFEST_LIMIT).await?;
        let index = match parse(&bytes, &name)? {
            Parsed::Image(manifest) => return Ok(manifest),
            Parsed::Index(index) => index,
        };
        let digest = choose(index, architecture, None, &name)?.digest;
        let bytes = self.document("manifests", &digest.to_string(), Some(digest), MANIFEST_LIMIT).await?;
        match parse(&bytes, &name)? {
            Parsed::Image(manifest) => Ok(manifest),
            Parsed::Index(_) => Err(ImageError::invalid(name, "it has an index within an index")),
        }
    }

    /// Downloads a blob, taking it up again where it broke off.
    async fn download(
        &self,
        to: &mut Staged,
        blob: &Descriptor,
        room: &mut Room<'_>,
        watched: &Watched<'_>,
    ) -> Result<(), ImageError> {
        let url = self.url("blobs", &blob.digest.to_string());
        let path = to.path().to_owned();
        let mut out = Hashing::new(to.file_mut());
        let mut barren = 0;
        while out.count() < blob.size {
            let start = out.count();
            let mut answer = self.get(&url, start).await?;
            // The beginning once more, if the registry knows no ranges.
            let mut skip = if answer.status() == StatusCode::PARTIAL_CONTENT { 0 } else { start };
            let mut broke = None;
            loop {
                watched.at(out.count())?;
                let chunk = match answer.chunk().await {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) => break,
                    Err(e) => {
                        broke = Some(explain(&e));
                        break;
                    }
                };
                let skipped = skip.min(chunk.len() as u64);
                skip -= skipped;
                let fresh = &chunk[skipped as usize..];
                if out.count() + fresh.len() as u64 > blob.size {
                    return Err(self.failed(format!("it sends more of {} than there is", blob.digest)));
                }
                // Small against what the network takes; the page cache takes it.
                out.write_all(fresh).context("write", &path)?;
                room.used(fresh.len() as u64)?;
            }
            if out.count() == start {
                barren += 1;
                if barren == TRIES {
                    let why = broke.unwrap_or_else(|| "it ends too early".to_owned());
                    return Err(self.failed(format!("{} broke off, {TRIES} times: {why}", blob.digest)));
                }
                tokio::time::sleep(PAUSE * 2u32.pow(barren)).await;
            } else {
                barren = 0;
            }
        }
        let (found, _) = out.finish();
        match found == blob.digest {
            true => Ok(()),
            false => {
                let what = format!("a layer of {}", self.reference);
                Err(ImageError::Digest { what, expected: blob.digest, found })
            }
        }
    }
}

/// Progress over all layers.
struct Watched<'a> {
    task: &'a Task,
    done: u64,
    total: u64,
}

impl Watched<'_> {
    fn at(&self, here: u64) -> Result<(), FileError> {
        self.task.at(Phase::Download, self.done.saturating_add(here), Some(self.total))
    }
}

/// Downloads an image's documents and layers into staged files.
///
/// # Errors
///
/// [`ImageError`]; nothing is left then.
pub async fn fetch(
    registry: &Registry,
    images: &Images,
    architecture: Architecture,
    task: &Task,
) -> Result<Opened, ImageError> {
    let manifest = registry.manifest(architecture).await?;
    let id = manifest.config.digest;
    let bytes = registry.document("blobs", &id.to_string(), Some(id), CONFIG_LIMIT).await?;
    let config = ImageConfig::parse(&bytes, architecture, &registry.reference.to_string())?;
    let total = manifest.layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
    if total > images.limits.disk {
        let what = registry.reference.to_string();
        return Err(ImageError::TooLarge { what, size: total, limit: images.limits.disk });
    }
    images.blobs.require(total)?;
    let mut room = Room::new(images.blobs.staging().dir(), images.blobs.reserve());
    let mut layers = Vec::new();
    let mut done = 0;
    for layer in manifest.layers {
        let mut staged = images.blobs.staging().file()?;
        registry.download(&mut staged, &layer, &mut room, &Watched { task, done, total }).await?;
        done = done.saturating_add(layer.size);
        // The name goes, the data stays until the file is closed.
        let file = staged.file().try_clone().context("keep", staged.path())?;
        layers.push(Layer {
            file,
            offset: 0,
            size: layer.size,
            digest: Some(layer.digest),
            media_type: layer.media_type,
        });
    }
    Ok(Opened { id, config, layers })
}

/// The innermost reason; what reqwest puts around it repeats the URL.
fn explain(error: &reqwest::Error) -> String {
    let mut error: &dyn std::error::Error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// The value of the header that a request would be sent with.
fn header_of(request: RequestBuilder) -> Option<String> {
    let request = request.build().ok()?;
    request.headers().get(AUTHORIZATION)?.to_str().ok().map(str::to_owned)
}
