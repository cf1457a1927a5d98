//! What an image is: which blobs make a guest, and how it boots from them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Blob, Digest};

/// An image. Its caller keeps it; the blobs it names are in [`super::Blobs`] as long as they are referenced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub architecture: Architecture,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    pub kernel: Blob,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Blob>,
    /// Words for the kernel command line that this image wants beyond [`Root::boot_args`].
    #[serde(default)]
    pub boot_args: String,
    pub root: Root,
    /// What the container image it was made from would run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerConfig>,
}

/// What a guest has as its first disk, `/dev/vda`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Root {
    /// A read-only EROFS file system that all instances share. Each has a writable ext4 layer of its own as its
    /// second disk, `/dev/vdb`.
    Erofs {
        #[serde(flatten)]
        blob: Blob,
        /// What an instance's layer begins as; an empty file system if None. See `volume::Content::Layer`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        layer: Option<Blob>,
    },
    /// A disk of which each instance has a copy.
    Disk {
        #[serde(flatten)]
        blob: Blob,
        /// The device with the root file system: `/dev/vda`, or a partition such as `/dev/vda1`.
        device: String,
    },
}

/// Processors an image can be for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    #[serde(rename = "x86_64")]
    X86_64,
    Aarch64,
}

/// The part of an OCI image's configuration that says what to run. What is not said is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`.
    pub user: String,
}

impl Manifest {
    /// All blobs of the image.
    pub fn blobs(&self) -> Vec<Blob> {
        let root = match &self.root {
            Root::Erofs { blob, layer } => [Some(*blob), *layer],
            Root::Disk { blob, .. } => [Some(*blob), None],
        };
        [Some(self.kernel), self.initrd].into_iter().chain(root).flatten().collect()
    }

    /// Bytes of all blobs, holes included.
    pub fn size(&self) -> u64 {
        self.blobs().iter().fold(0, |sum, blob| sum.saturating_add(blob.size))
    }

    /// The kernel command line of this image's own. Where it names a `root=`, the VMM must not be asked to add one
    /// (`is_root_device`), since the last one counts.
    pub fn boot_args(&self) -> String {
        let mut args = self.root.boot_args();
        if !self.boot_args.is_empty() {
            args = format!("{args} {}", self.boot_args);
        }
        args
    }
}

impl Root {
    /// How the kernel, and the agent in it, find the root file system.
    pub fn boot_args(&self) -> String {
        match self {
            Root::Erofs { .. } => "root=/dev/vda ro rootfstype=erofs pulau.overlay=/dev/vdb".to_owned(),
            Root::Disk { device, .. } => format!("root={device} rw"),
        }
    }

    /// The blob of the first disk.
    pub fn blob(&self) -> &Blob {
        match self {
            Root::Erofs { blob, .. } | Root::Disk { blob, .. } => blob,
        }
    }

    /// Digest of the blob of the first disk.
    pub fn digest(&self) -> &Digest {
        &self.blob().digest
    }
}

impl Architecture {
    /// This host's, and so its guests'.
    pub fn host() -> Self {
        match cfg!(target_arch = "aarch64") {
            true => Architecture::Aarch64,
            false => Architecture::X86_64,
        }
    }

    /// The name OCI images have for it (Go's `GOARCH`).
    pub fn oci_name(self) -> &'static str {
        match self {
            Architecture::X86_64 => "amd64",
            Architecture::Aarch64 => "arm64",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Architecture::X86_64 => "x86_64",
            Architecture::Aarch64 => "aarch64",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_plain_json_and_boots_as_it_says() {
        let blob = |text: &str| Blob { digest: Digest::of(text.as_bytes()), size: text.len() as u64 };
        let mut manifest = Manifest {
            architecture: Architecture::X86_64,
            created: 1_735_689_600,
            kernel: blob("kernel"),
            initrd: None,
            boot_args: "quiet".into(),
            root: Root::Erofs { blob: blob("root"), layer: None },
            container: None,
        };
        let json = serde_json::to_value(&manifest).unwrap();
        assert_eq!(json["root"]["kind"], "erofs");
        assert_eq!(json["root"]["digest"], blob("root").digest.to_string());
        assert_eq!(json["architecture"], "x86_64");
        assert_eq!(serde_json::from_value::<Manifest>(json).unwrap(), manifest);
        assert_eq!(manifest.size(), 10);
        assert_eq!(manifest.boot_args(), "root=/dev/vda ro rootfstype=erofs pulau.overlay=/dev/vdb quiet");

        manifest.root = Root::Disk { blob: blob("disk"), device: "/dev/vda1".into() };
        manifest.boot_args = String::new();
        assert_eq!(manifest.boot_args(), "root=/dev/vda1 rw");
        let json = serde_json::to_value(&manifest).unwrap();
        assert_eq!(serde_json::from_value::<Manifest>(json).unwrap(), manifest);
    }
}
