//! Partition tables, also such as nobody makes who means well.

use std::io::Write;
use std::process::Command;

use super::*;

/// A file of 64 MiB with an ext4 superblock's magic at the given offsets.
fn disk(file_systems: &[u64]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 << 20).unwrap();
    for start in file_systems {
        file.as_file().write_all_at(&[0x53, 0xef], start + 1024 + 0x38).unwrap();
    }
    file
}

fn sfdisk(file: &tempfile::NamedTempFile, script: &str) {
    let mut child = Command::new("sfdisk")
        .args(["--quiet", "--no-reread", "--no-tell-kernel", "--wipe-partitions", "never"])
        .arg(file.path())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("sfdisk (package fdisk)");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

const MIB: u64 = 1 << 20;

#[test]
fn finds_the_root_by_type_then_by_size() {
    let gpt = "label: gpt\nsize=4M, type=U\nsize=8M, type=L\nsize=16M, type=L\n";
    let file = disk(&[5 * MIB, 13 * MIB]);
    sfdisk(&file, gpt);
    let found = find_root(file.as_file()).unwrap().unwrap();
    assert_eq!((found.number, found.start, found.length), (3, 13 * MIB, 16 * MIB));

    let file = disk(&[5 * MIB, 13 * MIB]);
    sfdisk(&file, &gpt.replacen("type=L", "type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709", 1));
    assert_eq!(find_root(file.as_file()).unwrap().unwrap().number, 2);

    let file = disk(&[MIB, 9 * MIB]);
    sfdisk(&file, "label: dos\nsize=8M, bootable\nsize=16M\n");
    let found = find_root(file.as_file()).unwrap().unwrap();
    assert_eq!((found.number, found.start, found.file_system), (1, MIB, FileSystem::Ext4));

    let file = disk(&[]);
    sfdisk(&file, "label: dos\nsize=8M\n");
    assert_eq!(find_root(file.as_file()).unwrap(), None);
}

#[test]
fn impossible_tables_are_refused() {
    let refused = |change: &dyn Fn(&File)| {
        let file = disk(&[5 * MIB]);
        sfdisk(&file, "label: gpt\nsize=4M, type=U\nsize=8M, type=L\n");
        change(file.as_file());
        let error = find_root(file.as_file()).unwrap_err();
        assert!(matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof), "{error}");
    };
    let put = |at: u64, bytes: &'static [u8]| move |file: &File| file.write_all_at(bytes, at).unwrap();
    refused(&put(512 + 84, &[0; 4])); // Entries of no size.
    refused(&put(512 + 84, &[0xff; 4])); // Entries of 4 GiB.
    refused(&put(512 + 72, &[0xff; 8])); // The table is beyond every disk.
    refused(&put(1024 + 128 + 32, &[0xff; 8])); // A partition begins after its end.
    refused(&put(1024 + 128 + 40, &[0xff; 7])); // It ends beyond the disk.
    refused(&put(1024 + 128 + 32, &[0; 8])); // It begins with the table.
    refused(&|file| file.set_len(10 << 20).unwrap());
}
