//! Container images from layouts, archives and registries, honest and other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::super::testing::{Archive, gzip, kernel, mounted, run};
use super::super::{ContainerConfig, ImageError, Images, Limits, Manifest, Root};
use super::test_registry::{Manners, TestRegistry};
use super::*;
use crate::files::{FileError, Task};

/// A container image in memory: its blobs, and the digest of its manifest.
struct Container {
    blobs: Vec<Vec<u8>>,
    manifest: Vec<u8>,
    layers: Vec<Vec<u8>>,
    config: Vec<u8>,
}

/// An image with these layers, uncompressed; each second one is compressed by gzip, each third by zstd. `change`
/// may spoil it.
fn container(layers: &[Archive], change: impl FnOnce(&mut Value, &mut Value)) -> Container {
    let plain: Vec<Vec<u8>> = layers.iter().cloned().map(Archive::finish).collect();
    let stored: Vec<Vec<u8>> = plain
        .iter()
        .enumerate()
        .map(|(n, layer)| match n % 3 {
            0 => layer.clone(),
            1 => gzip(layer),
            _ => zstd::encode_all(&layer[..], 1).unwrap(),
        })
        .collect();
    let mut config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Cmd": ["/bin/sh"], "Env": ["A=b"], "User": "1:2", "WorkingDir": "/srv", "Entrypoint": null },
        "rootfs": { "type": "layers", "diff_ids": plain.iter().map(|l| Digest::of(l)).collect::<Vec<_>>() },
    });
    let mut manifest =
        json!({ "schemaVersion": 2, "layers": stored.iter().map(|l| descriptor(l)).collect::<Vec<_>>() });
    change(&mut config, &mut manifest);
    let config = serde_json::to_vec(&config).unwrap();
    manifest["config"] = descriptor(&config);
    let manifest = serde_json::to_vec(&manifest).unwrap();
    let mut blobs = stored.clone();
    blobs.extend([config.clone(), manifest.clone()]);
    Container { blobs, manifest, layers: stored, config }
}

fn descriptor(bytes: &[u8]) -> Value {
    json!({ "mediaType": "application/octet-stream", "digest": Digest::of(bytes), "size": bytes.len() })
}

fn honest() -> Container {
    let layers = [
        Archive::default()
            .directory("usr/bin")
            .directory("usr/sbin")
            .symlink("sbin", "usr/sbin")
            .file("usr/sbin/init", b"the image's own")
            .file("etc/hostname", b"base")
            .file("etc/gone", b"gone"),
        Archive::default().file("etc/hostname", b"changed").file("etc/.wh.gone", b""),
        Archive::default().file("srv/data", &[7; 100_000]),
    ];
    container(&layers, |_, _| {})
}

struct Host {
    images: Images,
    dir: tempfile::TempDir,
}

fn host() -> Host {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("agent"), "the agent").unwrap();
    Host { images: Images::open(dir.path(), Limits { disk: 64 << 20 }, 0).unwrap(), dir }
}

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn import_with(&self, source: OciSource, task: &Task) -> Result<Manifest, ImageError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let import = OciImport {
            source,
            agent: self.path("agent"),
            kernel: kernel(self.dir.path()),
            initrd: None,
            boot_args: String::new(),
        };
        let result = runtime.block_on(self.images.import_oci(import, task));
        // The last files are closed when the thread that works on them ends.
        drop(runtime);
        assert!(fs::read_dir(self.path("images/tmp")).unwrap().next().is_none(), "something is left");
        result
    }

    fn import(&self, source: OciSource) -> Result<Manifest, ImageError> {
        self.import_with(source, &Task::quiet())
    }

    fn local(&self, path: &Path) -> Result<Manifest, ImageError> {
        self.import(OciSource::Local { path: path.to_owned(), tag: None })
    }

    /// Writes a layout directory.
    fn layout(&self, name: &str, container: &Container) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = json!({ "schemaVersion": 2, "manifests": [descriptor(&container.manifest)] });
        fs::write(dir.join("index.json"), index.to_string()).unwrap();
        for blob in &container.blobs {
            fs::write(dir.join("blobs/sha256").join(Digest::of(blob).hex()), blob).unwrap();
        }
        dir
    }

    fn refusal(&self, container: &Container) -> String {
        let error = self.local(&self.layout("refused", container)).unwrap_err();
        fs::remove_dir_all(self.path("refused")).unwrap();
        error.to_string()
    }

    /// What the honest image becomes.
    fn check_honest(&self, manifest: &Manifest) {
        let Root::Erofs { blob, layer: None } = &manifest.root else { panic!("{:?}", manifest.root) };
        let container = ContainerConfig {
            cmd: vec!["/bin/sh".into()],
            env: vec!["A=b".into()],
            user: "1:2".into(),
            working_dir: "/srv".into(),
            ..Default::default()
        };
        assert_eq!(manifest.container.as_ref(), Some(&container));
        mounted(&self.images.blobs().path(&blob.digest), |dir| {
            let read = |path: &str| fs::read(dir.join(path)).unwrap();
            assert_eq!(read("etc/hostname"), b"changed");
            assert_eq!(read("srv/data"), [7; 100_000]);
            assert!(!dir.join("etc/gone").exists());
            assert_eq!(
                fs::read_link(dir.join("usr/sbin/init")).unwrap(),
                Path::new("/usr/lib/pulau/pulau-agent")
            );
            assert_eq!(read("usr/lib/pulau/pulau-agent"), b"the agent");
            assert_eq!(fs::read_link(dir.join("sbin")).unwrap(), Path::new("usr/sbin"));
            for made in ["dev", "proc", "run", "sys", "tmp"] {
                assert!(dir.join(made).is_dir(), "{made}");
            }
        });
    }
}

#[test]
fn layouts_and_archives_give_the_same_image() {
    let (host, honest) = (host(), honest());
    let layout = host.layout("layout", &honest);
    let from_layout = host.local(&layout).unwrap();
    host.check_honest(&from_layout);

    let archive = host.path("layout.tar");
    run(Command::new("tar").args(["-cf"]).arg(&archive).arg("-C").arg(&layout).arg("."));
    assert_eq!(host.local(&archive).unwrap().root, from_layout.root);

    // As `docker save` did it before it wrote layouts: a layer that repeats is a link.
    let diff = Digest::of(&honest.layers[0]).hex();
    let saved = json!([{
        "Config": "config.json",
        "RepoTags": ["a:1", "b:2"],
        "Layers": ["0/layer.tar", "1/layer.tar", "2/layer.tar"],
    }]);
    let docker = Archive::default()
        .file(&format!("{diff}.tar"), &honest.layers[0])
        .symlink("0/layer.tar", &format!("../{diff}.tar"))
        .file("1/layer.tar", &honest.layers[1])
        .file("2/layer.tar", &honest.layers[2])
        .file("config.json", &honest.config)
        .file("manifest.json", saved.to_string().as_bytes());
    let path = host.path("docker.tar");
    fs::write(&path, docker.finish()).unwrap();
    let tagged = |tag: &str| host.import(OciSource::Local { path: path.clone(), tag: Some(tag.into()) });
    assert_eq!(tagged("b:2").unwrap().root, from_layout.root);
    assert!(tagged("c:3").unwrap_err().to_string().contains("it has a:1, b:2"));
}

#[test]
fn an_index_is_searched_for_the_architecture_and_the_name() {
    let (host, honest) = (host(), honest());
    let layout = host.layout("layout", &honest);
    let entry = |architecture: &str, name: &str| {
        let mut entry = descriptor(&honest.manifest);
        entry["platform"] = json!({ "architecture": architecture, "os": "linux" });
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        entry
    };
    let write = |entries: Value| {
        let index = json!({ "schemaVersion": 2, "manifests": entries });
        fs::write(layout.join("index.json"), index.to_string()).unwrap();
    };
    let import = |tag: Option<&str>| {
        host.import(OciSource::Local { path: layout.clone(), tag: tag.map(str::to_owned) })
            .map_err(|e| e.to_string())
    };
    write(json!([entry("arm64", "a"), entry("amd64", "a")]));
    import(None).unwrap();
    write(json!([entry("amd64", "a"), entry("amd64", "b")]));
    import(Some("b")).unwrap();
    assert!(import(None).unwrap_err().contains("several images (a, b)"));
    write(json!([entry("s390x", "a")]));
    assert!(import(None).unwrap_err().contains("nothing for linux/amd64"));
    write(json!([]));
    assert!(import(None).is_err());
}

#[test]
fn what_does_not_match_its_digest_is_refused() {
    let host = host();
    let digest = |what: &str, spoil: &dyn Fn(&Path, &Container)| {
        let honest = honest();
        let layout = host.layout(what, &honest);
        spoil(&layout, &honest);
        let error = host.local(&layout).unwrap_err();
        assert!(matches!(error, ImageError::Digest { .. }), "{what}: {error}");
    };
    let blob = |layout: &Path, bytes: &[u8]| layout.join("blobs/sha256").join(Digest::of(bytes).hex());
    digest("manifest", &|layout, image| {
        let changed = String::from_utf8(image.manifest.clone()).unwrap().replace(":2", ": 2");
        fs::write(blob(layout, &image.manifest), changed).unwrap();
    });
    digest("config", &|layout, image| {
        let changed = String::from_utf8(image.config.clone()).unwrap().replace("/srv", "/etc");
        fs::write(blob(layout, &image.config), changed).unwrap();
    });
    digest("layer", &|layout, image| {
        let mut changed = image.layers[0].clone();
        let end = changed.len();
        changed[end - 1] = 1; // After the archive's end, where nobody looks.
        fs::write(blob(layout, &image.layers[0]), changed).unwrap();
    });
    // A configuration that promises other layers than there are.
    let error = host.refusal(&container(&[Archive::default().file("x", b"")], |config, _| {
        config["rootfs"]["diff_ids"][0] = json!(Digest::of(b"other"));
    }));
    assert!(error.contains("layer 1 does not match its digest"), "{error}");
}

#[test]
fn hostile_images_are_refused() {
    let host = host();
    let one = || [Archive::default().file("x", b"x")];
    let refusal = |layers: &[Archive], change: &dyn Fn(&mut Value, &mut Value)| {
        host.refusal(&container(layers, |config, manifest| change(config, manifest)))
    };
    let nothing = |_: &mut Value, _: &mut Value| {};
    assert!(refusal(&[Archive::default().file("../x", b"")], &nothing).contains("`..`"));
    assert!(refusal(&[Archive::default().file("usr/lib/pulau", b"")], &nothing).contains("in the way"));
    assert!(
        refusal(&[Archive::default().file("a", &[0; 40 << 20]).file("b", &[0; 40 << 20])], &nothing)
            .contains("too large")
    );
    assert!(refusal(&one(), &|config, _| config["architecture"] = json!("arm64")).contains("linux/arm64"));
    assert!(refusal(&one(), &|config, _| config["os"] = json!("windows")).contains("windows"));
    assert!(refusal(&one(), &|config, _| config["rootfs"]["diff_ids"] = json!([])).contains("1 layers"));
    assert!(refusal(&one(), &|_, manifest| manifest["schemaVersion"] = json!(1)).contains("outdated"));
    assert!(refusal(&one(), &|_, manifest| manifest["manifests"] = json!([])).contains("neither an index"));
    assert!(
        refusal(&one(), &|_, manifest| {
            manifest["layers"][0]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+encrypted");
        })
        .contains("encrypted")
    );
    assert!(
        refusal(&one(), &|_, manifest| manifest["layers"][0]["digest"] = json!("sha256:../../x"))
            .contains("digest")
    );
    assert!(
        refusal(&one(), &|_, manifest| {
            manifest["layers"] = manifest["layers"][0].clone();
        })
        .contains("cannot be used")
    );
    let missing = Digest::of(b"missing");
    assert!(
        refusal(&one(), &|_, manifest| manifest["layers"][0]["digest"] = json!(missing))
            .contains("missing from it")
    );

    // A blob that is not a file is not waited for.
    let honest = honest();
    let layout = host.layout("fifo", &honest);
    let blob = layout.join("blobs/sha256").join(Digest::of(&honest.layers[0]).hex());
    fs::remove_file(&blob).unwrap();
    nix::unistd::mkfifo(&blob, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(host.local(&layout).unwrap_err().to_string().contains("not a regular file"));
    // Links in an archive that lead out of it lead nowhere.
    let out = json!([{ "Config": "config.json", "Layers": [] }]).to_string();
    let archive =
        Archive::default().symlink("config.json", "../../etc/passwd").file("manifest.json", out.as_bytes());
    fs::write(host.path("out.tar"), archive.finish()).unwrap();
    assert!(host.local(&host.path("out.tar")).unwrap_err().to_string().contains("missing from it"));
    fs::write(host.path("empty.tar"), b"").unwrap();
    assert!(host.local(&host.path("empty.tar")).unwrap_err().to_string().contains("neither an OCI layout"));
}

/// A registry with the honest image, and the name of it.
fn registry() -> (TestRegistry, Container, String) {
    let (registry, honest) = (TestRegistry::start(), honest());
    registry.put("/v2/org/app/manifests/1", &honest.manifest);
    for blob in &honest.blobs {
        registry.put(&format!("/v2/org/app/blobs/{}", Digest::of(blob)), blob);
    }
    let name = format!("{}/org/app:1", registry.address);
    (registry, honest, name)
}

fn source(name: &str) -> OciSource {
    OciSource::Registry { reference: name.parse().unwrap(), credentials: None }
}

#[test]
fn a_registry_that_dies_halfway_is_asked_again() {
    let (host, (registry, honest, name)) = (host(), registry());
    host.check_honest(&host.import(source(&name)).unwrap());
    registry.seen();

    registry.be(Manners { dies_after: Some(30_000), failures: 2, ..Manners::default() });
    let (sender, progress) = std::sync::mpsc::channel();
    let task = Task::new(move |at| {
        let _ = sender.send(at);
    });
    host.import_with(source(&name), &task).unwrap();
    let seen = registry.seen();
    let first = format!("/v2/org/app/blobs/{} ", Digest::of(&honest.layers[0]));
    let starts: Vec<&str> =
        seen.iter().filter_map(|line| line.strip_prefix(&first)).map(|rest| rest.trim_end()).collect();
    assert_eq!(starts, ["0"], "the layer of {} bytes came at once", honest.layers[0].len());
    let total = honest.layers.iter().map(|layer| layer.len() as u64).sum();
    let downloads: Vec<u64> = progress
        .try_iter()
        .filter(|at| at.phase == crate::files::Phase::Download)
        .inspect(|at| assert_eq!(at.total, Some(total)))
        .map(|at| at.done)
        .collect();
    assert!(downloads.is_sorted() && *downloads.last().unwrap() <= total);

    registry.be(Manners { dies_after: Some(3_000), ..Manners::default() });
    host.import(source(&name)).unwrap();
    let seen = registry.seen();
    let starts: Vec<&str> =
        seen.iter().filter_map(|line| line.strip_prefix(&first)).map(|rest| rest.trim_end()).collect();
    assert_eq!(starts, ["0", "3000"], "{seen:?}");

    // Without ranges it never gets further than before, and is given up.
    registry.be(Manners { dies_after: Some(3_000), no_ranges: true, ..Manners::default() });
    let error = host.import(source(&name)).unwrap_err();
    assert!(matches!(error, ImageError::Registry { .. }), "{error}");
    assert!(error.to_string().contains("broke off, 5 times"), "{error}");
}

#[test]
fn registries_that_lie_are_caught() {
    let (host, (registry, honest, name)) = (host(), registry());
    let blob = |bytes: &[u8]| format!("/v2/org/app/blobs/{}", Digest::of(bytes));
    let error = |expected: &str| {
        let error = host.import(source(&name)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let mut other = honest.layers[1].clone();
    other[20] ^= 1;
    registry.put(&blob(&honest.layers[1]), &other);
    error("does not match its digest");
    registry.put(&blob(&honest.layers[1]), &[&honest.layers[1][..], b"more"].concat());
    error("more of");
    registry.put(&blob(&honest.layers[1]), &honest.layers[1]);
    registry.put(&blob(&honest.config), b"{}");
    error("does not match its digest");
    registry.put(&blob(&honest.config), &vec![b' '; 9 << 20]);
    error("too large");
    registry.put("/v2/org/app/manifests/1", &vec![b' '; 5 << 20]);
    error("too large");
    registry.put("/v2/org/app/manifests/1", b"<html>");
    error("cannot be used");
    let huge =
        container(&[Archive::default()], |_, manifest| manifest["layers"][0]["size"] = json!(1u64 << 60));
    registry.put("/v2/org/app/manifests/1", &huge.manifest);
    registry.put(&blob(&huge.config), &huge.config);
    error("too large");

    // A name with a digest gets that or nothing.
    let pinned = format!("{}/org/app@{}", registry.address, Digest::of(b"x"));
    registry.put(&format!("/v2/org/app/manifests/{}", Digest::of(b"x")), &honest.manifest);
    let error = host.import(source(&pinned)).unwrap_err();
    assert!(matches!(error, ImageError::Digest { .. }), "{error}");
    let missing = host.import(source(&format!("{}/org/app:2", registry.address))).unwrap_err();
    assert!(matches!(missing, ImageError::NotFound { .. }), "{missing}");
    // Nobody listens there.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = host.import(source(&format!("{gone}/a"))).unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn tokens_and_passwords_go_where_they_should() {
    let (host, (registry, _, name)) = (host(), registry());
    let import = |credentials: Option<(&str, &str)>| {
        let credentials =
            credentials.map(|(user, password)| Credentials { user: user.into(), password: password.into() });
        host.import(OciSource::Registry { reference: name.parse().unwrap(), credentials })
    };
    registry.put("/token", br#"{"token":"T"}"#);
    let challenge = format!("Bearer realm=\"http://{}/token\",service=\"s\"", registry.address);
    registry.be(Manners { wants: Some(("Bearer T".into(), challenge)), ..Manners::default() });
    import(None).unwrap();
    let seen = registry.seen();
    assert_eq!(seen[0], "/v2/org/app/manifests/1 0 ");
    assert_eq!(seen[1], "/token?service=s&scope=repository%3Aorg%2Fapp%3Apull 0 ");
    assert!(seen[2..].iter().all(|line| line.ends_with(" Bearer T")), "{seen:?}");
    import(Some(("user", "secret"))).unwrap();
    assert!(registry.seen()[1].ends_with("Basic dXNlcjpzZWNyZXQ="));

    let basic = ("Basic dXNlcjpzZWNyZXQ=".to_owned(), "Basic realm=\"r\"".to_owned());
    registry.be(Manners { wants: Some(basic), ..Manners::default() });
    import(Some(("user", "secret"))).unwrap();
    for wrong in [None, Some(("user", "wrong"))] {
        let error = import(wrong).unwrap_err();
        assert!(matches!(error, ImageError::Denied { .. }), "{error}");
        assert!(!error.to_string().contains("wrong\""), "{error}");
    }
    for challenge in ["Digest realm=\"x\"", "Bearer realm=\"nonsense\"", "Bearer realm=\"ftp://x/\""] {
        registry.be(Manners { wants: Some(("x".into(), challenge.into())), ..Manners::default() });
        let error = import(Some(("user", "secret"))).unwrap_err();
        assert!(matches!(error, ImageError::Registry { .. }), "{error}");
    }
    let shown = format!("{:?}", Credentials { user: "user".into(), password: "secret".into() });
    assert_eq!(shown, "Credentials(user)");
}

#[test]
fn a_cancelled_import_stops_and_leaves_nothing() {
    let host = host();
    let task = Task::quiet();
    task.cancel();
    let layout = host.layout("layout", &honest());
    let error = host.import_with(OciSource::Local { path: layout, tag: None }, &task).unwrap_err();
    assert!(matches!(error, ImageError::File(FileError::Cancelled)), "{error}");
    // A registry that never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("{}/a", listener.local_addr().unwrap());
    let error = host.import_with(source(&name), &task).unwrap_err();
    assert!(matches!(error, ImageError::File(FileError::Cancelled)), "{error}");
}
