//! EROFS structures as they are on disk; names and numbers from Linux `fs/erofs/erofs_fs.h`.

use std::collections::BTreeMap;

use crate::image::tree::{Kind, Meta};

/// Bytes of a block.
pub const BLOCK: u64 = 4096;
/// Content up to this many bytes is put after its inode: more would seldom fit into the rest of a block.
pub const INLINE_LIMIT: u64 = 2048;
/// Bytes of an extended inode.
pub const INODE: u64 = 64;
/// Inode numbers count in units of this many bytes.
pub const SLOT: u64 = 32;

const SUPERBLOCK: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_SB_CHKSUM: u32 = 1;
/// Times are those of modification, not of a change of the inode.
const COMPAT_MTIME: u32 = 2;

/// Whole blocks for this many bytes.
pub fn blocks(size: u64) -> u64 {
    size.div_ceil(BLOCK)
}

/// What the superblock says that is not always the same.
pub struct Superblock {
    pub root: u16,
    pub inodes: u64,
    /// Of the whole image.
    pub blocks: u32,
    pub meta_block: u32,
    pub uuid: [u8; 16],
}

impl Superblock {
    /// The first block of the image.
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK as usize];
        let mut put = |at: usize, bytes: &[u8]| {
            block[SUPERBLOCK + at..SUPERBLOCK + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK.ilog2() as u8]);
        put(14, &self.root.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        put(48, &self.uuid);
        // From the superblock to the end of the block, with the field itself zero.
        let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);
        let sum = !crc.checksum(&block[SUPERBLOCK..]);
        block[SUPERBLOCK + 4..SUPERBLOCK + 8].copy_from_slice(&sum.to_le_bytes());
        block
    }
}

/// One inode, without what follows it.
pub struct Inode<'a> {
    pub meta: &'a Meta,
    pub kind: &'a Kind,
    /// Counts from 1; what `stat` says where numbers have 32 bits.
    pub number: u32,
    pub links: u32,
    /// Bytes of content.
    pub size: u64,
    /// Content comes right after the extended attributes.
    pub inline: bool,
    /// First block of content that is not inline.
    pub block: u32,
}

impl Inode<'_> {
    /// The inode and its extended attributes.
    pub fn encode(&self) -> Vec<u8> {
        const EXTENDED: u16 = 1;
        const FLAT_PLAIN: u16 = 0;
        const FLAT_INLINE: u16 = 2;
        let layout = if self.inline { FLAT_INLINE } else { FLAT_PLAIN };
        let (format, content) = match *self.kind {
            Kind::Directory(_) => (libc::S_IFDIR, self.block),
            Kind::File(_) => (libc::S_IFREG, self.block),
            Kind::Symlink(_) => (libc::S_IFLNK, self.block),
            Kind::CharDevice { major, minor } => (libc::S_IFCHR, device(major, minor)),
            Kind::BlockDevice { major, minor } => (libc::S_IFBLK, device(major, minor)),
            Kind::Fifo => (libc::S_IFIFO, 0),
        };
        let xattrs = encode_xattrs(&self.meta.xattrs);
        let mut bytes = Vec::with_capacity(INODE as usize + xattrs.len());
        bytes.extend((EXTENDED | layout << 1).to_le_bytes());
        bytes.extend(xattr_count(xattrs.len()).to_le_bytes());
        // The bits of the format fit into 16.
        bytes.extend((format as u16 | self.meta.mode).to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(self.size.to_le_bytes());
        bytes.extend(content.to_le_bytes());
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.meta.uid.to_le_bytes());
        bytes.extend(self.meta.gid.to_le_bytes());
        bytes.extend(self.meta.mtime.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.links.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(xattrs);
        bytes
    }
}

/// The kernel's `new_encode_dev`: 12 bits of major and 20 of minor number.
fn device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The header before extended attributes that are not shared.
const XATTR_HEADER: usize = 12;

/// The field that says how long all extended attributes are, in units of 4 bytes and counted from 1.
fn xattr_count(bytes: usize) -> u16 {
    match bytes.checked_sub(XATTR_HEADER) {
        // Their length is limited by `XATTRS_LIMIT`.
        Some(entries) => (entries / 4 + 1) as u16,
        None => 0,
    }
}

/// Bytes that extended attributes take after an inode.
pub fn xattrs_size(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> u64 {
    encode_xattrs(xattrs).len() as u64
}

fn encode_xattrs(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in xattrs {
        let Some((index, name)) = namespace(name) else { continue };
        let (Ok(length), Ok(size)) = (u8::try_from(name.len()), u16::try_from(value.len())) else { continue };
        if bytes.is_empty() {
            bytes.resize(XATTR_HEADER, 0);
        }
        bytes.extend([length, index]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(name);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// The number of a name's namespace, and the rest of the name.
fn namespace(name: &[u8]) -> Option<(u8, &[u8])> {
    let prefixes: [(u8, &[u8]); 4] = [(1, b"user."), (4, b"trusted."), (6, b"security."), (0, b"")];
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => prefixes
            .iter()
            .find_map(|(index, prefix)| name.strip_prefix(*prefix).map(|rest| (*index, rest)))
            .filter(|(index, rest)| *index != 0 && !rest.is_empty()),
    }
}
