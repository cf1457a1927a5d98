//! Puts a microVM's files into its jail and says how the VMM is to enter it.
//!
//! A file gets into the jail as a hard link: nothing to unmount, and no copy. Where that cannot be (another
//! file system, a block device) it is bound, in a mount namespace that only the VMM's process ever has, so
//! that no mount outlives it. The VMM makes the rest of the jail itself; see its `--jail`.

use std::ffi::{CString, OsString};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use pulau_vmm::config::{MachineConfig, VmConfig};

use super::cgroup::{self, CgroupError};
use super::home::Home;
use super::spec::{Host, Spec, SpecError};

/// How a microVM is jailed. Its user is chosen when it starts.
#[derive(Clone, Debug, Default)]
pub struct JailSpec {
    /// The VMM's network namespace.
    pub network: Network,
    /// Whether it gets a control group with limits fitting its size.
    pub cgroup: bool,
}

/// Network namespace of a VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// A new and empty one. Its taps are attached in the host's before.
    #[default]
    None,
    /// The host's, with its taps.
    Host,
    /// An existing one, such as `/run/netns/name`, with its taps.
    Namespace(PathBuf),
}

/// A jail cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot prepare the jail: {path}: {source}", path = path.display())]
    Prepare { path: PathBuf, source: io::Error },
    #[error("a jail needs root: run as root, or without one (--no-jail) for development")]
    NotRoot,
}

/// Memory a VMM may use beyond its guest's: its own, page tables for the guest, and cached disk blocks.
fn overhead_mib(machine: &MachineConfig) -> u64 {
    64 + machine.mem_size_mib / 32
}

/// A microVM's files, put where its VMM can reach them.
pub struct Jail<'a> {
    home: &'a Home,
    binds: Vec<Bind>,
    names: Names,
}

/// What the files in a jail are called outside: each path as the VMM sees it, and as it was given.
#[derive(Default)]
pub struct Names(Vec<(PathBuf, PathBuf)>);

impl Names {
    /// A message of the VMM's, with its paths as whoever started it knows them.
    pub fn outside(&self, message: &str) -> String {
        let belongs = |c: char| c.is_ascii_alphanumeric() || "_-/".contains(c);
        let found = |at: usize| {
            self.0.iter().find_map(|(inside, outside)| {
                let rest = message[at..].strip_prefix(inside.to_str()?)?;
                let whole = !message[..at].ends_with(belongs) && !rest.starts_with(belongs);
                whole.then_some((outside, message.len() - rest.len()))
            })
        };
        let (mut text, mut done) = (String::new(), 0);
        for (at, _) in message.match_indices('/') {
            if let Some((outside, end)) = (at >= done).then(|| found(at)).flatten() {
                text += &message[done..at];
                text += &outside.to_string_lossy();
                done = end;
            }
        }
        text + &message[done..]
    }
}

struct Bind {
    source: CString,
    target: CString,
    read_only: bool,
}

impl<'a> Jail<'a> {
    pub fn new(home: &'a Home) -> Self {
        Jail { home, binds: Vec::new(), names: Names::default() }
    }

    /// The configuration as the VMM must read it: every file put in place, and its path the VMM's view.
    ///
    /// # Errors
    ///
    /// A file is missing, of the wrong kind, or may not be read by the jail's user.
    pub fn place(&mut self, config: &VmConfig) -> Result<VmConfig, JailError> {
        let mut config = config.clone();
        if let Some(boot) = &mut config.boot_source {
            boot.kernel_image_path = self.put("kernel", &boot.kernel_image_path, "kernel", false)?;
            if let Some(initrd) = &mut boot.initrd_path {
                *initrd = self.put("initrd", initrd, "initrd", false)?;
            }
        }
        for drive in &mut config.drives {
            if let Some(path) = &mut drive.path_on_host {
                let writable = !drive.is_read_only.unwrap_or(false);
                *path = self.put("drive", path, &format!("drive-{}", drive.drive_id), writable)?;
            }
        }
        for pmem in &mut config.pmem {
            let name = format!("pmem-{}", pmem.id);
            pmem.path_on_host = self.put("pmem", &pmem.path_on_host, &name, !pmem.read_only)?;
        }
        if let Some(vsock) = &mut config.vsock {
            vsock.uds_path = self.socket("vsock.sock");
        }
        Ok(config)
    }

    /// A socket the VMM makes, as it sees it.
    pub fn socket(&self, name: &str) -> PathBuf {
        match self.home.jail_user() {
            Some(_) => Path::new("/run").join(name),
            None => self.home.socket(name),
        }
    }

    /// Puts one file into the jail under `name`. Returns its path for the VMM.
    fn put(
        &mut self,
        what: &'static str,
        path: &Path,
        name: &str,
        writable: bool,
    ) -> Result<PathBuf, JailError> {
        let problem = |problem: String| SpecError::File { what, path: path.to_owned(), problem };
        let source = path.canonicalize().map_err(|e| problem(e.to_string()))?;
        let meta = source.metadata().map_err(|e| problem(e.to_string()))?;
        let block_device = meta.file_type().is_block_device();
        if !(meta.is_file() || block_device && what == "drive") {
            return Err(problem("not a regular file".into()).into());
        }
        let Some(user) = self.home.jail_user() else { return Ok(source) };
        if !may(&meta, user, if writable { 0o6 } else { 0o4 }) {
            if !writable {
                let hint = format!("not readable by the jail's user: `chmod a+r {}`", source.display());
                return Err(problem(hint).into());
            }
            self.home.borrow(&source).map_err(|e| problem(format!("cannot be given to the jail: {e}")))?;
        }
        let target = self.home.root().join(name);
        let failed = |source| JailError::Prepare { path: target.clone(), source };
        if block_device || fs::hard_link(&source, &target).is_err() {
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&target).map_err(failed)?;
            self.binds.push(Bind {
                source: c_path(&source).map_err(failed)?,
                target: c_path(&target).map_err(failed)?,
                read_only: !writable,
            });
        }
        let inside = Path::new("/").join(name);
        self.names.0.push((inside.clone(), path.to_owned()));
        Ok(inside)
    }

    /// What the files placed so far are called outside.
    pub fn names(&mut self) -> Names {
        std::mem::take(&mut self.names)
    }

    /// Has the VMM enter the jail, if there is to be one.
    ///
    /// # Errors
    ///
    /// The control group's parent cannot be made.
    pub fn enter(self, host: &Host, spec: &Spec, command: &mut Command) -> Result<(), JailError> {
        let (Some(jail), Some(user)) = (&spec.jail, self.home.jail_user()) else { return Ok(()) };
        if !nix::unistd::geteuid().is_root() {
            return Err(JailError::NotRoot);
        }
        command.arg("--jail").arg(self.home.root());
        command.args(["--uid", &user.to_string(), "--gid", &user.to_string()]);
        match &jail.network {
            Network::None => {
                command.arg("--new-net-ns");
                for interface in &spec.vm.network_interfaces {
                    command.arg("--tap").arg(&interface.host_dev_name);
                }
            }
            Network::Host => {}
            Network::Namespace(path) => _ = command.arg("--netns").arg(path),
        }
        if jail.cgroup {
            cgroup::prepare_parent(&host.cgroup_parent)?;
            let path = host.cgroup_parent.join(&spec.id);
            self.home
                .record_cgroup(&path)
                .map_err(|source| JailError::Prepare { path: self.home.dir().to_owned(), source })?;
            command.arg("--cgroup").arg(path);
            for limit in limits(&spec.vm.machine) {
                command.arg("--cgroup-limit").arg(limit);
            }
        }
        bind_in_namespace(command, self.binds);
        Ok(())
    }
}

/// Limits that a microVM of this size never reaches unless something is wrong with it.
fn limits(machine: &MachineConfig) -> [OsString; 2] {
    let memory = machine.mem_size_mib.saturating_add(overhead_mib(machine));
    let threads = 32 + u32::from(machine.vcpu_count);
    [format!("memory.max={memory}M").into(), format!("pids.max={threads}").into()]
}

/// Whether `user` (with the group of the same number) has all of the permission bits `wanted` (4 to read, 2
/// to write) on a file.
fn may(meta: &fs::Metadata, user: u32, wanted: u32) -> bool {
    let shift = match (meta.uid() == user, meta.gid() == user) {
        (true, _) => 6,
        (_, true) => 3,
        _ => 0,
    };
    meta.mode() >> shift & wanted == wanted
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Has `command` make `binds` in a mount namespace of its own before it becomes the VMM.
fn bind_in_namespace(command: &mut Command, binds: Vec<Bind>) {
    if binds.is_empty() {
        return;
    }
    let make = move || {
        const NONE: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        for bind in &binds {
            let target = bind.target.as_c_str();
            mount(Some(bind.source.as_c_str()), target, NONE, MsFlags::MS_BIND, NONE)?;
            if bind.read_only {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                mount(NONE, target, NONE, flags, NONE)?;
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made; paths are C strings already, and short
    // literals are copied to the stack, so nothing is allocated.
    unsafe { command.pre_exec(make) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use pulau_vmm::config::{BootSourceConfig, DriveConfig};

    use super::*;

    fn config(kernel: &Path, drive: &Path, read_only: bool) -> VmConfig {
        let mut config = VmConfig::default();
        config
            .set_boot_source(BootSourceConfig { kernel_image_path: kernel.to_owned(), ..Default::default() })
            .unwrap();
        config
            .set_drive(DriveConfig {
                drive_id: "data".into(),
                path_on_host: Some(drive.to_owned()),
                is_read_only: Some(read_only),
                ..Default::default()
            })
            .unwrap();
        config
    }

    #[test]
    fn without_a_jail_paths_stay_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, drive) = (dir.path().join("k"), dir.path().join("d"));
        fs::write(&kernel, "k").unwrap();
        fs::write(&drive, "d").unwrap();
        let home = Home::create(&dir.path().join("run"), "a", false).unwrap();
        let placed = Jail::new(&home).place(&config(&kernel, &drive, false)).unwrap();
        assert_eq!(placed.boot_source.unwrap().kernel_image_path, kernel);
        assert_eq!(placed.drives[0].path_on_host.as_deref(), Some(drive.as_path()));
    }

    #[test]
    fn a_file_that_is_missing_or_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("k");
        fs::write(&kernel, "k").unwrap();
        let home = Home::create(&dir.path().join("run"), "a", false).unwrap();
        let place = |kernel: &Path, drive: &Path| {
            Jail::new(&home).place(&config(kernel, drive, true)).unwrap_err().to_string()
        };
        let missing = place(&kernel, &dir.path().join("gone"));
        assert!(missing.starts_with("drive ") && missing.contains("gone: No such file"), "{missing}");
        assert!(place(dir.path(), &kernel).ends_with("not a regular file"));
        assert!(place(Path::new("/dev/null"), &kernel).ends_with("not a regular file"));
    }

    #[test]
    fn in_a_jail_files_are_links_and_only_what_must_be_changes_hands() {
        if !nix::unistd::geteuid().is_root() {
            return; // Giving files away takes root; the checks in the test host run as root.
        }
        let dir = tempfile::tempdir().unwrap();
        let (kernel, drive) = (dir.path().join("k"), dir.path().join("d"));
        for file in [&kernel, &drive] {
            fs::write(file, "x").unwrap();
            fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
        }
        let home = Home::create(&dir.path().join("run"), "a", true).unwrap();
        let mut jail = Jail::new(&home);
        let placed = jail.place(&config(&kernel, &drive, false)).unwrap();
        assert_eq!(placed.boot_source.unwrap().kernel_image_path, Path::new("/kernel"));
        assert_eq!(placed.drives[0].path_on_host.as_deref(), Some(Path::new("/drive-data")));
        let names = std::mem::take(&mut jail.names);
        let said = "drives: drive data: /drive-data is no disk, /drive-data2 and /x/drive-data and /kernel are others";
        let outside = said.replacen("/drive-data", drive.to_str().unwrap(), 1);
        let outside = outside.replace(" /kernel", &format!(" {}", kernel.display()));
        assert_eq!(names.outside(said), outside);
        let inside = |name: &str| fs::metadata(home.root().join(name)).unwrap();
        assert_eq!(inside("kernel").ino(), fs::metadata(&kernel).unwrap().ino());
        assert_eq!(inside("kernel").uid(), 0, "what is only read keeps its owner");
        assert_eq!(Some(inside("drive-data").uid()), home.jail_user());
        home.remove().unwrap();
        assert_eq!(fs::metadata(&drive).unwrap().uid(), 0, "and is given back");

        fs::set_permissions(&kernel, fs::Permissions::from_mode(0o600)).unwrap();
        let home = Home::create(&dir.path().join("run"), "b", true).unwrap();
        let error = Jail::new(&home).place(&config(&kernel, &drive, false)).unwrap_err();
        assert!(error.to_string().contains("chmod a+r"), "{error}");
    }
}
