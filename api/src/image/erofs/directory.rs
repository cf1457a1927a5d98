//! Directories as EROFS has them: blocks of entries followed by their names, sorted over the whole directory, so
//! that the kernel can search by halves.

use crate::image::tree::Kind;

use super::format::BLOCK;

/// Bytes of an entry without its name.
const ENTRY: usize = 12;

/// A name in a directory: where its inode is, and what kind.
pub struct Name<'a> {
    pub name: &'a [u8],
    /// Inode number.
    pub inode: u64,
    pub kind: u8,
}

/// The numbers that `readdir` gives for kinds (Linux `include/linux/fs_types.h`).
pub fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice { .. } => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// Bytes of a directory with these names, which are sorted and include `.` and `..`.
pub fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut full, mut used) = (0, 0);
    for name in names {
        let more = ENTRY + name.len();
        if used + more > BLOCK as usize {
            full += BLOCK;
            used = 0;
        }
        used += more;
    }
    full + used as u64
}

/// The directory's content; every block but the last is filled up with zeros.
pub fn encode(names: &[Name<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = names;
    while !rest.is_empty() {
        bytes.resize(bytes.len().next_multiple_of(BLOCK as usize), 0);
        let mut used = 0;
        let fits = rest.iter().take_while(|name| {
            used += ENTRY + name.name.len();
            used <= BLOCK as usize
        });
        // One always fits: a name has 255 bytes at most.
        let count = fits.count().max(1);
        let (block, others) = rest.split_at(count);
        rest = others;
        let mut offset = ENTRY * count;
        for name in block {
            bytes.extend(name.inode.to_le_bytes());
            // Offsets are within a block.
            bytes.extend((offset as u16).to_le_bytes());
            bytes.extend([name.kind, 0]);
            offset += name.name.len();
        }
        block.iter().for_each(|name| bytes.extend(name.name));
    }
    bytes
}
