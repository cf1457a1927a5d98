//! Archives as strangers make them.

use std::io::{self, Read};

use tar::EntryType;

use super::super::testing::{Archive, gzip};
use super::super::{Digest, ImageError};
use super::*;

/// Writes down what it is told.
#[derive(Default)]
struct Recorder(Vec<String>);

impl LayerSink for Recorder {
    fn put(&mut self, path: &LayerPath, meta: Meta, content: Content<'_>) -> Result<(), ImageError> {
        let what = match content {
            Content::Directory => "directory".to_owned(),
            Content::File { size, data } => {
                let mut bytes = Vec::new();
                data.read_to_end(&mut bytes).map_err(|e| unreadable("test", e))?;
                assert_eq!(size, bytes.len() as u64);
                format!("file {}", String::from_utf8_lossy(&bytes[..bytes.len().min(20)]))
            }
            Content::Symlink(target) => format!("link to {}", String::from_utf8_lossy(&target)),
            Content::CharDevice { major, minor } => format!("char {major} {minor}"),
            Content::BlockDevice { major, minor } => format!("block {major} {minor}"),
            Content::Fifo => "fifo".to_owned(),
        };
        let xattrs: Vec<_> = meta
            .xattrs
            .iter()
            .map(|(name, value)| (String::from_utf8_lossy(name), Digest::of(value)))
            .collect();
        let attributes = if xattrs.is_empty() { String::new() } else { format!(" {xattrs:?}") };
        let Meta { mode, uid, gid, mtime, .. } = meta;
        self.0.push(format!("{path} {what} {mode:o} {uid}:{gid} {mtime}{attributes}"));
        Ok(())
    }

    fn link(&mut self, path: &LayerPath, target: &LayerPath) -> Result<(), ImageError> {
        self.0.push(format!("{path} is {target}"));
        Ok(())
    }

    fn whiteout(&mut self, path: &LayerPath) -> Result<(), ImageError> {
        self.0.push(format!("{path} is gone"));
        Ok(())
    }

    fn opaque(&mut self, path: &LayerPath) -> Result<(), ImageError> {
        self.0.push(format!("{path} is new"));
        Ok(())
    }
}

fn record(layer: &[u8]) -> Result<Vec<String>, String> {
    let mut recorder = Recorder::default();
    let layer = decompress(layer).unwrap();
    read(Bounded::new(layer, 64 << 20), "layer", &mut recorder).map_err(|e| e.to_string())?;
    Ok(recorder.0)
}

fn refusal(layer: Archive) -> String {
    record(&layer.finish()).unwrap_err()
}

#[test]
fn tells_every_kind_of_change() {
    let layer = Archive::default()
        .entry(EntryType::XGlobalHeader, "g", "", b"18 comment=whatever\n")
        .directory("./")
        .directory("etc/")
        .file("etc/os-release", b"ID=pulau")
        .symlink("bin", "usr/bin")
        .hard_link("etc/same", "./etc/os-release")
        .device(EntryType::Char, "dev/null", 1, 3)
        .device(EntryType::Block, "dev/vda", 254, 0)
        .entry(EntryType::Fifo, "run/fifo", "", b"")
        .file("var/.wh.cache", b"")
        .file("srv/.wh..wh..opq", b"")
        .file(".wh..wh.plnk/1.2", b"")
        .file(".wh..wh.aufs", b"")
        .finish();
    let at = |text: &str, mode: &str| format!("{text} {mode} 1000:100 1700000000");
    let expected = [
        at("/ directory", "755"),
        at("/etc directory", "755"),
        at("/etc/os-release file ID=pulau", "644"),
        at("/bin link to usr/bin", "644"),
        "/etc/same is /etc/os-release".to_owned(),
        at("/dev/null char 1 3", "644"),
        at("/dev/vda block 254 0", "644"),
        at("/run/fifo fifo", "644"),
        "/var/cache is gone".to_owned(),
        "/srv is new".to_owned(),
        at("/.wh..wh.plnk/1.2 file ", "644"),
    ];
    assert_eq!(record(&layer).unwrap(), expected);
    assert_eq!(record(&gzip(&layer)).unwrap(), expected);
    assert_eq!(record(&zstd::encode_all(&layer[..], 1).unwrap()).unwrap(), expected);
    // Several gzip members one after the other are one layer.
    let (a, b) = layer.split_at(700);
    assert_eq!(record(&[gzip(a), gzip(b)].concat()).unwrap(), expected);
    // Numbers left out are 0.
    let blank = |header: &mut tar::Header| header.as_mut_bytes()[100..136].fill(0);
    let told = record(&Archive::default().with(EntryType::Regular, "x", "", b"", blank).finish()).unwrap();
    assert_eq!(told, ["/x file  0 0:0 1700000000"]);
    // The zeros at the end may be missing.
    assert_eq!(record(&layer[..layer.len() - 1024]).unwrap(), expected);
}

#[test]
fn understands_long_names_and_attributes() {
    let long = "d/".repeat(150) + "name";
    // Its third byte is a newline.
    let capability = b"\x01\x00\n\x02\x00\x00\x00\x00";
    let layer = Archive::default()
        .entry(EntryType::GNULongName, "././@LongLink", "", format!("{long}\0").as_bytes())
        .entry(EntryType::GNULongLink, "././@LongLink", "", format!("{long}\0").as_bytes())
        .symlink("x", "x")
        .pax(&[
            ("path", long.as_bytes()),
            ("uid", b"4000000000"),
            ("mtime", b"1700000000.5"),
            ("SCHILY.xattr.security.capability", capability),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("LIBARCHIVE.xattr.user.x", b"y"),
        ])
        .file("x", b"data")
        .file("y", b"")
        .finish();
    let told = record(&layer).unwrap();
    assert_eq!(told[0], format!("/{long} link to {long} 644 1000:100 1700000000"));
    let digest = Digest::of(capability);
    let expected =
        format!("/{long} file data 644 4000000000:100 1700000000 [(\"security.capability\", {digest})]");
    assert_eq!(told[1], expected);
    assert_eq!(told[2], "/y file  644 1000:100 1700000000");
}

#[test]
fn paths_out_of_the_image_are_refused() {
    let new = Archive::default;
    for bad in ["../etc/passwd", "a/../../etc/passwd", "..", "/../x"] {
        assert!(refusal(new().file(bad, b"x")).contains("`..`"), "{bad}");
        assert!(refusal(new().directory(bad)).contains("`..`"), "{bad}");
        assert!(refusal(new().symlink(bad, "x")).contains("`..`"), "{bad}");
        assert!(refusal(new().hard_link("x", bad)).contains("outside"), "{bad}");
        assert!(refusal(new().pax(&[("path", bad.as_bytes())]).file("x", b"")).contains("`..`"), "{bad}");
        assert!(refusal(new().pax(&[("linkpath", bad.as_bytes())]).hard_link("x", "y")).contains("outside"));
    }
    assert!(refusal(new().file("a/.wh...", b"")).contains("removes nothing"));
    assert!(refusal(new().file("a/.wh.", b"")).contains("removes nothing"));
    assert!(refusal(new().file("../.wh.x", b"")).contains("`..`"));
    assert!(refusal(new().pax(&[("path", b"a\0b")]).file("x", b"")).contains("NUL"));
    assert!(refusal(new().pax(&[("path", &[b'a'; 5000])]).file("x", b"")).contains("too long"));
    // Where symbolic links lead is the guest's business; an absolute path is one in the image.
    assert!(record(&new().symlink("x", "../../../etc/shadow").file("/etc/x", b"").finish()).is_ok());
}

#[test]
fn malformed_archives_are_refused() {
    let new = Archive::default;
    assert!(refusal(new().symlink("x", "")).contains("link to nowhere"));
    assert!(refusal(new().device(EntryType::Char, "x", 1 << 12, 0)).contains("impossible number"));
    assert!(refusal(new().entry(EntryType::GNUSparse, "x", "", b"")).contains("sparse"));
    assert!(refusal(new().pax(&[("GNU.sparse.major", b"1")]).file("x", b"")).contains("sparse"));
    assert!(refusal(new().entry(EntryType::new(b'?'), "x", "", b"")).contains("unknown kind"));
    assert!(refusal(new().entry(EntryType::XHeader, "x", "", b"999 path=x\n")).contains("malformed"));
    assert!(refusal(new().entry(EntryType::XHeader, "x", "", b"0 path=x\n")).contains("malformed"));
    assert!(refusal(new().entry(EntryType::XHeader, "x", "", b"nonsense")).contains("malformed"));
    let negative = |header: &mut tar::Header| header.as_mut_bytes()[108..116].fill(0xff);
    assert!(record(&new().with(EntryType::Regular, "x", "", b"", negative).finish()).is_err());
    assert!(record(&[b'x'; 2048]).unwrap_err().contains("not a tar archive"));
    assert!(record(b"short").unwrap_err().contains("cut off"));
    assert_eq!(record(b"").unwrap(), [""; 0]);
}

#[test]
fn cut_off_and_damaged_layers_are_refused() {
    let data: Vec<u8> = (0..200_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let layer = Archive::default().file("x", &data).finish();
    for cut in [600, 5000, layer.len() - 2000] {
        assert!(record(&layer[..cut]).unwrap_err().contains("cut off"), "{cut}");
    }
    for packed in [gzip(&layer), zstd::encode_all(&layer[..], 1).unwrap()] {
        for cut in [20, packed.len() / 2, packed.len() - 1] {
            assert!(record(&packed[..cut]).is_err(), "{cut}");
        }
        let mut damaged = packed.clone();
        let middle = damaged.len() / 2;
        damaged[middle..middle + 64].fill(0);
        // What zstd alone does not notice, the digest does: see the tests of whole images.
        assert!(record(&damaged).is_err() || packed.starts_with(b"\x28\xb5"));
    }
}

#[test]
fn bombs_end_at_the_limit() {
    // 128 MiB of zeros in some KiB, as a file, as a name, and as attributes.
    let size = 128u64 << 20;
    for kind in [EntryType::Regular, EntryType::GNULongName, EntryType::XHeader] {
        let header = Archive::default().with(kind, "x", "", b"", |header| header.set_size(size)).finish();
        let bomb = header[..512].chain(io::repeat(0).take(size));
        let bomb = zstd::encode_all(bomb, 1).unwrap();
        assert!(bomb.len() < 1 << 16);
        let error = record(&bomb).unwrap_err();
        assert!(error.contains("larger than images may be") || error.contains("too long"), "{error}");
    }
    // A size that no arithmetic survives.
    let sizes = [("size", b"18446744073709551615".as_slice())];
    assert!(record(&Archive::default().pax(&sizes).file("x", b"").finish()).is_err());
    assert!(record(&Archive::default().pax(&sizes).directory("x").finish()).is_err());
}
