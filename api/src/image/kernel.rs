//! Kernels: told from other files, and found in the root file system of a disk image.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use crate::files::{self, IoContext, Staged, Task};

use super::{Architecture, Blob, Blobs, ImageError};

/// No kernel is larger.
const KERNEL_LIMIT: u64 = 256 << 20;
const INITRD_LIMIT: u64 = 1 << 30;

/// Adds a kernel given as a file.
///
/// # Errors
///
/// It is not a kernel of this architecture.
pub fn add(blobs: &Blobs, path: &Path, architecture: Architecture, task: &Task) -> Result<Blob, ImageError> {
    let file = files::open_regular(path)?;
    check(&file, &path.display().to_string(), architecture)?;
    blobs.add_file(path, task)
}

/// Adds an initial RAM disk given as a file. The kernel alone knows what it can unpack, so it is not looked into.
///
/// # Errors
///
/// It is too large.
pub fn add_initrd(blobs: &Blobs, path: &Path, task: &Task) -> Result<Blob, ImageError> {
    let size = path.metadata().context("look at", path)?.len();
    limit(&path.display().to_string(), size, INITRD_LIMIT)?;
    blobs.add_file(path, task)
}

fn limit(what: &str, size: u64, limit: u64) -> Result<(), ImageError> {
    match size <= limit {
        true => Ok(()),
        false => Err(ImageError::TooLarge { what: what.to_owned(), size, limit }),
    }
}

/// Makes sure that the VMM can boot it: an ELF file or bzImage on x86_64 (Linux `Documentation/arch/x86/boot.rst`),
/// a PE file on aarch64 (`Documentation/arch/arm64/booting.rst`).
fn check(file: &File, what: &str, architecture: Architecture) -> Result<(), ImageError> {
    let begins = |at: u64, magic: &[u8]| {
        let mut bytes = vec![0; magic.len()];
        file.read_exact_at(&mut bytes, at).is_ok() && bytes == magic
    };
    let size = file.metadata().map_err(|e| ImageError::invalid(what, e.to_string()))?.len();
    limit(what, size, KERNEL_LIMIT)?;
    let fits = match architecture {
        // ELF for machine 62 (EM_X86_64), 64-bit.
        Architecture::X86_64 => {
            (begins(0, b"\x7fELF\x02") && begins(18, &62u16.to_le_bytes())) || begins(0x202, b"HdrS")
        }
        Architecture::Aarch64 => begins(56, b"ARM\x64"),
    };
    match fits {
        true => Ok(()),
        false => {
            let wanted = match architecture {
                Architecture::X86_64 => "an ELF file (vmlinux) or a bzImage (vmlinuz)",
                Architecture::Aarch64 => "an uncompressed Image",
            };
            Err(ImageError::invalid(what, format!("it is no {architecture} kernel; give {wanted}")))
        }
    }
}

/// A kernel, and an initial RAM disk that fits it.
pub type Found = (Blob, Option<Blob>);

/// Takes the kernel out of an ext4 file system that begins at `start` (bytes) of a disk image: `/vmlinuz`, where
/// Debian and its kin have a link to the newest, else the last by name of `/boot/vmlinuz-*`, and its initrd.
///
/// # Errors
///
/// The file system is damaged, or what is found is not a kernel. None if there is none.
pub fn find(
    disk: &File,
    start: u64,
    architecture: Architecture,
    blobs: &Blobs,
    task: &Task,
) -> Result<Option<Found>, ImageError> {
    let what = "the disk image's file system";
    let broken = |e: Ext4Error| ImageError::invalid(what, e.to_string());
    let part = Part { disk: disk.try_clone().map_err(|e| ImageError::invalid(what, e.to_string()))?, start };
    let system = Ext4::load(Box::new(part)).map_err(broken)?;
    let Some(kernel) = newest(&system).map_err(broken)? else { return Ok(None) };
    let blob = take(&system, &kernel, KERNEL_LIMIT, blobs, task, |file| check(file, &kernel, architecture))?;
    // /vmlinuz goes with /initrd.img, /boot/vmlinuz-V with /boot/initrd.img-V or others' names for it.
    let names = ["initrd.img", "initramfs", "initrd"].map(|name| kernel.replacen("vmlinuz", name, 1));
    let with_suffix = names.iter().map(|name| format!("{name}.img"));
    for name in names.iter().cloned().chain(with_suffix) {
        if system.exists(name.as_str()).unwrap_or(false) {
            let initrd = take(&system, &name, INITRD_LIMIT, blobs, task, |_| Ok(()))?;
            return Ok(Some((blob, Some(initrd))));
        }
    }
    Ok(Some((blob, None)))
}

fn newest(system: &Ext4) -> Result<Option<String>, Ext4Error> {
    // A dangling link is no kernel.
    if system.exists("/vmlinuz").unwrap_or(false) {
        return Ok(Some("/vmlinuz".to_owned()));
    }
    let mut newest: Option<String> = None;
    let entries = match system.read_dir("/boot") {
        Err(Ext4Error::NotFound) => return Ok(None),
        result => result?,
    };
    for entry in entries {
        let entry = entry?;
        let Ok(name) = entry.file_name().as_str() else { continue };
        if name.starts_with("vmlinuz-") && newest.as_deref().is_none_or(|newest| by_version(newest, name)) {
            newest = Some(name.to_owned());
        }
    }
    Ok(newest.map(|name| format!("/boot/{name}")))
}

/// Whether `a` is of an earlier version than `b`, numbers compared as such.
fn by_version(a: &str, b: &str) -> bool {
    let parts = |text: &str| -> Vec<(u64, String)> {
        text.split(|c: char| !c.is_ascii_alphanumeric())
            .map(|part| (part.parse().unwrap_or(0), part.to_owned()))
            .collect()
    };
    parts(a) < parts(b)
}

/// Copies a file out of the file system, checks it and makes it a blob.
fn take(
    system: &Ext4,
    path: &str,
    most: u64,
    blobs: &Blobs,
    task: &Task,
    check: impl FnOnce(&File) -> Result<(), ImageError>,
) -> Result<Blob, ImageError> {
    let broken = |e: Ext4Error| ImageError::invalid(format!("{path} in the disk image"), e.to_string());
    limit(path, system.metadata(path).map_err(broken)?.len(), most)?;
    let mut from = system.open(path).map_err(broken)?;
    let staged: Staged = blobs.staging().file()?;
    let mut buffer = vec![0; 1 << 20];
    let mut to = staged.file();
    loop {
        task.check()?;
        match from.read_bytes(&mut buffer).map_err(broken)? {
            0 => break,
            count => io::Write::write_all(&mut to, &buffer[..count]).context("write", staged.path())?,
        }
    }
    check(staged.file())?;
    blobs.add_staged(staged, task)
}

/// A part of a disk image, as the file system reader wants it.
struct Part {
    disk: File,
    start: u64,
}

impl Ext4Read for Part {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let at = self.start.checked_add(start_byte).ok_or("an offset beyond any disk")?;
        self.disk.seek(io::SeekFrom::Start(at))?;
        Ok(self.disk.read_exact(dst)?)
    }
}
