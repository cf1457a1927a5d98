//! Imports of files, with the real `mkfs.erofs`, `mke2fs` and `qemu-img`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::task::Poll;

use super::super::{Architecture, Root, testing};
use super::*;

struct Host {
    images: Images,
    dir: tempfile::TempDir,
}

fn host() -> Host {
    let dir = tempfile::tempdir().unwrap();
    Host { images: Images::open(dir.path(), Limits { disk: 1 << 30 }, 0).unwrap(), dir }
}

impl Host {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn kernel(&self) -> PathBuf {
        testing::kernel(self.dir.path())
    }

    fn import(&self, root: &Path, kernel: Option<PathBuf>) -> Result<Manifest, ImageError> {
        let import = DiskImport { root: root.to_owned(), kernel, ..Default::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(self.images.import_disk(import, &Task::quiet()))
    }

    fn refusal(&self, root: &Path) -> String {
        let error = self.import(root, Some(self.kernel())).unwrap_err();
        assert!(matches!(error, ImageError::Invalid { .. } | ImageError::TooLarge { .. }), "{error}");
        assert!(fs::read_dir(self.path("images/tmp")).unwrap().next().is_none(), "something is left");
        error.to_string()
    }

    /// An ext4 file system with a directory's content.
    fn ext4(&self, name: &str, content: &Path) -> PathBuf {
        let path = self.path(name);
        run("mke2fs", &["-q", "-t", "ext4", "-d", content.to_str().unwrap(), path.to_str().unwrap(), "32M"]);
        path
    }
}

fn run(program: &str, arguments: &[&str]) {
    let out = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn an_erofs_root_is_shared_and_a_layer_can_be_frozen() {
    let host = host();
    let content = host.path("content");
    fs::create_dir(&content).unwrap();
    fs::write(content.join("file"), "content").unwrap();
    let root = host.path("root.erofs");
    run("mkfs.erofs", &["--quiet", root.to_str().unwrap(), content.to_str().unwrap()]);

    let manifest = host.import(&root, Some(host.kernel())).unwrap();
    assert!(matches!(manifest.root, Root::Erofs { layer: None, .. }));
    assert_eq!(manifest.architecture, Architecture::host());
    assert_eq!(fs::read(host.images.blobs().path(manifest.root.digest())).unwrap(), fs::read(&root).unwrap());

    let layer = host.path("layer");
    fs::write(&layer, "what the instance wrote").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let copy = runtime.block_on(host.images.copy_disk(layer, &Task::quiet())).unwrap();
    let frozen = runtime.block_on(host.images.freeze(manifest.clone(), copy, &Task::quiet())).unwrap();
    assert_eq!(frozen.root.blob(), manifest.root.blob());
    assert_eq!(frozen.blobs().len(), 3);
    assert_eq!(frozen.boot_args(), manifest.boot_args());
    runtime.block_on(host.images.verify(&frozen, &Task::quiet())).unwrap();
}

#[test]
fn a_task_is_cancelled_by_giving_up_alone() {
    let host = host();
    let root = host.path("no such file");
    let task = Task::quiet();
    let import = || host.images.import_disk(DiskImport { root: root.clone(), ..Default::default() }, &task);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(import()).unwrap_err();
    task.check().unwrap();
    // Now and then the work is done before it is looked at for the first time; then nothing was given up.
    let begun_and_given_up = || {
        let mut import = Box::pin(import());
        let begun = std::future::poll_fn(|context| Poll::Ready(import.as_mut().poll(context).is_pending()));
        runtime.block_on(begun)
    };
    assert!((0..1000).any(|_| begun_and_given_up()));
    task.check().unwrap_err();
}

#[test]
fn a_disk_brings_its_kernel() {
    let host = host();
    let content = host.path("content");
    fs::create_dir_all(content.join("boot")).unwrap();
    for version in ["6.1.0-9", "6.1.0-10"] {
        fs::copy(host.kernel(), content.join(format!("boot/vmlinuz-{version}"))).unwrap();
        fs::write(content.join(format!("boot/initrd.img-{version}")), format!("initrd {version}")).unwrap();
    }
    let disk = host.ext4("disk", &content);
    let manifest = host.import(&disk, None).unwrap();
    assert_eq!(manifest.boot_args(), "root=/dev/vda rw");
    let initrd = host.images.blobs().path(&manifest.initrd.unwrap().digest);
    assert_eq!(fs::read(initrd).unwrap(), b"initrd 6.1.0-10");

    // A link like Debian's goes before, also one that leaves the root and comes back.
    std::os::unix::fs::symlink("boot/vmlinuz-6.1.0-9", content.join("vmlinuz")).unwrap();
    std::os::unix::fs::symlink("../boot/initrd.img-6.1.0-9", content.join("initrd.img")).unwrap();
    let manifest = host.import(&host.ext4("disk2", &content), None).unwrap();
    let initrd = host.images.blobs().path(&manifest.initrd.unwrap().digest);
    assert_eq!(fs::read(initrd).unwrap(), b"initrd 6.1.0-9");

    // What is there under a kernel's name need not be one.
    fs::write(content.join("boot/vmlinuz-6.1.0-9"), "no kernel").unwrap();
    let error = host.import(&host.ext4("disk3", &content), None).unwrap_err().to_string();
    assert!(error.contains("/vmlinuz cannot be used: it is no x86_64 kernel"), "{error}");
    fs::remove_file(content.join("vmlinuz")).unwrap();
    fs::remove_dir_all(content.join("boot")).unwrap();
    let error = host.import(&host.ext4("disk4", &content), None).unwrap_err().to_string();
    assert!(error.contains("give a kernel"), "{error}");
}

#[test]
fn qcow2_is_converted() {
    let host = host();
    let content = host.path("content");
    fs::create_dir(&content).unwrap();
    let raw = host.ext4("raw", &content);
    let qcow2 = host.path("disk.qcow2");
    run("qemu-img", &["convert", "-c", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    let manifest = host.import(&qcow2, Some(host.kernel())).unwrap();
    assert_eq!(manifest.root.blob().size, 32 << 20);
    let same = host.import(&raw, Some(host.kernel())).unwrap();
    assert_eq!(same.root, manifest.root, "the raw disk and the converted one are the same blob");
}

#[test]
fn qcow2_that_reaches_for_other_files_is_refused() {
    let host = host();
    let (secret, image) = (host.path("secret"), host.path("image.qcow2"));
    fs::write(&secret, vec![42; 1 << 20]).unwrap();
    let create = |options: &[&str]| {
        let _ = fs::remove_file(&image);
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        arguments.extend(options);
        run("qemu-img", &arguments);
    };
    create(&["-b", secret.to_str().unwrap(), "-F", "raw", image.to_str().unwrap()]);
    assert!(host.refusal(&image).contains("backing file"));
    let data = format!("data_file={}", host.path("data").display());
    create(&["-o", &data, image.to_str().unwrap(), "1M"]);
    assert!(host.refusal(&image).contains("its data is in another file"));
    create(&[image.to_str().unwrap(), "2G"]);
    assert!(host.refusal(&image).contains("too large"));
    // A header that promises more than there is.
    create(&[image.to_str().unwrap(), "1M"]);
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[0xff; 8], 40).unwrap();
    assert!(host.refusal(&image).contains("qemu-img"), "{}", host.refusal(&image));
    file.set_len(50).unwrap();
    assert!(host.refusal(&image).contains("cut off"));
}

#[test]
fn what_is_no_image_is_refused_with_advice() {
    let host = host();
    let cases: [(&[u8], &str); 7] = [
        (b"", "no known file system"),
        (b"hsqs", "make an erofs"),
        (b"KDMV", "qemu-img convert"),
        (b"\x1f\x8b\x08", "gunzip"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
        (&[0; 4096], "no known file system"),
        (&[b'a'; 4096], "no known file system"),
    ];
    for (bytes, advice) in cases {
        let path = host.path("image");
        fs::write(&path, bytes).unwrap();
        let refusal = host.refusal(&path);
        assert!(refusal.contains(advice), "{refusal}");
    }
    let error = host.import(host.dir.path(), Some(host.kernel())).unwrap_err().to_string();
    assert!(error.contains("not a regular file"), "{error}");
    let sparse = File::create(host.path("large")).unwrap();
    sparse.write_all_at(&0xe0f5_e1e2_u32.to_le_bytes(), 1024).unwrap();
    sparse.set_len(2 << 30).unwrap();
    assert!(host.refusal(&host.path("large")).contains("too large"));

    let erofs = host.path("image");
    fs::write(&erofs, [&[0; 1024][..], &0xe0f5_e1e2_u32.to_le_bytes(), &[0; 4096]].concat()).unwrap();
    let error = host.import(&erofs, Some(erofs.clone())).unwrap_err().to_string();
    assert!(error.contains("it is no x86_64 kernel"), "{error}");
    let error = host.import(&erofs, None).unwrap_err().to_string();
    assert!(error.contains("a kernel must be given"), "{error}");
}
