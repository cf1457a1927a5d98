//! From an opened container image to an image of ours.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use crate::files::{self, FileError, Phase, Task};
use crate::image::digest::Hashing;
use crate::image::images::now;
use crate::image::layer::unreadable;
use crate::image::rootfs::RootFs;
use crate::image::{Architecture, Digest, ImageError, Images, Manifest, Root, kernel};

use super::registry::{self, Registry};
use super::{Layer, OciImport, OciSource, Opened, local};

/// Where the agent is in a guest.
const AGENT: &str = "/usr/lib/pulau/pulau-agent";
/// Directories that the agent mounts over, and their modes.
const DIRECTORIES: [(&str, u16); 5] =
    [("/dev", 0o755), ("/proc", 0o555), ("/run", 0o755), ("/sys", 0o555), ("/tmp", 0o1777)];

impl Images {
    /// Makes an image of a container image.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; nothing is left then but whole blobs, which a collection removes.
    pub async fn import_oci(&self, import: OciImport, task: &Task) -> Result<Manifest, ImageError> {
        let fetched = match &import.source {
            OciSource::Registry { reference, credentials } => {
                let registry = Registry::new(reference.clone(), credentials.clone())?;
                let fetching = registry::fetch(&registry, self, Architecture::host(), task);
                Some(tokio::select! {
                    fetched = fetching => fetched?,
                    () = task.cancelled() => return Err(FileError::Cancelled.into()),
                })
            }
            OciSource::Local { .. } => None,
        };
        self.blocking(task, move |images, task| {
            let opened = match (fetched, &import.source) {
                (Some(fetched), _) => fetched,
                (None, OciSource::Local { path, tag }) => {
                    local::open(path, tag.as_deref(), Architecture::host())?
                }
                (None, OciSource::Registry { .. }) => return Err(FileError::Cancelled.into()), // It was fetched.
            };
            build(images, &import, opened, task)
        })
        .await
    }
}

fn build(images: &Images, import: &OciImport, opened: Opened, task: &Task) -> Result<Manifest, ImageError> {
    let architecture = Architecture::host();
    let kernel = kernel::add(&images.blobs, &import.kernel, architecture, task)?;
    let initrd =
        import.initrd.as_ref().map(|initrd| kernel::add_initrd(&images.blobs, initrd, task)).transpose()?;
    let agent = files::open_regular(&import.agent)?;

    let Opened { id, config, layers } = opened;
    let diff_ids = &config.rootfs.diff_ids;
    if diff_ids.len() != layers.len() {
        let why = format!("it has {} layers, and {} are described", layers.len(), diff_ids.len());
        return Err(ImageError::invalid("the container image", why));
    }
    let staged = images.blobs.staging().file()?;
    let mut root = RootFs::new(&images.blobs, &staged, images.limits.disk, task)?;
    let total = layers.iter().fold(0u64, |sum, layer| sum.saturating_add(layer.size));
    let mut done = 0;
    for (number, (layer, diff_id)) in (1..).zip(layers.into_iter().zip(diff_ids)) {
        let name = format!("layer {number}");
        let size = layer.size;
        apply(&mut root, layer, diff_id, &name, Watched { task, done, total })?;
        done = done.saturating_add(size);
    }
    add_agent(&mut root, agent)?;
    root.finish(uuid(&id))?;
    let blob = images.blobs.add_staged(staged, task)?;
    Ok(Manifest {
        architecture,
        created: now(),
        kernel,
        initrd,
        boot_args: import.boot_args.trim().to_owned(),
        root: Root::Erofs { blob, layer: None },
        container: Some(config.container()),
    })
}

/// Progress over all layers.
struct Watched<'a> {
    task: &'a Task,
    done: u64,
    total: u64,
}

fn apply(
    root: &mut RootFs<'_>,
    mut layer: Layer,
    diff_id: &Digest,
    name: &str,
    watched: Watched<'_>,
) -> Result<(), ImageError> {
    if layer.media_type.contains("encrypted") {
        return Err(ImageError::invalid(name, "it is encrypted"));
    }
    layer.file.seek(SeekFrom::Start(layer.offset)).map_err(|e| unreadable(name, e))?;
    let stored = Reported { inner: (&layer.file).take(layer.size), watched };
    let mut stored = Hashing::new(stored);
    let plain = root.apply(&mut stored, name)?;
    // What a decompressor leaves unread belongs to the digest too.
    io::copy(&mut stored, &mut io::sink()).map_err(|e| unreadable(name, e))?;
    let (found, size) = stored.finish();
    if size != layer.size {
        return Err(ImageError::invalid(name, "it is cut off"));
    }
    let compare = |expected: Digest, found: Digest| match expected == found {
        true => Ok(()),
        false => Err(ImageError::Digest { what: name.to_owned(), expected, found }),
    };
    compare(layer.digest.unwrap_or(found), found)?;
    compare(*diff_id, plain)
}

/// Reports what is read.
struct Reported<'a, R> {
    inner: R,
    watched: Watched<'a>,
}

impl<R: Read> Read for Reported<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let Watched { task, done, total } = &mut self.watched;
        *done = done.saturating_add(count as u64);
        task.at(Phase::Layers, *done, Some(*total))?;
        Ok(count)
    }
}

fn add_agent(root: &mut RootFs<'_>, agent: File) -> Result<(), ImageError> {
    root.next_layer();
    for (path, mode) in DIRECTORIES {
        root.add_directory(path, mode)?;
    }
    root.add_program(AGENT, agent)?;
    // What the kernel starts. Should the image have an init of its own, `pulau.init=` starts it by another name.
    root.add_link("/sbin/init", AGENT)
}

/// A UUID that is the same for the same container image (RFC 9562, version 8).
fn uuid(id: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&id.bytes()[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
