//! Images from a real registry: Debian's `docker-registry`, as `scripts/test` provides it.

#![allow(clippy::unwrap_used, clippy::expect_used)] // It is all tests.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pulau::files::Task;
use pulau::image::{Credentials, Digest, ImageError, Images, Limits, Manifest, OciImport, OciSource};
use serde_json::{Value, json};

const USER: &str = "island";
const PASSWORD: &str = "palm tree";
/// bcrypt of the password.
const HTPASSWD: &str = "$2b$05$abcdefghijklmnopqrstuuS0JGB7DsIPa1X10lszIF8JWRtskcBjS";

struct Registry {
    child: Child,
    address: String,
    dir: tempfile::TempDir,
}

impl Registry {
    fn start(with_password: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let mut config = json!({
            "version": "0.1",
            "log": { "level": "error" },
            "storage": { "filesystem": { "rootdirectory": dir.path().join("registry") } },
            "http": { "addr": address },
        });
        if with_password {
            fs::write(dir.path().join("htpasswd"), format!("{USER}:{HTPASSWD}\n")).unwrap();
            config["auth"] = json!({ "htpasswd": { "realm": "pulau", "path": dir.path().join("htpasswd") } });
        }
        // JSON is YAML.
        fs::write(dir.path().join("config.yml"), config.to_string()).unwrap();
        let program = std::env::var("PULAU_TEST_REGISTRY").unwrap_or_else(|_| "docker-registry".into());
        let mut command = Command::new(program);
        command.arg("serve").arg(dir.path().join("config.yml")).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: prctl is async-signal-safe.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?));
        }
        let child =
            command.spawn().expect("docker-registry: run the tests by scripts/test, which provides it");
        let deadline = Instant::now() + Duration::from_secs(60);
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < deadline, "the registry does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Registry { child, address, dir }
    }

    /// Stores an image of one layer, by the distribution API.
    async fn push(&self, repository: &str, layer: &[u8], plain: Digest) {
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Cmd": ["/bin/true"] },
            "rootfs": { "type": "layers", "diff_ids": [plain] },
        });
        let config = config.to_string().into_bytes();
        for blob in [layer, &config] {
            self.push_blob(repository, blob).await;
        }
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": descriptor(&config, "application/vnd.oci.image.config.v1+json"),
            "layers": [descriptor(layer, "application/vnd.oci.image.layer.v1.tar+gzip")],
        });
        let manifest = manifest.to_string().into_bytes();
        let index_type = "application/vnd.oci.image.index.v1+json";
        let mut entry = descriptor(&manifest, manifest_type);
        entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
        let index = json!({ "schemaVersion": 2, "mediaType": index_type, "manifests": [entry] }).to_string();
        self.push_manifest(repository, &Digest::of(&manifest).to_string(), manifest_type, manifest).await;
        self.push_manifest(repository, "1", index_type, index.into_bytes()).await;
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/v2/{path}", self.address)
    }

    async fn push_blob(&self, repository: &str, blob: &[u8]) {
        let begun = send(client().post(self.url(&format!("{repository}/blobs/uploads/")))).await;
        let place = begun.headers()["location"].to_str().unwrap().to_owned();
        let place = format!("{place}&digest={}", Digest::of(blob));
        let place = if place.starts_with('/') { format!("http://{}{place}", self.address) } else { place };
        send(client().put(place).body(blob.to_vec())).await;
    }

    async fn push_manifest(&self, repository: &str, name: &str, kind: &str, manifest: Vec<u8>) {
        let url = self.url(&format!("{repository}/manifests/{name}"));
        send(client().put(url).header("content-type", kind).body(manifest)).await;
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn client() -> reqwest::Client {
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    reqwest::Client::builder().tls_backend_preconfigured(tls).build().unwrap()
}

async fn send(request: reqwest::RequestBuilder) -> reqwest::Response {
    let answer = request.basic_auth(USER, Some(PASSWORD)).send().await.unwrap();
    assert!(answer.status().is_success(), "{answer:?}");
    answer
}

fn descriptor(bytes: &[u8], kind: &str) -> Value {
    json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() })
}

/// A layer with one file of this size, compressed.
fn layer(size: usize) -> (Vec<u8>, Digest) {
    let data: Vec<u8> =
        (0..size as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(data.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, "data", &data[..]).unwrap();
    let plain = archive.into_inner().unwrap();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&plain).unwrap();
    (encoder.finish().unwrap(), Digest::of(&plain))
}

struct Host {
    images: Images,
    dir: tempfile::TempDir,
}

fn host() -> Host {
    let dir = tempfile::tempdir().unwrap();
    let mut kernel = vec![0; 0x300];
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(dir.path().join("kernel"), kernel).unwrap();
    fs::write(dir.path().join("agent"), "agent").unwrap();
    Host { images: Images::open(dir.path(), Limits::default(), 0).unwrap(), dir }
}

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn import(&self, name: &str, credentials: Option<Credentials>) -> Result<Manifest, ImageError> {
        let import = OciImport {
            source: OciSource::Registry { reference: name.parse().unwrap(), credentials },
            agent: self.path("agent"),
            kernel: self.path("kernel"),
            initrd: None,
            boot_args: String::new(),
        };
        self.images.import_oci(import, &Task::quiet()).await
    }
}

fn files_below(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files_below(&path) } else { 1 }).sum()
}

#[tokio::test]
async fn an_image_comes_from_a_real_registry() {
    let (host, registry) = (host(), Registry::start(false));
    let (layer, plain) = layer(3 << 20);
    registry.push("org/app", &layer, plain).await;
    let name = format!("{}/org/app:1", registry.address);
    let manifest = host.import(&name, None).await.unwrap();
    assert_eq!(manifest.container.as_ref().unwrap().cmd, ["/bin/true"]);
    host.images.verify(&manifest, &Task::quiet()).await.unwrap();
    assert_eq!(host.import(&name, None).await.unwrap().root, manifest.root);

    let missing = host.import(&format!("{}/org/other:1", registry.address), None).await.unwrap_err();
    assert!(matches!(missing, ImageError::NotFound { .. }), "{missing}");
    // A registry that loses its data under way.
    fs::remove_dir_all(registry.dir.path().join("registry/docker/registry/v2/blobs")).unwrap();
    host.import(&name, None).await.unwrap_err();
    assert_eq!(files_below(&host.path("images/tmp")), 0);
}

#[tokio::test]
async fn a_registry_with_a_password_wants_it() {
    let (host, registry) = (host(), Registry::start(true));
    let (layer, plain) = layer(1 << 10);
    registry.push("app", &layer, plain).await;
    let name = format!("{}/app:1", registry.address);
    let credentials = |password: &str| Some(Credentials { user: USER.into(), password: password.into() });
    host.import(&name, credentials(PASSWORD)).await.unwrap();
    for wrong in [None, credentials("wrong")] {
        let denied = host.import(&name, wrong).await.unwrap_err();
        assert!(matches!(denied, ImageError::Denied { .. }), "{denied}");
    }
}

#[tokio::test]
async fn a_registry_that_dies_halfway_is_an_error_and_leaves_nothing() {
    let (host, mut registry) = (host(), Registry::start(false));
    let (layer, plain) = layer(16 << 20);
    registry.push("app", &layer, plain).await;
    let name = format!("{}/app:1", registry.address);
    let (import, death) = tokio::join!(host.import(&name, None), async {
        // Killed when the layer has begun to come.
        let tmp = host.path("images/tmp");
        while !fs::read_dir(&tmp).unwrap().any(|e| e.unwrap().metadata().is_ok_and(|meta| meta.len() > 0)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        registry.child.kill()
    });
    death.unwrap();
    let error = import.unwrap_err();
    assert!(matches!(error, ImageError::Registry { .. }), "{error}");
    assert_eq!(files_below(&host.path("images/tmp")), 0);
}
