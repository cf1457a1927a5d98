//! The JSON documents of container images. OCI image specification 1.1 (`image-index.md`, `manifest.md`, `config.md`),
//! whose field names Docker's formats share; `docker save` writes one of its own.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::image::{Architecture, ContainerConfig, Digest, ImageError};

/// No honest manifest or index is longer, in bytes; registries refuse such.
pub const MANIFEST_LIMIT: u64 = 4 << 20;
pub const CONFIG_LIMIT: u64 = 8 << 20;
const MOST_LAYERS: usize = 512;

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Platform {
    pub architecture: String,
    pub os: String,
}

/// What a manifest's URL or blob can hold.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    schema_version: u32,
    manifests: Option<Vec<Descriptor>>,
    layers: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
}

pub enum Parsed {
    /// One image for several platforms.
    Index(Vec<Descriptor>),
    Image(ImageManifest),
}

#[derive(Debug)]
pub struct ImageManifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// Reads an index or a manifest.
///
/// # Errors
///
/// It is neither.
pub fn parse(bytes: &[u8], name: &str) -> Result<Parsed, ImageError> {
    let bad = |why: &str| ImageError::invalid(name, why);
    let document: Document = serde_json::from_slice(bytes).map_err(|e| bad(&e.to_string()))?;
    if document.schema_version != 2 {
        return Err(bad("it is of an outdated format; push it again with a current program"));
    }
    match document {
        Document { manifests: Some(manifests), layers: None, config: None, .. } => {
            Ok(Parsed::Index(manifests))
        }
        Document { manifests: None, layers: Some(layers), config: Some(config), .. } => {
            if layers.len() > MOST_LAYERS {
                return Err(bad(&format!("it has more than {MOST_LAYERS} layers")));
            }
            Ok(Parsed::Image(ImageManifest { config, layers }))
        }
        _ => Err(bad("it is neither an index nor an image manifest")),
    }
}

/// The entry of an index for an architecture. `name` picks among several images of a layout.
///
/// # Errors
///
/// There is none, or several.
pub fn choose(
    index: Vec<Descriptor>,
    architecture: Architecture,
    tag: Option<&str>,
    name: &str,
) -> Result<Descriptor, ImageError> {
    const REF_NAME: &str = "org.opencontainers.image.ref.name";
    const FULL_NAME: &str = "io.containerd.image.name";
    let named = |entry: &Descriptor| {
        let has = |key| entry.annotations.get(key).map(String::as_str) == tag;
        tag.is_none() || has(REF_NAME) || has(FULL_NAME)
    };
    let fits = |entry: &Descriptor| {
        entry
            .platform
            .as_ref()
            .is_none_or(|platform| platform.os == "linux" && platform.architecture == architecture.oci_name())
    };
    let all: Vec<String> = index
        .iter()
        .map(|entry| {
            let platform =
                entry.platform.as_ref().map(|found| format!("{}/{}", found.os, found.architecture));
            entry.annotations.get(REF_NAME).cloned().or(platform).unwrap_or_else(|| entry.digest.to_string())
        })
        .collect();
    let mut found = index.into_iter().filter(|entry| named(entry) && fits(entry));
    let all = all.join(", ");
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => {
            Err(ImageError::invalid(name, format!("it has several images ({all}); say which")))
        }
        (None, _) => {
            let wanted = tag.map(|tag| format!("{tag} for ")).unwrap_or_default();
            Err(ImageError::invalid(
                name,
                format!("it has nothing for {wanted}linux/{}: {all}", architecture.oci_name()),
            ))
        }
    }
}

#[derive(Debug, Deserialize)]
pub struct ImageConfig {
    pub architecture: String,
    pub os: String,
    #[serde(default)]
    pub config: Option<RunConfig>,
    pub rootfs: RootFsConfig,
}

#[derive(Debug, Deserialize)]
pub struct RootFsConfig {
    /// Digests of the layers uncompressed, from the bottom up.
    pub diff_ids: Vec<Digest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
}

impl ImageConfig {
    /// # Errors
    ///
    /// It is malformed, or for another kind of machine.
    pub fn parse(bytes: &[u8], architecture: Architecture, name: &str) -> Result<Self, ImageError> {
        let bad = |why: String| ImageError::invalid(format!("the configuration of {name}"), why);
        let config: ImageConfig = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        if config.os != "linux" || config.architecture != architecture.oci_name() {
            let wanted = architecture.oci_name();
            return Err(bad(format!("it is for {}/{}, not linux/{wanted}", config.os, config.architecture)));
        }
        Ok(config)
    }

    /// What the image would run.
    pub fn container(&self) -> ContainerConfig {
        let Some(run) = &self.config else { return ContainerConfig::default() };
        ContainerConfig {
            entrypoint: run.entrypoint.clone().unwrap_or_default(),
            cmd: run.cmd.clone().unwrap_or_default(),
            env: run.env.clone().unwrap_or_default(),
            working_dir: run.working_dir.clone().unwrap_or_default(),
            user: run.user.clone().unwrap_or_default(),
        }
    }
}

/// One image in the `manifest.json` of `docker save`; paths are of the archive.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SavedImage {
    pub config: String,
    #[serde(default)]
    pub repo_tags: Option<Vec<String>>,
    pub layers: Vec<String>,
}
