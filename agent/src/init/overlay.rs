//! A writable layer over a read-only root: overlayfs with the image below and memory or a disk above,
//! made the root in the way of switch_root(8).
//!
//! The layer is first mounted on `/run`, which every image has, and the overlay inside it. A disk's layer
//! stays reachable at [`LAYER`] afterwards, so that shutdown can close its file system properly: by then
//! nothing else leads to it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::sys::statvfs::FsFlags;
use nix::unistd::{chdir, chroot};
use pulau_agent_protocol::boot::Overlay;

/// Where a disk's layer is mounted in the running guest; root's alone.
pub const LAYER: &str = "/run/pulau/layer";

const STAGE: &str = "/run";
const NEW_ROOT: &str = "/run/root";

/// How long a disk may take to appear.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(5);

/// Puts the layer over the root.
///
/// # Errors
/// A sentence saying which step failed. The root is then as it was, unless the very last steps failed.
pub fn set_up(overlay: &Overlay) -> Result<(), String> {
    match overlay {
        Overlay::Tmpfs if writable_memory("/") => Ok(()),
        Overlay::Tmpfs => {
            mount(Some("layer"), STAGE, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
                .map_err(|e| format!("mount tmpfs on {STAGE}: {e}"))?;
            switch(false)
        }
        Overlay::Device(device) => {
            wait_for(device)?;
            mount(Some(device.as_str()), STAGE, Some("ext4"), MsFlags::empty(), None::<&str>)
                .map_err(|e| format!("mount {device} as ext4: {e} (the host must have formatted it)"))?;
            switch(true)
        }
    }
}

/// `linux/magic.h`
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Whether the root is an initramfs, to which a layer in memory would add nothing.
fn writable_memory(path: &str) -> bool {
    statfs(path).is_ok_and(|found| {
        let kind = found.filesystem_type();
        (kind == RAMFS_MAGIC || kind == TMPFS_MAGIC) && !found.flags().contains(FsFlags::ST_RDONLY)
    })
}

fn wait_for(device: &str) -> Result<(), String> {
    let deadline = Instant::now() + DEVICE_TIMEOUT;
    while !Path::new(device).exists() {
        if Instant::now() >= deadline {
            return Err(format!("{device} did not appear within {DEVICE_TIMEOUT:?}"));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// With the layer mounted on the stage, makes the overlay and goes there.
fn switch(keep_layer: bool) -> Result<(), String> {
    let made = ["upper", "work", "root"]
        .iter()
        .try_for_each(|name| directory(&format!("{STAGE}/{name}"), 0o755))
        .map_err(|e| format!("prepare the writable layer: {e}"))
        .and_then(|()| {
            let layers = "lowerdir=/,upperdir=/run/upper,workdir=/run/work";
            mount(Some("overlay"), NEW_ROOT, Some("overlay"), MsFlags::empty(), Some(layers))
                .map_err(|e| format!("mount overlay: {e}"))
        });
    if let Err(e) = made {
        let _ = umount2(STAGE, MntFlags::MNT_DETACH);
        return Err(e);
    }
    let go = || -> io::Result<()> {
        for name in ["proc", "dev", "sys"] {
            let target = format!("{NEW_ROOT}/{name}");
            directory(&target, 0o755)?;
            bind(&format!("/{name}"), &target, MsFlags::MS_MOVE)?;
        }
        if keep_layer {
            let run = format!("{NEW_ROOT}/run");
            directory(&run, 0o755)?;
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(Some("run"), run.as_str(), Some("tmpfs"), flags, Some("mode=0755"))?;
            directory(&format!("{NEW_ROOT}/run/pulau"), 0o700)?;
            directory(&format!("{NEW_ROOT}{LAYER}"), 0o700)?;
            bind(STAGE, &format!("{NEW_ROOT}{LAYER}"), MsFlags::MS_BIND)?;
        }
        chdir(NEW_ROOT)?;
        bind(".", "/", MsFlags::MS_MOVE)?;
        chroot(".")?;
        Ok(chdir("/")?)
    };
    go().map_err(|e| format!("switch to the writable root: {e}"))
}

fn bind(from: &str, to: &str, how: MsFlags) -> nix::Result<()> {
    mount(Some(from), to, None::<&str>, how, None::<&str>)
}

fn directory(path: &str, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && fs::metadata(path)?.is_dir() => Ok(()),
        other => other.map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}"))),
    }
}
