//! The identity of an ext4 file system, changed without a process.
//!
//! A clone of a file system has its UUID, and two such disks in one guest would be taken for each other. With
//! `metadata_csum_seed` the checksums of all metadata depend on a stored seed rather than on the UUID, so that a
//! new UUID is a change to the superblock alone. Layout: Linux `Documentation/filesystems/ext4/super.rst`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const SUPERBLOCK: u64 = 1024;
const SIZE: usize = 1024;
const MAGIC: (usize, u16) = (0x38, 0xef53);
const FEATURE_INCOMPAT: usize = 0x60;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const FEATURE_RO_COMPAT: usize = 0x64;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const UUID: usize = 0x68;
const CHECKSUM: usize = 0x3fc;

const CRC_32C: crc::Crc<u32> = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);

/// Gives the ext4 file system in `file`, which nobody has mounted, a random UUID. The backup superblocks keep the
/// old one, which nothing compares.
///
/// # Errors
///
/// It is not ext4 with `metadata_csum` and `metadata_csum_seed` (kind `InvalidData`), or cannot be written.
pub fn new_ext4_identity(file: &File) -> io::Result<[u8; 16]> {
    let mut block = [0; SIZE];
    file.read_exact_at(&mut block, SUPERBLOCK)?;
    let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    if half(MAGIC.0) != MAGIC.1
        || word(FEATURE_INCOMPAT) & INCOMPAT_CSUM_SEED == 0
        || word(FEATURE_RO_COMPAT) & RO_COMPAT_METADATA_CSUM == 0
        || word(CHECKSUM) != checksum(&block)
    {
        let why = "not an ext4 file system with metadata_csum_seed, or a damaged one";
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let uuid = random_uuid()?;
    block[UUID..UUID + 16].copy_from_slice(&uuid);
    let sum = checksum(&block).to_le_bytes();
    block[CHECKSUM..].copy_from_slice(&sum);
    file.write_all_at(&block, SUPERBLOCK)?;
    Ok(uuid)
}

/// CRC-32C with all bits set at first and no inversion at the end, as ext4 and EROFS have it.
fn checksum(block: &[u8; SIZE]) -> u32 {
    !CRC_32C.checksum(&block[..CHECKSUM])
}

/// RFC 9562, version 4.
fn random_uuid() -> io::Result<[u8; 16]> {
    let mut uuid = [0; 16];
    getrandom::fill(&mut uuid).map_err(io::Error::other)?;
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}
