//! Copying a file in or out. A file copied in is written beside its place and renamed when whole, so that
//! nobody in the guest ever sees half of it, and what was there stays if anything goes wrong.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Gid, Uid, fchown};
use pulau_agent_protocol::frame::{self, Decoder, HEADER_LEN, Kind, MAX_DATA};
use pulau_agent_protocol::message::{CopyIn, CopyOut, ErrorCode, ErrorReply, FileInfo, Reply};

use crate::connection::{Ended, refuse, send};
use crate::listen::Socket;
use crate::refusal::{Context, bad_request};
use crate::users;

/// How long a host that has been told of an error may be silent before its connection is closed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Answers a request to copy a file in.
///
/// # Errors
/// The connection failed, or the request cannot be met.
pub fn copy_in(socket: &Socket, mut decoder: Decoder, request: &CopyIn) -> Result<(), Ended> {
    let place = Place::prepare(request)?;
    send(socket, Kind::Reply, &Reply::Ready)?;
    match receive(socket, &mut decoder, request, place) {
        Ok(()) => Ok(send(socket, Kind::Reply, &Reply::Done)?),
        Err(Ended::Refused(error)) => {
            refuse(socket, &error);
            drain(socket, &mut decoder);
            Ok(())
        }
        Err(gone) => Err(gone),
    }
}

fn receive(
    mut socket: &Socket,
    decoder: &mut Decoder,
    request: &CopyIn,
    mut place: Place,
) -> Result<(), Ended> {
    let path = request.path.as_str();
    let mut left = request.size;
    loop {
        match decoder.read(&mut socket)? {
            Some((Kind::FileData, bytes)) => {
                left = left.checked_sub(bytes.len() as u64).ok_or_else(|| {
                    wrong_size(format!("{path}: more than the announced {} bytes", request.size))
                })?;
                place.file.write_all(bytes).context(format_args!("write {path}"))?;
            }
            Some((Kind::FileEnd, _)) if left == 0 => return Ok(place.commit(request)?),
            Some((Kind::FileEnd, _)) => {
                return Err(wrong_size(format!(
                    "{path}: ended {left} bytes before the announced {}",
                    request.size
                ))
                .into());
            }
            Some((kind, _)) => return Err(bad_request(format!("{kind:?} in the middle of a file")).into()),
            None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        }
    }
}

fn wrong_size(message: String) -> ErrorReply {
    ErrorReply::new(ErrorCode::Truncated, message)
}

/// Takes in what the host had under way when it was told of an error: closing with bytes unread would
/// throw away the error as well.
fn drain(mut socket: &Socket, decoder: &mut Decoder) {
    let _ = socket.set_read_timeout(Some(DRAIN_TIMEOUT));
    while let Ok(Some((Kind::FileData, _))) = decoder.read(&mut socket) {}
}

/// A file being written beside its place; removed if dropped before it is committed.
#[derive(Debug)]
struct Place {
    file: File,
    beside: PathBuf,
    parent: PathBuf,
    owner: (Uid, Gid),
    committed: bool,
}

impl Place {
    fn prepare(request: &CopyIn) -> Result<Self, ErrorReply> {
        let path = absolute(&request.path)?;
        let (Some(parent), false) = (path.parent(), request.path.ends_with('/')) else {
            return Err(bad_request(format!("{:?} does not name a file", request.path)));
        };
        if request.mode > 0o7777 {
            return Err(bad_request(format!("mode {:o} has more than permission bits", request.mode)));
        }
        let size = i64::try_from(request.size)
            .map_err(|_| bad_request(format!("{} bytes are more than a file can hold", request.size)))?;
        let owner = users::resolve(request.owner.as_deref().unwrap_or("0:0"))?;
        if fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
            return Err(Errno::EISDIR).context(path.display());
        }
        if request.parents {
            DirBuilder::new().recursive(true).mode(0o755).create(parent).context(parent.display())?;
        }
        // Every name is used once per process, and `create_new` tells if an earlier process left one.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let beside = parent.join(format!(".pulau-copy-{}-{number}", std::process::id()));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)
            .context(format_args!("create a file in {}", parent.display()))?;
        let place = Self {
            file,
            beside,
            parent: parent.to_owned(),
            owner: (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid)),
            committed: false,
        };
        if size > 0 {
            match fallocate(place.file.as_fd(), FallocateFlags::empty(), 0, size) {
                Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {}
                Err(e) => return Err(e).context(format_args!("make room for {size} bytes")),
            }
        }
        Ok(place)
    }

    fn commit(mut self, request: &CopyIn) -> Result<(), ErrorReply> {
        let path = Path::new(&request.path);
        let (uid, gid) = self.owner;
        // In this order: a change of owner takes set-user-ID bits away.
        fchown(&self.file, Some(uid), Some(gid)).context(format_args!("{}: set owner", path.display()))?;
        self.file
            .set_permissions(Permissions::from_mode(request.mode))
            .context(format_args!("{}: set mode", path.display()))?;
        if request.sync {
            self.file.sync_all().context(format_args!("{}: sync", path.display()))?;
        }
        fs::rename(&self.beside, path).context(path.display())?;
        self.committed = true;
        if request.sync {
            let directory = File::open(&self.parent).and_then(|dir| dir.sync_all());
            directory.context(format_args!("{}: sync", self.parent.display()))?;
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.beside);
        }
    }
}

fn absolute(path: &str) -> Result<&Path, ErrorReply> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(bad_request(format!("{path:?} is not an absolute path")));
    }
    Ok(Path::new(path))
}

/// Answers a request to copy a file out.
///
/// # Errors
/// The connection failed, or the request cannot be met.
pub fn copy_out(mut socket: &Socket, request: &CopyOut) -> Result<(), Ended> {
    let path = absolute(&request.path)?;
    // Non-blocking: opening a pipe nobody writes to must not hang.
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .context(path.display())?;
    let found = file.metadata().context(path.display())?;
    if !found.is_file() {
        let what = if found.is_dir() { "a directory" } else { "not a regular file" };
        return Err(ErrorReply::new(ErrorCode::WrongType, format!("{}: is {what}", path.display())).into());
    }
    let info = FileInfo {
        size: found.len(),
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        mtime: found.mtime(),
    };
    send(socket, Kind::Reply, &Reply::File(info))?;

    // Header and bytes in one buffer, so that a frame is one write.
    let mut buf = vec![0; HEADER_LEN + MAX_DATA];
    let mut left = info.size;
    while left > 0 {
        let wanted = usize::try_from(left).map_or(MAX_DATA, |left| left.min(MAX_DATA));
        let n = match file.read(&mut buf[HEADER_LEN..HEADER_LEN + wanted]) {
            Ok(0) => {
                let path = path.display();
                return Err(wrong_size(format!("{path}: became {left} bytes shorter meanwhile")).into());
            }
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e).context(format_args!("read {}", path.display())).map_err(Ended::from),
        };
        let header = frame::header(Kind::FileData, n).map_err(|e| bad_request(e.to_string()))?;
        buf[..HEADER_LEN].copy_from_slice(&header);
        socket.write_all(&buf[..HEADER_LEN + n])?;
        left -= n as u64;
    }
    Ok(frame::write(&mut socket, Kind::FileEnd, &[])?)
}
