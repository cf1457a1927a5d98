//! The last part of an image: directories, inodes and the superblock, once all contents are in their blocks.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use crate::files::{FileError, IoContext, Phase, Task};
use crate::image::ImageError;
use crate::image::tree::{Kind, NodeId, ROOT, Tree};

use super::directory::{self, Name};
use super::format::{BLOCK, INLINE_LIMIT, INODE, Inode, SLOT, Superblock, blocks, xattrs_size};
use super::{DataArea, Extent};

/// Extended attributes of one file, in bytes, encoded: with them and inline content an inode fits into a block.
pub const XATTRS_LIMIT: u64 = BLOCK - INODE - INLINE_LIMIT;
/// Images are whole multiples of this many bytes, so that they can also be persistent-memory devices.
const UNIT: u64 = 2 << 20;

/// One inode's place and size.
#[derive(Clone, Copy, Default)]
struct Place {
    /// Inode number; 0 if nothing leads to the node.
    inode: u64,
    /// Of a directory, the one it is in.
    parent: NodeId,
    links: u32,
    /// Bytes of content.
    size: u64,
    inline: bool,
    /// First block, of a directory that is not inline.
    block: u64,
}

/// Completes the image with what `tree` leads to, and returns its size in bytes. The same tree and contents give
/// the same bytes.
///
/// # Errors
///
/// It would be too large for the format; writing fails; the task is cancelled.
pub fn finish(data: &DataArea<'_>, tree: &Tree, uuid: [u8; 16], task: &Task) -> Result<u64, ImageError> {
    let order = order(tree);
    let mut places = vec![Place::default(); tree.len()];
    count_links(tree, &order, &mut places);
    let mut next_block = data.next_block();
    let mut at = SLOT; // Inode number 0 would be one that readers pass over.
    for id in &order {
        let node = tree.node(*id);
        let place = &mut places[*id];
        place.size = content_size(&node.kind);
        place.inline = match node.kind {
            Kind::File(extent) => matches!(extent, Extent::Small { size: 1.., .. }),
            _ => (1..=INLINE_LIMIT).contains(&place.size),
        };
        if !place.inline && matches!(node.kind, Kind::Directory(_) | Kind::Symlink(_)) {
            place.block = next_block;
            next_block = next_block.saturating_add(blocks(place.size));
        }
        // Everything of one inode is in one block.
        let whole = INODE + xattrs_size(&node.meta.xattrs) + if place.inline { place.size } else { 0 };
        if at % BLOCK + whole > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        place.inode = at / SLOT;
        at = (at + whole).next_multiple_of(SLOT);
    }
    // What a later layer replaced or removed.
    for id in (0..tree.len()).filter(|id| places[*id].inode == 0) {
        if let Kind::File(extent) = tree.node(id).kind {
            data.forget(extent)?;
        }
    }
    let meta_block = next_block;
    let end = (meta_block.saturating_mul(BLOCK)).saturating_add(at).next_multiple_of(UNIT);
    let too_large = |_| ImageError::TooLarge { what: "the file system".into(), size: end, limit: 16 << 40 };
    let superblock = Superblock {
        root: u16::try_from(places[ROOT].inode).unwrap_or(1), // The first one.
        inodes: order.len() as u64,
        blocks: u32::try_from(end / BLOCK).map_err(too_large)?,
        meta_block: u32::try_from(meta_block).map_err(too_large)?,
        uuid,
    };
    let writer = Writer { data, tree, places: &places, meta_start: meta_block * BLOCK };
    writer.inodes(&order, task)?;
    data.image().write_all_at(&superblock.encode(), 0).context("write", data.path())?;
    data.image().set_len(end).context("set the size of", data.path())?;
    Ok(end)
}

/// Every node that the root leads to, once each, directory by directory.
fn order(tree: &Tree) -> Vec<NodeId> {
    let mut seen = vec![false; tree.len()];
    let mut order = vec![ROOT];
    seen[ROOT] = true;
    let mut at = 0;
    while let Some(id) = order.get(at) {
        at += 1;
        let Kind::Directory(children) = &tree.node(*id).kind else { continue };
        for entry in children.values() {
            if !std::mem::replace(&mut seen[entry.node], true) {
                order.push(entry.node);
            }
        }
    }
    order
}

fn count_links(tree: &Tree, order: &[NodeId], places: &mut [Place]) {
    places[ROOT].links = 1; // The root is its own parent.
    for id in order {
        let Kind::Directory(children) = &tree.node(*id).kind else { continue };
        places[*id].links += 1; // `.`
        for entry in children.values() {
            places[entry.node].links += 1;
            if matches!(tree.node(entry.node).kind, Kind::Directory(_)) {
                places[*id].links += 1; // `..`
                places[entry.node].parent = *id;
            }
        }
    }
}

fn content_size(kind: &Kind) -> u64 {
    match kind {
        Kind::Directory(children) => {
            let mut names: Vec<&[u8]> =
                children.keys().map(Vec::as_slice).chain([&b"."[..], b".."]).collect();
            names.sort_unstable();
            directory::size(names.into_iter())
        }
        Kind::File(extent) => extent.size(),
        Kind::Symlink(target) => target.len() as u64,
        Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Fifo => 0,
    }
}

struct Writer<'a> {
    data: &'a DataArea<'a>,
    tree: &'a Tree,
    places: &'a [Place],
    /// Byte at which inodes begin.
    meta_start: u64,
}

impl Writer<'_> {
    fn inodes(&self, order: &[NodeId], task: &Task) -> Result<(), FileError> {
        let path = self.data.path();
        let mut out = BufWriter::with_capacity(1 << 20, self.data.image());
        out.seek(SeekFrom::Start(self.meta_start)).context("write", path)?;
        let mut at = 0;
        for (count, id) in (1u32..).zip(order) {
            if count % 1024 == 0 {
                task.at(Phase::Write, count.into(), Some(order.len() as u64))?;
            }
            let place = &self.places[*id];
            let start = place.inode * SLOT;
            // Less than a block.
            out.write_all(&vec![0; (start - at) as usize]).context("write", path)?;
            let mut bytes = self.inode(*id, count).encode();
            let content = self.content(*id)?;
            if place.inline {
                bytes.extend(content);
            } else if !content.is_empty() {
                self.data.image().write_all_at(&content, place.block * BLOCK).context("write", path)?;
            }
            out.write_all(&bytes).context("write", path)?;
            at = start + bytes.len() as u64;
        }
        out.flush().context("write", path)
    }

    fn inode(&self, id: NodeId, number: u32) -> Inode<'_> {
        let (node, place) = (self.tree.node(id), &self.places[id]);
        let block = match node.kind {
            Kind::File(Extent::Blocks { block, .. }) => block,
            _ => place.block,
        };
        // Every block number is below the image's number of blocks, which fits.
        let block = block as u32;
        let Place { links, size, inline, .. } = *place;
        Inode { meta: &node.meta, kind: &node.kind, number, links, size, inline, block }
    }

    /// Content that is not in its blocks yet.
    fn content(&self, id: NodeId) -> Result<Vec<u8>, FileError> {
        match &self.tree.node(id).kind {
            Kind::Directory(children) => {
                let name =
                    |name: &'static [u8], id: NodeId| Name { name, inode: self.places[id].inode, kind: 2 };
                let mut names = vec![name(b".", id), name(b"..", self.places[id].parent)];
                names.extend(children.iter().map(|(name, entry)| Name {
                    name,
                    inode: self.places[entry.node].inode,
                    kind: directory::file_type(&self.tree.node(entry.node).kind),
                }));
                names.sort_unstable_by_key(|name| name.name);
                Ok(directory::encode(&names))
            }
            Kind::Symlink(target) => Ok(target.clone()),
            Kind::File(Extent::Small { at, size }) => {
                let mut content = vec![0; usize::from(*size)];
                self.data.read_small(*at, &mut content)?;
                Ok(content)
            }
            _ => Ok(Vec::new()),
        }
    }
}
