//! Reads the archive of a layer.
//!
//! Header fields are decoded by the `tar` crate. Entries are walked here, because that crate reads long names and
//! pax records into memory whatever their length, and splits pax records at newlines, which binary extended
//! attributes contain.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::ops::Range;

use tar::{EntryType, Header};

use super::{Content, LayerPath, LayerSink};
use crate::image::ImageError;
use crate::image::tree::Meta;

const BLOCK: usize = 512;
/// Long names and pax records of one entry, in bytes.
const LONGEST_EXTENSION: u64 = 1 << 20;
/// Extended attributes that mean something to a guest. Not those of overlayfs, which would make the guest's
/// own overlay take them for its.
const XATTRS: [&[u8]; 4] = [b"security.", b"user.", b"system.posix_acl_access", b"system.posix_acl_default"];
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other files of AUFS, which are not the image's.
const AUFS: &[u8] = b".wh..wh.";

/// Reads an uncompressed layer to its end and tells `sink` what is in it. `name` is for messages.
///
/// # Errors
///
/// The archive is malformed or cut off, has a path that is refused, or `sink` fails.
pub fn read(layer: impl Read, name: &str, sink: &mut dyn LayerSink) -> Result<(), ImageError> {
    let mut archive = Archive { from: layer, name };
    let mut extra = Extensions::default();
    while let Some(header) = archive.header()? {
        let size = extra
            .size
            .map_or_else(|| field(&header, SIZE, Header::entry_size), Ok)
            .map_err(|e| archive.bad(&e.to_string()))?;
        match header.entry_type() {
            EntryType::GNULongName => extra.path = Some(archive.name(size)?),
            EntryType::GNULongLink => extra.link = Some(archive.name(size)?),
            EntryType::XHeader => {
                let records = archive.extension(size)?;
                extra.read(&records).map_err(|why| archive.bad(why))?;
            }
            // About the archive as a whole, such as a comment.
            EntryType::XGlobalHeader => drop(archive.extension(size)?),
            kind => {
                let entry = Entry { header: &header, extra: std::mem::take(&mut extra), kind, size };
                archive.entry(entry, sink)?;
            }
        }
    }
    // What comes after the end is of no meaning, but part of the layer's digest.
    io::copy(&mut archive.from, &mut io::sink()).map_err(|e| archive.broken(e))?;
    Ok(())
}

/// Where header fields are, in bytes.
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;

/// The number in a field; one left blank is 0, as in all programs that read archives.
fn field(header: &Header, at: Range<usize>, read: impl Fn(&Header) -> io::Result<u64>) -> io::Result<u64> {
    match header.as_bytes()[at].iter().all(|byte| matches!(byte, 0 | b' ')) {
        true => Ok(0),
        false => read(header),
    }
}

struct Archive<'n, R> {
    from: R,
    name: &'n str,
}

struct Entry<'h> {
    header: &'h Header,
    extra: Extensions,
    kind: EntryType,
    /// Bytes that follow the header.
    size: u64,
}

impl<R: Read> Archive<'_, R> {
    /// The next header; None at the end.
    fn header(&mut self) -> Result<Option<Header>, ImageError> {
        let mut header = Header::new_old();
        let mut full = 0;
        while full < BLOCK {
            match self.from.read(&mut header.as_mut_bytes()[full..]).map_err(|e| self.broken(e))? {
                // Some writers leave out the blocks of zeros at the end.
                0 if full == 0 => return Ok(None),
                0 => return Err(self.bad("it is cut off")),
                count => full += count,
            }
        }
        let bytes = header.as_bytes();
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
        let found = sum(&bytes[..148]) + 8 * u32::from(b' ') + sum(&bytes[156..]);
        match header.cksum() {
            Ok(expected) if expected == found => Ok(Some(header)),
            _ => Err(self.bad("a header of it is damaged, or it is not a tar archive")),
        }
    }

    fn entry(&mut self, entry: Entry<'_>, sink: &mut dyn LayerSink) -> Result<(), ImageError> {
        let Entry { header, extra, kind, size } = entry;
        let text = extra.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let shown = String::from_utf8_lossy(&text).escape_default().to_string();
        let layer = self.name;
        let refuse = |why: &str| ImageError::invalid(format!("{shown} in {layer}"), why);
        let path = LayerPath::parse(&text).map_err(|why| refuse(&why))?;
        let number = |value: io::Result<u64>| {
            let value = value.map_err(|e| refuse(&e.to_string()))?;
            u32::try_from(value).map_err(|_| refuse("its mode or owner is an impossible number"))
        };
        let meta = Meta {
            mode: (number(field(header, MODE, |header| header.mode().map(u64::from)))? & 0o7777) as u16,
            uid: number(extra.uid.map_or_else(|| field(header, UID, Header::uid), Ok))?,
            gid: number(extra.gid.map_or_else(|| field(header, GID, Header::gid), Ok))?,
            // A time before 1970 is as good as 1970.
            mtime: header.mtime().unwrap_or(0),
            xattrs: extra.xattrs,
        };
        let target = || extra.link.or_else(|| header.link_name_bytes().map(|name| name.into_owned()));
        let name = path.split().map(|(_, name)| name.to_vec()).unwrap_or_default();
        if let Some(gone) = name.strip_prefix(WHITEOUT) {
            self.skip(size)?;
            return match gone {
                _ if name == OPAQUE => sink.opaque(&path.parent()),
                _ if name.starts_with(AUFS) => Ok(()),
                b"" | b"." | b".." => Err(refuse("it removes nothing that can be")),
                gone => sink.whiteout(&path.with_name(gone)),
            };
        }
        let device = || {
            let number = |found: io::Result<Option<u32>>| found.ok().flatten();
            let both = number(header.device_major()).zip(number(header.device_minor()));
            // What fits the kernel's numbers: 12 and 20 bits.
            both.filter(|(major, minor)| *major < 1 << 12 && *minor < 1 << 20)
                .ok_or_else(|| refuse("it is a device with an impossible number"))
        };
        let content = match kind {
            EntryType::Regular | EntryType::Continuous if text.ends_with(b"/") => Content::Directory,
            EntryType::Regular | EntryType::Continuous => {
                let mut data = Exactly { from: &mut self.from, left: size };
                sink.put(&path, meta, Content::File { size, data: &mut data })?;
                let left = data.left;
                return self.skip_padded(left, size);
            }
            EntryType::Directory => Content::Directory,
            EntryType::Symlink => {
                let target =
                    target().filter(|target| (1..4096).contains(&target.len()) && !target.contains(&0));
                Content::Symlink(target.ok_or_else(|| refuse("it is a link to nowhere"))?)
            }
            EntryType::Link => {
                let target = target().ok_or_else(|| refuse("it is a link to nowhere"))?;
                let target = LayerPath::parse(&target)
                    .map_err(|why| refuse(&format!("it is a hard link to a file outside: {why}")))?;
                sink.link(&path, &target)?;
                return self.skip(size);
            }
            EntryType::Char => device().map(|(major, minor)| Content::CharDevice { major, minor })?,
            EntryType::Block => device().map(|(major, minor)| Content::BlockDevice { major, minor })?,
            EntryType::Fifo => Content::Fifo,
            EntryType::GNUSparse => return Err(refuse("sparse entries are not supported")),
            _ => return Err(refuse("it is of an unknown kind")),
        };
        sink.put(&path, meta, content)?;
        self.skip(size)
    }

    /// Skips an entry's data.
    fn skip(&mut self, size: u64) -> Result<(), ImageError> {
        self.skip_padded(size, size)
    }

    /// Skips the `left` last bytes of an entry's `size`, and what fills up its last block.
    fn skip_padded(&mut self, left: u64, size: u64) -> Result<(), ImageError> {
        let padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        let wanted =
            left.checked_add(padding).ok_or_else(|| self.bad("an entry is larger than any archive"))?;
        let skipped =
            io::copy(&mut (&mut self.from).take(wanted), &mut io::sink()).map_err(|e| self.broken(e))?;
        // Without its last padding an archive is whole enough.
        match skipped >= left {
            true => Ok(()),
            false => Err(self.bad("it is cut off")),
        }
    }

    /// The data of an entry that describes the next one.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        if size > LONGEST_EXTENSION {
            return Err(self.bad("a name or the attributes of an entry are too long"));
        }
        let mut data = Vec::new();
        (&mut self.from).take(size).read_to_end(&mut data).map_err(|e| self.broken(e))?;
        let left = size - data.len() as u64;
        self.skip_padded(left, size)?;
        Ok(data)
    }

    fn name(&mut self, size: u64) -> Result<Vec<u8>, ImageError> {
        let mut name = self.extension(size)?;
        while name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    fn bad(&self, why: &str) -> ImageError {
        ImageError::invalid(self.name, why)
    }

    fn broken(&self, error: io::Error) -> ImageError {
        unreadable(self.name, error)
    }
}

/// An end before all has come is an error.
struct Exactly<'r, R> {
    from: &'r mut R,
    left: u64,
}

impl<R: Read> Read for Exactly<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.from.read(&mut buffer[..most])?;
        if count == 0 && most > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it is cut off"));
        }
        self.left -= count as u64;
        Ok(count)
    }
}

/// The error of a reader of a layer: ours, if it passed through it, or what is wrong with the layer.
pub fn unreadable(name: &str, error: io::Error) -> ImageError {
    use crate::files::FileError;
    match FileError::io("read", std::path::Path::new(name), error) {
        FileError::Io { source, .. } => ImageError::invalid(name, source.to_string()),
        other => other.into(),
    }
}

/// What entries of the kinds `x`, `L` and `K` say about the one after them.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Extensions {
    /// Reads pax records: `LENGTH KEY=VALUE\n`, LENGTH in decimal and of the whole record.
    fn read(&mut self, mut records: &[u8]) -> Result<(), &'static str> {
        const BAD: &str = "the attributes of an entry are malformed";
        while !records.is_empty() {
            let space = records.iter().position(|byte| *byte == b' ').ok_or(BAD)?;
            let length: usize = number(&records[..space]).and_then(|n| n.try_into().ok()).ok_or(BAD)?;
            let record = records.get(space + 1..length).ok_or(BAD)?;
            records = &records[length..];
            let record = record.strip_suffix(b"\n").ok_or(BAD)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(BAD)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(number(value).ok_or(BAD)?),
                b"uid" => self.uid = Some(number(value).ok_or(BAD)?),
                b"gid" => self.gid = Some(number(value).ok_or(BAD)?),
                _ if key.starts_with(b"GNU.sparse.") => return Err("sparse entries are not supported"),
                _ => {
                    let name = key.strip_prefix(b"SCHILY.xattr.").unwrap_or_default();
                    if XATTRS.iter().any(|known| name.starts_with(known)) {
                        self.xattrs.insert(name.to_vec(), value.to_vec());
                    }
                }
            }
        }
        Ok(())
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok())
}
