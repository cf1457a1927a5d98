//! Container images in files: an OCI layout (a directory, or an archive of one), and what `docker save` writes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::files::{self, IoContext};
use crate::image::layer::{LayerPath, unreadable};
use crate::image::{Architecture, Digest, ImageError};

use super::document::{
    CONFIG_LIMIT, Descriptor, ImageConfig, ImageManifest, MANIFEST_LIMIT, Parsed, SavedImage, choose, parse,
};
use super::{Layer, Opened};

/// Entries of an archive.
const MOST_ENTRIES: usize = 100_000;
/// Indexes within indexes.
const DEEPEST: usize = 4;

/// Files by their path, in a directory or an archive.
enum Files {
    Directory(PathBuf),
    Archive { file: File, entries: HashMap<String, Place> },
}

enum Place {
    Data {
        offset: u64,
        size: u64,
    },
    /// To another entry, as older versions of `docker save` have for layers that repeat.
    Link(String),
}

/// Opens the image in a layout directory or an archive. `tag` picks one among several.
///
/// # Errors
///
/// It is neither, lacks something, or has no image for this architecture.
pub fn open(path: &Path, tag: Option<&str>, architecture: Architecture) -> Result<Opened, ImageError> {
    let name = path.display().to_string();
    let files = match path.metadata().context("look at", path)?.is_dir() {
        true => Files::Directory(path.to_owned()),
        false => Files::archive(path, &name)?,
    };
    if files.has("oci-layout") || files.has("index.json") {
        let index = files.read_small("index.json", MANIFEST_LIMIT, &name)?;
        return layout(&files, &index, tag, architecture, &name);
    }
    if files.has("manifest.json") {
        let saved = files.read_small("manifest.json", MANIFEST_LIMIT, &name)?;
        return docker_save(&files, &saved, tag, architecture, &name);
    }
    Err(ImageError::invalid(name, "it is neither an OCI layout nor an archive of one, nor of `docker save`"))
}

fn layout(
    files: &Files,
    index: &[u8],
    tag: Option<&str>,
    architecture: Architecture,
    name: &str,
) -> Result<Opened, ImageError> {
    let (mut document, mut tag) = (parse(index, name)?, tag);
    for _ in 0..DEEPEST {
        match document {
            Parsed::Image(ImageManifest { config, layers }) => {
                let bytes = files.read_blob(&config, CONFIG_LIMIT, name)?;
                let parsed = ImageConfig::parse(&bytes, architecture, name)?;
                let layers = layers.iter().map(|layer| {
                    let path = blob_path(&layer.digest);
                    let (file, offset, size) = files.find(&path, name)?;
                    let digest = Some(layer.digest);
                    Ok(Layer { file, offset, size, digest, media_type: layer.media_type.clone() })
                });
                let layers = layers.collect::<Result<_, ImageError>>()?;
                return Ok(Opened { id: config.digest, config: parsed, layers });
            }
            Parsed::Index(entries) => {
                // The name is that of the outermost entry.
                let chosen = choose(entries, architecture, tag.take(), name)?;
                document = parse(&files.read_blob(&chosen, MANIFEST_LIMIT, name)?, name)?;
            }
        }
    }
    Err(ImageError::invalid(name, "it has indexes within indexes"))
}

fn docker_save(
    files: &Files,
    manifest: &[u8],
    tag: Option<&str>,
    architecture: Architecture,
    name: &str,
) -> Result<Opened, ImageError> {
    let bad = |why: String| ImageError::invalid(name, why);
    let images: Vec<SavedImage> = serde_json::from_slice(manifest).map_err(|e| bad(e.to_string()))?;
    let tags = |image: &SavedImage| image.repo_tags.clone().unwrap_or_default();
    let all = images.iter().flat_map(tags).collect::<Vec<_>>().join(", ");
    let mut found =
        images.into_iter().filter(|image| tag.is_none_or(|tag| tags(image).iter().any(|found| found == tag)));
    let image = match (found.next(), found.next()) {
        (Some(image), None) => image,
        (Some(_), Some(_)) => return Err(bad(format!("it has several images ({all}); say which"))),
        (None, _) => return Err(bad(format!("it has no image of that name; it has {all}"))),
    };
    let bytes = files.read_small(&image.config, CONFIG_LIMIT, name)?;
    let config = ImageConfig::parse(&bytes, architecture, name)?;
    let layers = image.layers.iter().map(|path| {
        let (file, offset, size) = files.find(path, name)?;
        Ok(Layer { file, offset, size, digest: None, media_type: String::new() })
    });
    Ok(Opened { id: Digest::of(&bytes), config, layers: layers.collect::<Result<_, ImageError>>()? })
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl Files {
    /// Notes where everything in an archive is. Nothing is unpacked.
    fn archive(path: &Path, name: &str) -> Result<Self, ImageError> {
        let file = files::open_regular(path)?;
        let broken = |e: io::Error| unreadable(name, e);
        let mut archive = tar::Archive::new(file.try_clone().context("open", path)?);
        let mut entries = HashMap::new();
        // Raw: names of such archives are short, and nothing is read whose length is not known to be small.
        for entry in archive.entries_with_seek().map_err(broken)?.raw(true) {
            let entry = entry.map_err(broken)?;
            if entries.len() >= MOST_ENTRIES {
                return Err(ImageError::invalid(name, "it has too many files in it"));
            }
            let (Ok(place), kind) = (LayerPath::parse(&entry.path_bytes()), entry.header().entry_type())
            else {
                return Err(ImageError::invalid(name, "a path in it is not allowed"));
            };
            if kind.is_file() {
                let (offset, size) = (entry.raw_file_position(), entry.size());
                entries.insert(place.to_string(), Place::Data { offset, size });
            } else if kind.is_symlink() || kind.is_hard_link() {
                let target = entry.link_name_bytes().unwrap_or_default();
                if let Some(target) = link_target(&place, &target, kind.is_symlink()) {
                    entries.insert(place.to_string(), Place::Link(target));
                }
            }
        }
        Ok(Files::Archive { file, entries })
    }

    fn has(&self, path: &str) -> bool {
        match self {
            Files::Directory(dir) => dir.join(path).is_file(),
            Files::Archive { entries, .. } => entries.contains_key(&key(path)),
        }
    }

    /// Opens a file: where it begins and how long it is, in bytes.
    fn find(&self, path: &str, name: &str) -> Result<(File, u64, u64), ImageError> {
        let missing = || ImageError::invalid(name, format!("{path} is missing from it"));
        match self {
            Files::Directory(dir) => {
                // A path of our own making, or of a document of the layout.
                let inside = LayerPath::parse(path.as_bytes()).map_err(|_| missing())?;
                let path = dir.join(inside.to_string().trim_start_matches('/'));
                if !path.exists() {
                    return Err(missing());
                }
                let file = files::open_regular(&path)?;
                let size = file.metadata().context("look at", &path)?.len();
                Ok((file, 0, size))
            }
            Files::Archive { file, entries } => {
                let mut place = entries.get(&key(path)).ok_or_else(missing)?;
                if let Place::Link(target) = place {
                    place = entries.get(target).ok_or_else(missing)?;
                }
                match place {
                    Place::Data { offset, size } => {
                        let file = file.try_clone().map_err(|e| ImageError::invalid(name, e.to_string()))?;
                        Ok((file, *offset, *size))
                    }
                    Place::Link(_) => Err(missing()),
                }
            }
        }
    }

    fn read_small(&self, path: &str, limit: u64, name: &str) -> Result<Vec<u8>, ImageError> {
        let (mut file, offset, size) = self.find(path, name)?;
        if size > limit {
            return Err(ImageError::TooLarge { what: format!("{path} in {name}"), size, limit });
        }
        let mut bytes = Vec::new();
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.take(size).read_to_end(&mut bytes));
        read.map_err(|e| ImageError::invalid(name, e.to_string()))?;
        Ok(bytes)
    }

    /// Reads a document and compares it with its digest.
    fn read_blob(&self, descriptor: &Descriptor, limit: u64, name: &str) -> Result<Vec<u8>, ImageError> {
        let path = blob_path(&descriptor.digest);
        let bytes = self.read_small(&path, limit, name)?;
        let (expected, found) = (descriptor.digest, Digest::of(&bytes));
        match expected == found {
            true => Ok(bytes),
            false => Err(ImageError::Digest { what: format!("{path} in {name}"), expected, found }),
        }
    }
}

fn key(path: &str) -> String {
    LayerPath::parse(path.as_bytes()).map(|path| path.to_string()).unwrap_or_default()
}

/// Where a link in an archive leads, if that is in the archive.
fn link_target(from: &LayerPath, target: &[u8], symbolic: bool) -> Option<String> {
    let mut names: Vec<Vec<u8>> = match symbolic {
        true => from.split().map(|(names, _)| names.to_vec()).unwrap_or_default(),
        false => Vec::new(),
    };
    for name in target.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()?),
            name => names.push(name.to_vec()),
        }
    }
    LayerPath::parse(&names.join(&b'/')).ok().map(|path| path.to_string())
}
