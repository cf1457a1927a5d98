//! Where the programs that `pulau` starts are found.

use std::env;
use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A program is nowhere it was looked for.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum FindError {
    #[error("{variable} names {path}, which is not an executable file")]
    Named { variable: &'static str, path: String },
    #[error("{name} is neither beside this program nor in PATH")]
    Nowhere { name: &'static str },
}

/// The VMM: what `PULAU_VMM` names, else `pulau-vmm` beside this program, else in `PATH`.
///
/// # Errors
///
/// [`FindError`], which says where it was looked for.
pub fn vmm() -> Result<PathBuf, FindError> {
    look("pulau-vmm", "PULAU_VMM")
}

/// The guest's agent: what `PULAU_AGENT` names, else `pulau-agent` beside this program, else in `PATH`.
///
/// # Errors
///
/// [`FindError`], which says where it was looked for.
pub fn agent() -> Result<PathBuf, FindError> {
    look("pulau-agent", "PULAU_AGENT")
}

fn look(name: &'static str, variable: &'static str) -> Result<PathBuf, FindError> {
    let own = env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent);
    find(name, (variable, env::var_os(variable).as_deref()), beside, env::var_os("PATH").as_deref())
}

fn find(
    name: &'static str,
    (variable, named): (&'static str, Option<&OsStr>),
    beside: Option<&Path>,
    path: Option<&OsStr>,
) -> Result<PathBuf, FindError> {
    if let Some(named) = named {
        let file = PathBuf::from(named);
        return match executable(&file) {
            true => Ok(file),
            false => Err(FindError::Named { variable, path: file.display().to_string() }),
        };
    }
    let beside = beside.map(Path::to_owned);
    let in_path = path.map(|path| env::split_paths(path).collect::<Vec<_>>()).unwrap_or_default();
    let candidates = beside.into_iter().chain(in_path).map(|dir| dir.join(name));
    candidates.into_iter().find(|file| executable(file)).ok_or(FindError::Nowhere { name })
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &Path, mode: u32) -> PathBuf {
        let file = dir.join("pulau-vmm");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn the_variable_wins_and_must_be_right() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (wanted, _other) = (program(a.path(), 0o755), program(b.path(), 0o755));
        let found = find("pulau-vmm", ("V", Some(wanted.as_os_str())), Some(b.path()), None);
        assert_eq!(found, Ok(wanted.clone()));
        program(a.path(), 0o644);
        let found = find("pulau-vmm", ("V", Some(wanted.as_os_str())), Some(b.path()), None);
        assert!(matches!(found, Err(FindError::Named { .. })));
    }

    #[test]
    fn beside_comes_before_path() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (beside, in_path) = (program(a.path(), 0o755), program(b.path(), 0o755));
        let path = Some(b.path().as_os_str());
        assert_eq!(find("pulau-vmm", ("V", None), Some(a.path()), path), Ok(beside.clone()));
        std::fs::remove_file(beside).unwrap();
        assert_eq!(find("pulau-vmm", ("V", None), Some(a.path()), path), Ok(in_path));
        assert!(find("pulau-vmm", ("V", None), Some(a.path()), None).is_err());
    }
}
