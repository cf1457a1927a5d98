//! Images as guests see them: a container image boots, and so does what an instance of it has become.

use std::path::Path;
use std::time::Instant;

use pulau::files::Task;
use pulau::image::{Images, Limits, Manifest, OciImport, OciSource, Root};
use pulau::volume::{Content, Volumes};
use pulau_agent_protocol::message::{CopyIn, ExecRequest, ExitStatus, Shutdown, ShutdownAction};
use pulau_tests::container::{ContainerImage, PROGRAM};
use pulau_tests::vmm::{BOOT_ARGS, Vmm, drive};
use pulau_tests::{artifact, program};
use pulau_vmm::exit::ExitCode;
use serde_json::json;

/// Boots an image with a layer.
fn boot(images: &Images, manifest: &Manifest, layer: &Path) -> Vmm {
    let vmm = Vmm::start();
    let path = |digest| images.blobs().path(digest);
    vmm.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128})).ok();
    let args = format!("{BOOT_ARGS} {}", manifest.boot_args());
    let kernel = path(&manifest.kernel.digest);
    vmm.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": args})).ok();
    vmm.put("/drives/root", drive("root", &path(manifest.root.digest()), false, true)).ok();
    vmm.put("/drives/layer", drive("layer", layer, false, false)).ok();
    vmm.put("/vsock", json!({"guest_cid": 3, "uds_path": vmm.path("vsock")})).ok();
    vmm.boot();
    assert_eq!(vmm.agent().health().unwrap().problems, [""; 0]);
    let argv = vec![PROGRAM.into(), "--version".into()];
    let output = vmm.agent().output(&ExecRequest { argv, ..Default::default() }, b"").unwrap();
    assert_eq!(output.status, ExitStatus::Code(0));
    assert!(output.stdout.starts_with(b"pulau-vmm"), "{output:?}");
    vmm
}

fn end(mut vmm: Vmm) {
    vmm.agent().shutdown(Shutdown { action: ShutdownAction::PowerOff, grace_ms: None }).unwrap();
    vmm.exits_with(ExitCode::Ok as i32);
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[test]
fn a_container_image_boots_and_so_does_an_image_of_its_instance() {
    let dir = tempfile::tempdir().unwrap();
    let (images, volumes) =
        (Images::open(dir.path(), Limits::default(), 0).unwrap(), Volumes::open(dir.path(), 0).unwrap());
    let task = Task::quiet();
    ContainerImage::new().save(&dir.path().join("image.tar"));
    let import = OciImport {
        source: OciSource::Local { path: dir.path().join("image.tar"), tag: None },
        agent: program("pulau-agent"),
        kernel: artifact("PULAU_TEST_KERNEL"),
        initrd: None,
        boot_args: String::new(),
    };
    let manifest = block_on(images.import_oci(import, &task)).unwrap();

    const SIZE: u64 = 64 << 20;
    for id in ["a", "b"] {
        let begun = Instant::now();
        volumes.create(id, Content::Ext4, SIZE, &task).unwrap();
        eprintln!("layer {id}: {:?}", begun.elapsed());
    }
    let vmm = boot(&images, &manifest, &volumes.path("a").unwrap());
    let wanted =
        CopyIn { path: "/etc/kept".into(), size: 4, mode: 0o640, owner: None, parents: false, sync: true };
    vmm.agent().copy_in(&wanted, &b"kept"[..]).unwrap();
    end(vmm);

    // An image of that instance, in a larger layer.
    let copy = block_on(images.copy_disk(volumes.path("a").unwrap(), &task)).unwrap();
    let frozen = block_on(images.freeze(manifest, copy, &task)).unwrap();
    let Root::Erofs { layer: Some(layer), .. } = &frozen.root else { panic!("{:?}", frozen.root) };
    let layer = images.blobs().path(&layer.digest);
    volumes.create("c", Content::Layer(&layer), 2 * SIZE, &task).unwrap();
    let vmm = boot(&images, &frozen, &volumes.path("c").unwrap());
    let mut kept = Vec::new();
    vmm.agent().copy_out("/etc/kept", &mut kept).unwrap();
    assert_eq!(kept, b"kept");
    end(vmm);
    let checked =
        std::process::Command::new("/usr/sbin/e2fsck").arg("-fn").arg(volumes.path("c").unwrap()).output();
    let checked = checked.unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}
