//! A root file system made of layers, one over the other, without unpacking them anywhere.

use std::fs::File;
use std::io::Read;

use crate::files::{FileError, Staged, Task};

use super::blobs::Room;
use super::digest::Hashing;
use super::erofs::{self, DataArea, XATTRS_LIMIT};
use super::layer::{self, Bounded, Content, LayerPath, LayerSink, decompress};
use super::tree::{Kind, Meta, Node, Tree};
use super::{Blobs, Digest, ImageError};

/// Entries of all layers together.
const MOST_ENTRIES: usize = 2_000_000;
/// What the tree may take in memory for names, links and attributes of all layers together, about, in bytes.
const MOST_NAMES: u64 = 256 << 20;
const NAME_OVERHEAD: u64 = 64;

/// A root file system being made.
pub struct RootFs<'a> {
    tree: Tree,
    data: DataArea<'a>,
    task: &'a Task,
    /// Bytes of content that may still come.
    left: u64,
    names_left: u64,
    limit: u64,
}

impl<'a> RootFs<'a> {
    /// Begins an empty one in `image`, a staged file of `blobs`, of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// A scratch file cannot be made.
    pub fn new(blobs: &'a Blobs, image: &'a Staged, limit: u64, task: &'a Task) -> Result<Self, FileError> {
        let room = Room::new(blobs.staging().dir(), blobs.reserve());
        let data = DataArea::new(image.file(), image.path(), blobs.staging().scratch()?, room);
        Ok(RootFs { tree: Tree::default(), data, task, left: limit, names_left: MOST_NAMES, limit })
    }

    /// Puts a layer over what is there, and returns the digest of what it is uncompressed. It is read to its end.
    ///
    /// # Errors
    ///
    /// The layer is malformed, cut off, or has what is refused.
    pub fn apply(&mut self, layer: impl Read, name: &str) -> Result<Digest, ImageError> {
        self.tree.next_layer();
        let layer = decompress(layer).map_err(|e| layer::unreadable(name, e))?;
        // Archives have a header of 512 bytes for each entry, and often three.
        let limit = self.limit.saturating_add(MOST_ENTRIES as u64 * 2048);
        let mut plain = Hashing::new(Bounded::new(layer, limit));
        layer::read(&mut plain, name, self)?;
        Ok(plain.finish().0)
    }

    /// Puts a program of the host's into the file system.
    ///
    /// # Errors
    ///
    /// It cannot be read, or something is in the way.
    pub fn add_program(&mut self, path: &str, mut program: File) -> Result<(), ImageError> {
        let size = program.metadata().map_err(|e| ImageError::invalid(path, e.to_string()))?.len();
        let meta = Meta { mode: 0o755, ..Meta::default() };
        self.put(&parse(path)?, meta, Content::File { size, data: &mut program })
    }

    /// Makes a link, in place of what is there.
    ///
    /// # Errors
    ///
    /// Something is in the way.
    pub fn add_link(&mut self, path: &str, target: &str) -> Result<(), ImageError> {
        let meta = Meta { mode: 0o777, ..Meta::default() };
        self.put(&parse(path)?, meta, Content::Symlink(target.as_bytes().to_vec()))
    }

    /// Makes a directory, if there is nothing at its path.
    ///
    /// # Errors
    ///
    /// Something is in the way.
    pub fn add_directory(&mut self, path: &str, mode: u16) -> Result<(), ImageError> {
        let place = parse(path)?;
        match self.tree.look(&place) {
            Some(_) => Ok(()),
            None => self.put(&place, Meta { mode, ..Meta::default() }, Content::Directory),
        }
    }

    /// Begins what is laid over all layers.
    pub fn next_layer(&mut self) {
        self.tree.next_layer();
    }

    /// Completes the image; returns its size in bytes.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn finish(self, uuid: [u8; 16]) -> Result<u64, ImageError> {
        erofs::finish(&self.data, &self.tree, uuid, self.task)
    }

    /// Accounts for an entry.
    fn take(&mut self, path: &LayerPath, bytes: u64) -> Result<(), ImageError> {
        self.task.check()?;
        let names = self.names_left.checked_sub(bytes.saturating_add(NAME_OVERHEAD));
        let (Some(left), true) = (names, self.tree.len() < MOST_ENTRIES) else {
            let what = path.to_string();
            return Err(ImageError::invalid(
                what,
                "the image has more files, or longer names, than images may have",
            ));
        };
        self.names_left = left;
        Ok(())
    }
}

fn parse(path: &str) -> Result<LayerPath, ImageError> {
    LayerPath::parse(path.as_bytes()).map_err(|why| ImageError::invalid(path, why))
}

fn refuse(path: &LayerPath, why: String) -> ImageError {
    ImageError::invalid(format!("{path} in the image"), why)
}

impl LayerSink for RootFs<'_> {
    fn put(&mut self, path: &LayerPath, meta: Meta, content: Content<'_>) -> Result<(), ImageError> {
        let attributes = erofs::xattrs_size(&meta.xattrs);
        if attributes > XATTRS_LIMIT {
            return Err(refuse(path, "its extended attributes are too long".into()));
        }
        let name = path.split().map_or(0, |(_, name)| name.len() as u64);
        self.take(path, name + attributes)?;
        let kind = match content {
            Content::Directory => Kind::Directory(Default::default()),
            Content::Symlink(target) => {
                self.take(path, target.len() as u64)?;
                Kind::Symlink(target)
            }
            Content::CharDevice { major, minor } => Kind::CharDevice { major, minor },
            Content::BlockDevice { major, minor } => Kind::BlockDevice { major, minor },
            Content::Fifo => Kind::Fifo,
            Content::File { size, data } => {
                let (what, limit) = (|| "the unpacked image".to_owned(), self.limit);
                let needed = self.limit.saturating_sub(self.left).saturating_add(size);
                self.left = self.left.checked_sub(size).ok_or_else(|| ImageError::TooLarge {
                    what: what(),
                    size: needed,
                    limit,
                })?;
                let extent = self.data.put(data, size, self.task);
                Kind::File(extent.map_err(|e| layer::unreadable(&path.to_string(), e))?)
            }
        };
        self.tree.put(path, Node { meta, kind }).map_err(|why| refuse(path, why))
    }

    fn link(&mut self, path: &LayerPath, target: &LayerPath) -> Result<(), ImageError> {
        self.take(path, path.split().map_or(0, |(_, name)| name.len() as u64))?;
        self.tree.link(path, target).map_err(|why| refuse(path, why))
    }

    fn whiteout(&mut self, path: &LayerPath) -> Result<(), ImageError> {
        self.task.check()?;
        self.tree.whiteout(path);
        Ok(())
    }

    fn opaque(&mut self, path: &LayerPath) -> Result<(), ImageError> {
        self.task.check()?;
        self.tree.opaque(path);
        Ok(())
    }
}
