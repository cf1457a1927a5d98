//! Images from files: a root file system or disk image, and a kernel, which may also be in it.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::files::{self, IoContext, Staged, Task};

use super::images::now;
use super::probe::{self, FileSystem, Format};
use super::{Architecture, Blob, ImageError, Images, Manifest, Root, kernel, partitions, qemu_img};

/// What to make an image of. The files stay the user's and as they are.
#[derive(Clone, Debug, Default)]
pub struct DiskImport {
    /// An EROFS, ext4, XFS or Btrfs file system, a raw disk with a partition table, or a qcow2 image.
    pub root: PathBuf,
    /// An ELF kernel or a bzImage. None takes the kernel, and its initrd, that is in the root file system, which
    /// must be ext4 then.
    pub kernel: Option<PathBuf>,
    /// Goes with `kernel`.
    pub initrd: Option<PathBuf>,
    /// More words for the kernel command line.
    pub boot_args: String,
}

pub(super) fn import(images: &Images, import: &DiskImport, task: &Task) -> Result<Manifest, ImageError> {
    let file = files::open_regular(&import.root)?;
    let source = match probe::format(&file).context("read", &import.root)? {
        Format::Qcow2 => Source::Converted(qemu_img::convert(images, &import.root, task)?),
        _ => Source::AsIs(file),
    };
    let disk = Disk::look(&source, &import.root)?;
    let size = source.file().metadata().context("look at", &import.root)?.len();
    if size > images.limits.disk {
        let what = import.root.display().to_string();
        return Err(ImageError::TooLarge { what, size, limit: images.limits.disk });
    }
    let architecture = Architecture::host();
    // The kernel first: it is what users most often get wrong, and it is small.
    let (kernel, initrd) = match (&import.kernel, &import.initrd) {
        (Some(kernel), initrd) => (
            kernel::add(&images.blobs, kernel, architecture, task)?,
            initrd.as_ref().map(|initrd| kernel::add_initrd(&images.blobs, initrd, task)).transpose()?,
        ),
        (None, Some(_)) => {
            return Err(unusable(
                &import.root,
                "an initial RAM disk was given without the kernel it goes with",
            ));
        }
        (None, None) => inside(images, &source, &disk, import, architecture, task)?,
    };
    let blob = match source {
        Source::AsIs(_) => images.blobs.add_file(&import.root, task)?,
        Source::Converted(staged) => images.blobs.add_staged(staged, task)?,
    };
    let root = match disk {
        Disk { file_system: FileSystem::Erofs, .. } => Root::Erofs { blob, layer: None },
        Disk { device, .. } => Root::Disk { blob, device },
    };
    let boot_args = import.boot_args.trim().to_owned();
    Ok(Manifest { architecture, created: now(), kernel, initrd, boot_args, root, container: None })
}

enum Source {
    AsIs(File),
    Converted(Staged),
}

impl Source {
    fn file(&self) -> &File {
        match self {
            Source::AsIs(file) => file,
            Source::Converted(staged) => staged.file(),
        }
    }
}

/// Where on a disk the root file system is.
struct Disk {
    file_system: FileSystem,
    /// Bytes.
    start: u64,
    device: String,
}

impl Disk {
    fn look(source: &Source, path: &Path) -> Result<Self, ImageError> {
        let no = |why: &str| Err(unusable(path, why));
        match probe::format(source.file()).context("read", path)? {
            Format::FileSystem(FileSystem::Squashfs) => {
                no("Pulau's guest kernel does not read squashfs; make an erofs of its content (mkfs.erofs)")
            }
            Format::FileSystem(file_system) => {
                Ok(Disk { file_system, start: 0, device: "/dev/vda".to_owned() })
            }
            Format::Gpt | Format::Mbr => match partitions::find_root(source.file()) {
                Ok(Some(found)) => Ok(Disk {
                    // Read-only from a partition too, but then without a layer.
                    file_system: match found.file_system {
                        FileSystem::Erofs => {
                            return no("a partition with erofs is not supported; give it by itself");
                        }
                        other => other,
                    },
                    start: found.start,
                    device: format!("/dev/vda{}", found.number),
                }),
                Ok(None) => {
                    no("no partition of it has a file system that can be the root (ext4, xfs, btrfs)")
                }
                Err(e) => no(&e.to_string()),
            },
            Format::Qcow2 => no("it holds a qcow2 image within a qcow2 image"),
            Format::Foreign(name) => {
                no(&format!("{name} is not supported; convert it with `qemu-img convert -O qcow2`"))
            }
            Format::Compressed(program) => no(&format!("it is compressed; open it with {program} first")),
            Format::Tar => no("it is a tar archive; import it as a container image if it is one"),
            Format::Unknown => {
                no("no known file system, partition table or disk image format begins like it")
            }
        }
    }
}

fn inside(
    images: &Images,
    source: &Source,
    disk: &Disk,
    import: &DiskImport,
    architecture: Architecture,
    task: &Task,
) -> Result<(Blob, Option<Blob>), ImageError> {
    if disk.file_system != FileSystem::Ext4 {
        let name = disk.file_system.name();
        return Err(unusable(
            &import.root,
            &format!("a kernel must be given: none can be taken out of {name}"),
        ));
    }
    let found = kernel::find(source.file(), disk.start, architecture, &images.blobs, task)?;
    found
        .ok_or_else(|| unusable(&import.root, "there is no /vmlinuz or /boot/vmlinuz-* in it; give a kernel"))
}

fn unusable(path: &Path, why: &str) -> ImageError {
    ImageError::invalid(path.display().to_string(), why)
}
