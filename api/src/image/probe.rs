//! What is in a file, told by its first bytes. The name says nothing, and a file can be made to look like
//! another: whoever uses what is found here checks it, or hands it to a guest that is locked in.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What a disk image or file system begins like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    FileSystem(FileSystem),
    /// A GUID partition table (UEFI 2.10, 5.3).
    Gpt,
    /// A DOS partition table.
    Mbr,
    Qcow2,
    /// A disk image of another virtual machine monitor, by the name of its format.
    Foreign(&'static str),
    /// A compressed file, by the name of the program that opens it.
    Compressed(&'static str),
    /// A tar archive.
    Tar,
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    Erofs,
    Squashfs,
    /// Also ext2 and ext3.
    Ext4,
    Xfs,
    Btrfs,
}

impl FileSystem {
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Erofs => "erofs",
            FileSystem::Squashfs => "squashfs",
            FileSystem::Ext4 => "ext4",
            FileSystem::Xfs => "xfs",
            FileSystem::Btrfs => "btrfs",
        }
    }
}

/// Looks at the beginning of a file.
///
/// # Errors
///
/// It cannot be read.
pub fn format(file: &File) -> io::Result<Format> {
    let at = |offset: u64, magic: &[u8]| begins(file, offset, magic);
    for (magic, format) in [
        (&b"QFI\xfb"[..], Format::Qcow2),
        (b"KDMV", Format::Foreign("VMDK")),
        (b"COWD", Format::Foreign("VMDK")),
        (b"vhdxfile", Format::Foreign("VHDX")),
        (b"conectix", Format::Foreign("VHD")),
        (b"QED\0", Format::Foreign("QED")),
        (b"\x1f\x8b", Format::Compressed("gunzip")),
        (b"\xfd7zXZ\0", Format::Compressed("unxz")),
        (b"\x28\xb5\x2f\xfd", Format::Compressed("unzstd")),
        (b"BZh", Format::Compressed("bunzip2")),
    ] {
        if at(0, magic)? {
            return Ok(format);
        }
    }
    if at(64, b"\x7f\x10\xda\xbe")? {
        return Ok(Format::Foreign("VDI"));
    }
    if at(512, b"EFI PART")? || at(4096, b"EFI PART")? {
        return Ok(Format::Gpt);
    }
    if let Some(found) = file_system(file, 0)? {
        return Ok(Format::FileSystem(found));
    }
    if at(257, b"ustar")? {
        return Ok(Format::Tar);
    }
    Ok(if at(510, b"\x55\xaa")? { Format::Mbr } else { Format::Unknown })
}

/// The file system that begins at `start` bytes.
///
/// # Errors
///
/// The file cannot be read.
pub fn file_system(file: &File, start: u64) -> io::Result<Option<FileSystem>> {
    for (offset, magic, found) in [
        (1024, &0xe0f5_e1e2_u32.to_le_bytes()[..], FileSystem::Erofs),
        (0, b"hsqs", FileSystem::Squashfs),
        (1024 + 0x38, &0xef53_u16.to_le_bytes(), FileSystem::Ext4),
        (0, b"XFSB", FileSystem::Xfs),
        (0x1_0040, b"_BHRfS_M", FileSystem::Btrfs),
    ] {
        if begins(file, start.saturating_add(offset), magic)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn begins(file: &File, offset: u64, magic: &[u8]) -> io::Result<bool> {
    let mut bytes = vec![0; magic.len()];
    match file.read_exact_at(&mut bytes, offset) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| bytes == magic),
    }
}
