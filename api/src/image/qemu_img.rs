//! qcow2 images, made raw by `qemu-img`.
//!
//! A qcow2 image can name other files (a backing file, an external data file) that whoever converts it would
//! read into it: `/etc/shadow`, or a device. Such images are refused twice, by our own look at the header (QEMU
//! `docs/interop/qcow2.rst`) and by what `qemu-img info` says, and the conversion itself is told to open no backing
//! file. Formats are never left to qemu-img's guess.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use crate::files::{FileError, IoContext, Phase, Staged, Task, Tool};

use super::{ImageError, Images};

const PROGRAM: &str = "qemu-img";
const PACKAGE: &str = "qemu-utils";
/// Header fields that version 2 has; version 3 has more.
const HEADER: usize = 112;
/// Incompatible feature bits.
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;

/// Converts a qcow2 image to a raw one, sparse.
///
/// # Errors
///
/// It refers to other files, is encrypted, damaged or too large; the conversion fails.
pub(super) fn convert(images: &Images, from: &Path, task: &Task) -> Result<Staged, ImageError> {
    let from = from.canonicalize().context("find", from)?;
    let header = Header::read(&from)?;
    header.check(&from, images.limits.disk)?;
    let node = source(&from)?;
    let told = Tool::new(PROGRAM, PACKAGE).args(["info", "--output=json", &node]).run(task, |_| {});
    let info: Info = match told.map_err(|e| damaged(&from, e)).map(|out| serde_json::from_slice(&out)) {
        Ok(Ok(info)) => info,
        Ok(Err(e)) => return Err(refused(&from, &format!("qemu-img info says nothing sensible of it: {e}"))),
        Err(e) => return Err(e),
    };
    info.check(&from, header.size)?;
    images.blobs.require(info.actual_size)?;

    let to = images.blobs.staging().file()?;
    let target = json!({ "driver": "raw", "file": { "driver": "file", "filename": text(to.path())? } });
    to.file().set_len(header.size).context("set the size of", to.path())?;
    // The target is there and has its size (-n), and reads as zeros.
    let arguments =
        ["convert", "-p", "-n", "--target-is-zero", "-S", "4k", "-t", "writeback", "-T", "writeback"];
    let target = format!("json:{target}");
    let tool = Tool::new(PROGRAM, PACKAGE).args(arguments).args([node.as_str(), target.as_str()]);
    let mut progress = Percent::default();
    let converted = tool.run(task, |piece| {
        let done = progress.take(piece).map(|percent| (header.size as f64 * percent / 100.0) as u64);
        // A cancelled task is noticed by who runs the tool.
        let _ = done.map(|done| task.at(Phase::Convert, done, Some(header.size)));
    });
    converted.map_err(|e| damaged(&from, e))?;
    Ok(to)
}

/// The image and nothing else: an explicit format, no protocol in the file's name, no backing file.
fn source(path: &Path) -> Result<String, ImageError> {
    let file = json!({ "driver": "file", "filename": text(path)?, "locking": "off" });
    Ok(format!("json:{}", json!({ "driver": "qcow2", "backing": null, "read-only": true, "file": file })))
}

fn text(path: &Path) -> Result<&str, ImageError> {
    path.to_str().ok_or_else(|| refused(path, "its name is not UTF-8; rename it"))
}

fn refused(path: &Path, why: &str) -> ImageError {
    let name = String::from_utf8_lossy(path.as_os_str().as_bytes());
    ImageError::invalid(name, why)
}

/// What qemu-img cannot read is the image's fault, unless qemu-img is not there or the disk is full.
fn damaged(path: &Path, error: FileError) -> ImageError {
    match error {
        FileError::Tool { why, .. } if why.contains("exit status 1") => {
            refused(path, &format!("qemu-img cannot read it: {why}"))
        }
        other => other.into(),
    }
}

/// What matters of the header.
struct Header {
    version: u32,
    backing_file: u64,
    encryption: u32,
    incompatible: u64,
    /// Of the disk, in bytes.
    size: u64,
}

impl Header {
    fn read(path: &Path) -> Result<Self, ImageError> {
        let mut bytes = [0; HEADER];
        let file = File::open(path).context("open", path)?;
        file.read_exact_at(&mut bytes, 0).map_err(|_| refused(path, "it is cut off"))?;
        let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        let version = word(4);
        let incompatible = if version >= 3 { long(72) } else { 0 };
        Ok(Header { version, backing_file: long(8), encryption: word(32), incompatible, size: long(24) })
    }

    fn check(&self, path: &Path, limit: u64) -> Result<(), ImageError> {
        if !(2..=3).contains(&self.version) {
            return Err(refused(path, "it is of an unknown version of qcow2"));
        }
        if self.backing_file != 0 {
            return Err(refused(
                path,
                "it refers to a backing file; flatten it with `qemu-img convert -O qcow2` first",
            ));
        }
        if self.incompatible & EXTERNAL_DATA != 0 {
            return Err(refused(
                path,
                "its data is in another file; make it one with `qemu-img convert -O qcow2`",
            ));
        }
        if self.encryption != 0 {
            return Err(refused(path, "it is encrypted"));
        }
        if self.incompatible & CORRUPT != 0 {
            return Err(refused(path, "it is marked as corrupt; repair it with `qemu-img check -r all`"));
        }
        match self.size <= limit {
            true => Ok(()),
            false => Err(ImageError::TooLarge { what: path.display().to_string(), size: self.size, limit }),
        }
    }
}

/// What matters of `qemu-img info --output=json`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    #[serde(default)]
    actual_size: u64,
    backing_filename: Option<String>,
    full_backing_filename: Option<String>,
    #[serde(default)]
    encrypted: bool,
    #[serde(default)]
    format_specific: serde_json::Value,
}

impl Info {
    fn check(&self, path: &Path, size: u64) -> Result<(), ImageError> {
        let elsewhere = self.backing_filename.is_some()
            || self.full_backing_filename.is_some()
            || self.format_specific.pointer("/data/data-file").is_some();
        if elsewhere || self.encrypted || self.virtual_size != size {
            return Err(refused(
                path,
                "it refers to other files, is encrypted, or changed while it was looked at",
            ));
        }
        Ok(())
    }
}

/// Reads the progress that qemu-img prints: `    (12.34/100%)\r`.
#[derive(Default)]
struct Percent {
    line: String,
}

impl Percent {
    fn take(&mut self, piece: &[u8]) -> Option<f64> {
        self.line.push_str(&String::from_utf8_lossy(piece));
        let end = self.line.rfind('\r')?;
        let rest = self.line.split_off(end);
        let last = std::mem::replace(&mut self.line, rest);
        let number = last.rsplit('(').next()?.split('/').next()?;
        number.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_progress_in_pieces() {
        let mut percent = Percent::default();
        assert_eq!(percent.take(b"    (0.00/100%)\r    (12"), Some(0.0));
        assert_eq!(percent.take(b".50/100%"), None);
        assert_eq!(percent.take(b")\r"), Some(12.5));
    }
}
