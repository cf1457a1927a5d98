//! A container image of one layer with one program in it that needs nothing else, and a registry to have it in.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use pulau::image::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{PATIENCE, artifact, program, wait_for};

/// Where the program is in the image. With `--version` it prints `pulau-vmm` and a number.
pub const PROGRAM: &str = "/usr/bin/program";

/// Its layer, as a tar archive, and its configuration.
pub struct ContainerImage {
    layer: Vec<u8>,
    config: Vec<u8>,
}

impl ContainerImage {
    pub fn new() -> Self {
        let mut layer = tar::Builder::new(Vec::new());
        layer.sparse(false); // Container images have no sparse entries.
        let mut directory = tar::Header::new_ustar();
        directory.set_entry_type(tar::EntryType::Directory);
        directory.set_size(0);
        for (name, mode) in [("etc/", 0o755), ("usr/bin/", 0o755), ("usr/sbin/", 0o755)] {
            directory.set_mode(mode);
            layer.append_data(&mut directory, name, std::io::empty()).expect("a directory");
        }
        let mut link = tar::Header::new_ustar();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        layer.append_link(&mut link, "sbin", "usr/sbin").expect("a link");
        layer
            .append_path_with_name(program("pulau-vmm"), PROGRAM.trim_start_matches('/'))
            .expect("a program");
        let layer = layer.into_inner().expect("a layer");
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] },
        });
        ContainerImage { layer, config: config.to_string().into_bytes() }
    }

    /// Writes it as `docker save` would.
    pub fn save(&self, path: &Path) {
        let manifest = json!([{ "Config": "config.json", "Layers": ["layer.tar"] }]).to_string();
        let mut archive = tar::Builder::new(File::create(path).expect("a file"));
        for (name, bytes) in [
            ("layer.tar", &self.layer[..]),
            ("config.json", &self.config),
            ("manifest.json", manifest.as_bytes()),
        ] {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            archive.append_data(&mut header, name, bytes).expect("an entry");
        }
        archive.finish().expect("an archive");
    }
}

impl Default for ContainerImage {
    fn default() -> Self {
        Self::new()
    }
}

/// Debian's `docker-registry`, ended when dropped.
pub struct Registry {
    child: Child,
    /// `127.0.0.1:PORT`
    pub address: String,
    _dir: TempDir,
}

impl Registry {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        let address = format!("127.0.0.1:{port}");
        let config = json!({
            "version": "0.1",
            "log": { "level": "error" },
            "storage": { "filesystem": { "rootdirectory": dir.path().join("registry") } },
            "http": { "addr": address },
        });
        // JSON is YAML.
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config.to_string()).expect("a file");
        let child = Command::new(artifact("PULAU_TEST_REGISTRY"))
            .arg("serve")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // It logs what it has not.
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry starts");
        let registry = Registry { child, address, _dir: dir };
        wait_for("the registry", PATIENCE, || TcpStream::connect(&registry.address).ok());
        registry
    }

    /// Stores an image under `name:1`, by the distribution API; its reference.
    pub fn push(&self, name: &str, image: &ContainerImage) -> String {
        for blob in [&image.layer, &image.config] {
            let begun = self.request("POST", &format!("/v2/{name}/blobs/uploads/"), "", &[]);
            let place = header(&begun, "location");
            let place = place.strip_prefix(&format!("http://{}", self.address)).unwrap_or(&place).to_owned();
            self.request(
                "PUT",
                &format!("{place}&digest={}", Digest::of(blob)),
                "application/octet-stream",
                blob,
            );
        }
        let descriptor = |bytes: &[u8], kind: &str| -> Value {
            json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() })
        };
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": kind,
            "config": descriptor(&image.config, "application/vnd.oci.image.config.v1+json"),
            "layers": [descriptor(&image.layer, "application/vnd.oci.image.layer.v1.tar")],
        });
        self.request("PUT", &format!("/v2/{name}/manifests/1"), kind, manifest.to_string().as_bytes());
        format!("{}/{name}:1", self.address)
    }

    /// Sends a request, which has to succeed; the head of the answer.
    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("the registry listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let (address, length) = (&self.address, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: {kind}\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).expect("a request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with("HTTP/1.1 2"), "{method} {path}: {answer}");
        answer
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn header(answer: &str, name: &str) -> String {
    let line = answer.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    });
    line.unwrap_or_else(|| panic!("no {name} in {answer}"))
}
