//! What a jail is made of, as the command line says it.

use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A jail. See [`super::enter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JailConfig {
    /// Directory that becomes the root, prepared by the caller: it holds the kernel, the drives and the
    /// directories for sockets, as hard links or bind mounts, owned so that `uid` may use them.
    pub root: PathBuf,
    /// User the VMM runs as; never 0.
    pub uid: u32,
    /// Its only group; never 0.
    pub gid: u32,
    /// Control group to run in.
    pub cgroup: Option<Cgroup>,
    /// Network namespace to run in.
    pub network: Network,
    /// Taps of the caller's network namespace, attached before the process leaves it. Where any are named,
    /// they are the only ones it can have, wherever it runs.
    pub taps: Vec<String>,
    /// Limits by `setrlimit`. Core dumps are always off.
    pub resource_limits: Vec<ResourceLimit>,
    /// Where to write the jailed process's pid, as the caller sees it. Not written where the process the
    /// caller started is the jailed one, see the module's text.
    pub pid_file: Option<PathBuf>,
    /// Where to write the exit code at the end, see [`crate::exit::record_in`].
    pub exit_file: Option<PathBuf>,
}

/// Network namespace of the VMM. Its taps must be in it, but for those of [`JailConfig::taps`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// The caller's.
    #[default]
    Host,
    /// A new one without any interface that is up.
    New,
    /// An existing one, by a path such as `/run/netns/name`.
    Namespace(PathBuf),
}

/// A cgroup v2 directory, made with its limits if it does not exist, and removed again only if entering
/// the jail fails after that. Its parent must exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Such as `/sys/fs/cgroup/pulau/vm1`.
    pub path: PathBuf,
    /// Written before the VMM joins.
    pub limits: Vec<CgroupLimit>,
}

/// `file=value`, such as `memory.max=256M` or `cpu.max=50000 100000`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CgroupLimit {
    /// File of the cgroup, such as `memory.max`.
    pub file: String,
    /// What is written to it.
    pub value: String,
}

/// A resource that `setrlimit` limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// `fsize`: size in bytes up to which a file may grow.
    FileSize,
    /// `no-file`: one more than the highest descriptor number.
    OpenFiles,
}

/// `fsize=BYTES` or `no-file=COUNT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceLimit {
    /// What is limited.
    pub resource: Resource,
    /// Hard and soft limit.
    pub value: u64,
}

/// A part of a [`JailConfig`] that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("the jail's {0} must be neither 0 nor {max}: a privileged jail is none", max = u32::MAX)]
    Id(&'static str),
    #[error(
        "'{0}' is not a cgroup limit: expected a file of the cgroup, '=' and its value, as memory.max=256M"
    )]
    CgroupLimit(String),
    #[error("'{0}' is not a resource limit: expected fsize=BYTES or no-file=COUNT")]
    ResourceLimit(String),
    #[error("{} is not an absolute path", .0.display())]
    NotAbsolute(PathBuf),
}

impl JailConfig {
    /// A jail in `root` for a user, with nothing optional.
    pub fn new(root: impl Into<PathBuf>, uid: u32, gid: u32) -> Self {
        Self {
            root: root.into(),
            uid,
            gid,
            cgroup: None,
            network: Network::Host,
            taps: Vec::new(),
            resource_limits: Vec::new(),
            pid_file: None,
            exit_file: None,
        }
    }

    pub(super) fn check(&self) -> Result<(), Invalid> {
        for (id, name) in [(self.uid, "uid"), (self.gid, "gid")] {
            if id == 0 || id == u32::MAX {
                return Err(Invalid::Id(name));
            }
        }
        match &self.cgroup {
            Some(cgroup) => absolute(&cgroup.path),
            None => Ok(()),
        }
    }
}

/// A cgroup's directory is looked up from its parent, which a relative path may not name.
fn absolute(path: &Path) -> Result<(), Invalid> {
    if path.is_absolute() && path.file_name().is_some() {
        Ok(())
    } else {
        Err(Invalid::NotAbsolute(path.to_owned()))
    }
}

impl FromStr for CgroupLimit {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::CgroupLimit(text.to_owned());
        let (file, value) = text.split_once('=').ok_or_else(invalid)?;
        // The name of a controller, a dot, and a name: `cgroup.procs` and paths are not limits.
        let (controller, knob) = file.split_once('.').ok_or_else(invalid)?;
        let plain = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if controller == "cgroup" || !plain(controller) || !plain(knob) || value.is_empty() {
            return Err(invalid());
        }
        Ok(Self { file: file.to_owned(), value: value.to_owned() })
    }
}

impl FromStr for ResourceLimit {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::ResourceLimit(text.to_owned());
        let (name, value) = text.split_once('=').ok_or_else(invalid)?;
        let resource = match name {
            "fsize" => Resource::FileSize,
            "no-file" => Resource::OpenFiles,
            _ => return Err(invalid()),
        };
        Ok(Self { resource, value: value.parse().map_err(|_| invalid())? })
    }
}

impl Resource {
    /// As the command line names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::FileSize => "fsize",
            Self::OpenFiles => "no-file",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_limits_are_knobs_of_controllers() {
        assert_eq!(
            "cpu.max=50000 100000".parse(),
            Ok(CgroupLimit { file: "cpu.max".into(), value: "50000 100000".into() })
        );
        for bad in
            ["memory.max", "memory.max=", "=1", "memory=1", ".max=1", "../x.y=1", "cgroup.procs=1", "a/b.c=1"]
        {
            assert_eq!(bad.parse::<CgroupLimit>(), Err(Invalid::CgroupLimit(bad.into())));
        }
    }

    #[test]
    fn resource_limits_are_numbers() {
        assert_eq!("no-file=64".parse(), Ok(ResourceLimit { resource: Resource::OpenFiles, value: 64 }));
        for bad in ["no-file", "nofile=1", "fsize=-1", "fsize=1M", "fsize="] {
            assert_eq!(bad.parse::<ResourceLimit>(), Err(Invalid::ResourceLimit(bad.into())));
        }
    }

    #[test]
    fn root_is_refused() {
        assert_eq!(JailConfig::new("/jail", 0, 5).check(), Err(Invalid::Id("uid")));
        assert_eq!(JailConfig::new("/jail", 5, 0).check(), Err(Invalid::Id("gid")));
        assert_eq!(JailConfig::new("/jail", 5, u32::MAX).check(), Err(Invalid::Id("gid")));
        assert_eq!(JailConfig::new("/jail", 5, 5).check(), Ok(()));
    }
}
