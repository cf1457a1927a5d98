use std::io::Write;

use vm_memory::Bytes;

use super::*;
use crate::memory::{self, MIB};

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn guest_memory() -> Memory {
    memory::create(8, false).unwrap()
}

/// An ELF file with these program headers (kind, offset, address, file size, memory size) and `body` after
/// the first page.
fn elf(entry: u64, headers: &[(u32, u64, u64, u64, u64)], body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    bytes[16] = 2;
    bytes[18] = 62;
    bytes[24..32].copy_from_slice(&entry.to_le_bytes());
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = headers.len() as u8;
    for (i, (kind, offset, address, file_size, memory_size)) in headers.iter().enumerate() {
        let at = 64 + i * 56;
        bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, file_size), (40, memory_size)] {
            bytes[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes.extend_from_slice(body);
    bytes
}

fn body(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

fn contents(memory: &Memory, address: u64, len: usize) -> Vec<u8> {
    let mut got = vec![0; len];
    memory.read_slice(&mut got, GuestAddress(address)).unwrap();
    got
}

#[test]
fn segments_arrive_whole_wherever_they_lie() {
    // At the border of a page, not at one, and not as they lie in the file.
    for address in [MIB, MIB + 0x10, 2 * MIB + 0x123] {
        let offset = 4096 + 0x10;
        let data = body(3 * 4096 + 77);
        let image = elf(address, &[(1, offset, address, 3 * 4096 + 50, 5 * 4096)], &data);
        let memory = guest_memory();
        let loaded = load_kernel(&file(&image), &memory).unwrap();
        assert_eq!(loaded.entry, Entry::Linux64 { address, header: None });
        assert_eq!(loaded.end, address + 5 * 4096);
        assert_eq!(contents(&memory, address, 3 * 4096 + 50), data[0x10..0x10 + 3 * 4096 + 50]);
        assert_eq!(contents(&memory, address + 3 * 4096 + 50, 100), [0; 100]);
    }
}

#[test]
fn guest_writes_stay_out_of_the_kernel_file() {
    let data = body(2 * 4096);
    let image = elf(MIB, &[(1, 4096, MIB, 8192, 8192)], &data);
    let kernel = file(&image);
    let memory = guest_memory();
    load_kernel(&kernel, &memory).unwrap();
    memory.write_slice(&[0xee; 8192], GuestAddress(MIB)).unwrap();
    let mut after = vec![0; 8192];
    kernel.read_exact_at(&mut after, 4096).unwrap();
    assert_eq!(after, data);
}

#[test]
fn notes_decide_the_entry() {
    let entry = |notes: &[(&[u8], u32, &[u8])]| {
        let mut note = Vec::new();
        for (name, kind, desc) in notes {
            note.extend_from_slice(&(name.len() as u32).to_le_bytes());
            note.extend_from_slice(&(desc.len() as u32).to_le_bytes());
            note.extend_from_slice(&kind.to_le_bytes());
            for field in [name, desc] {
                note.extend_from_slice(field);
                note.resize(note.len().next_multiple_of(4), 0);
            }
        }
        let mut data = body(4096);
        data[..note.len()].copy_from_slice(&note);
        let len = note.len() as u64;
        let image = elf(MIB, &[(1, 4096, 2 * MIB, 4096, 4096), (4, 4096, 2 * MIB, len, len)], &data);
        load_kernel(&file(&image), &guest_memory()).unwrap().entry
    };
    let gnu = (&b"GNU\0"[..], 3, &[1; 20][..]);
    let pvh = (&b"Xen\0"[..], 18, &[0, 0, 0x20, 0, 0, 0, 0, 0][..]);
    let linux = (&b"Linux\0"[..], 0x101, &[0][..]);
    let ours = Entry::Linux64 { address: MIB, header: None };
    assert_eq!(entry(&[gnu, pvh]), Entry::Pvh { address: 2 * MIB });
    assert_eq!(entry(&[gnu]), ours);
    assert_eq!(entry(&[gnu, linux, pvh]), ours, "Linux has both entries");
    assert_eq!(entry(&[pvh, linux]), ours, "in any order");
}

#[test]
fn bad_elf_files_are_refused_for_what_is_wrong_with_them() {
    let refused = |image: &[u8]| load_kernel(&file(image), &guest_memory()).unwrap_err().to_string();
    let data = body(8192);
    let good = (1, 4096, MIB, 8192, 8192);
    assert!(load_kernel(&file(&elf(MIB, &[good], &data)), &guest_memory()).is_ok());
    for (image, expect) in [
        (elf(MIB, &[(1, 4096, 0x1000, 10, 10)], &data), "below 1 MiB"),
        (elf(MIB, &[(1, 4096, 8 * MIB - 4096, 8192, 8192)], &data), "mem_size_mib"),
        (elf(MIB, &[(1, 4096, u64::MAX - 10, 8192, 8192)], &data), "mem_size_mib"),
        (elf(MIB, &[(1, 4096, MIB, 8193, 8193)], &data), "truncated"),
        (elf(MIB, &[(1, u64::MAX - 1, MIB, 8192, 8192)], &data), "truncated"),
        (elf(MIB, &[(1, 4096, MIB, 8192, 4096)], &data), "larger in the file"),
        (elf(MIB, &[(1, 4096, MIB, 0, u64::MAX)], &data), "mem_size_mib"),
        (elf(u64::MAX, &[good], &data), "mem_size_mib"),
        (elf(MIB, &[], &data), "program headers"),
        (elf(MIB, &[(6, 0, 0, 0, 0)], &data), "nothing to load"),
        (elf(MIB, &[good, (4, 0, 0, 1 << 40, 0)], &data), "implausibly large"),
        (b"\x7fELF".to_vec(), "truncated"),
        (b"#!/bin/sh\n".to_vec(), "not a kernel"),
        (vec![], "not a kernel"),
        (vec![0; 8192], "not a kernel"),
    ] {
        let message = refused(&image);
        assert!(message.contains(expect), "{message:?} does not say {expect:?}");
        assert!(message.starts_with("kernel_image_path") || message.starts_with("mem_size_mib"), "{message}");
    }
    let mut other_machine = elf(MIB, &[good], &data);
    other_machine[18] = 183;
    assert!(refused(&other_machine).contains("64-bit x86"));
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x1f4..0x1f8].copy_from_slice(&((payload.len() / 16) as u32).to_le_bytes());
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236] = 1;
    image[0x258..0x260].copy_from_slice(&(2 * MIB).to_le_bytes());
    image[0x260..0x264].copy_from_slice(&(3 * MIB as u32).to_le_bytes());
    image.extend_from_slice(payload);
    image
}

#[test]
fn bzimage_is_loaded_high_with_its_header_kept() {
    let payload = body(16 * 600);
    let memory = guest_memory();
    let loaded = load_kernel(&file(&bzimage(&payload)), &memory).unwrap();
    let Entry::Linux64 { address, header: Some(header) } = loaded.entry else { panic!() };
    assert_eq!(address, MIB + 0x200);
    assert_eq!(loaded.end, 5 * MIB);
    assert_eq!(header.initrd_limit(), 0x8000_0000);
    assert_eq!(header.bytes().len(), 0x26c - 0x1f1);
    assert_eq!(contents(&memory, MIB, payload.len()), payload);
}

#[test]
fn bad_bzimages_are_refused() {
    let payload = body(16 * 600);
    for (at, value, expect) in [
        (0x207, 1, "older than 2.12"),
        (0x201, 0x10, "older than 2.12"),
        (0x211, 0, "zImage"),
        (0x236, 0, "64-bit entry"),
        (0x1f1, 200, "truncated"),
        (0x1f6, 1, "truncated"),
        (0x25f, 0xff, "mem_size_mib"),
        (0x263, 0xff, "mem_size_mib"),
    ] {
        let mut image = bzimage(&payload);
        image[at] = value;
        let message = load_kernel(&file(&image), &guest_memory()).unwrap_err().to_string();
        assert!(message.contains(expect), "{at:#x}: {message:?} does not say {expect:?}");
    }
}

#[test]
fn initrd_goes_as_high_as_it_may_and_is_refused_where_it_does_not_fit() {
    let memory = guest_memory();
    let data = body(2 * MIB as usize + 5);
    let initrd = file(&data);
    let (start, size) = load_initrd(&initrd, &memory, MIB, u64::MAX).unwrap();
    assert_eq!((start % 4096, size), (0, data.len() as u64));
    assert!(start + size <= 8 * MIB && start + size > 8 * MIB - 4096);
    assert_eq!(contents(&memory, start, data.len()), data);
    let (start, _) = load_initrd(&initrd, &memory, MIB, 4 * MIB).unwrap();
    assert!(start + size <= 4 * MIB);
    assert!(matches!(load_initrd(&initrd, &memory, 7 * MIB, u64::MAX), Err(LoadError::InitrdMemory { .. })));
    assert!(matches!(load_initrd(&initrd, &memory, 0, MIB), Err(LoadError::InitrdMemory { .. })));
    assert!(matches!(load_initrd(&file(b""), &memory, 0, MIB), Err(LoadError::EmptyInitrd)));
}
