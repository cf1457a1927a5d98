//! Landlock: the kernel's own list of what this process may still do to files, beyond what the tree holds.
//!
//! It makes the root directory a wall of its own: even with a descriptor or a mount of something outside,
//! nothing out there opens. It also takes away what the VMM never does inside (executing, making device
//! nodes, links and directories), and, on newer kernels, TCP and abstract Unix sockets, and signals to
//! processes outside.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};

use super::JailError;

/// The newest interface these rules were written for (Linux 6.12): later kernels could forbid more than was
/// thought of here.
const KNOWN: ABI = ABI::V6;

/// How much of the rules the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landlock {
    /// All of them.
    Full,
    /// Those its version knows.
    Partial,
    /// The kernel has no Landlock, or it is turned off.
    None,
}

/// Restricts this process to the jail's tree and to opening `tun`.
pub(super) fn restrict(tun: Option<BorrowedFd<'_>>) -> Result<Landlock, JailError> {
    let failed = |error: &dyn std::error::Error| JailError::Landlock(error.to_string());
    let root = PathFd::new("/").map_err(|e| failed(&e))?;
    let status = apply(&root, tun).map_err(|e| failed(&e))?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Landlock::Full,
        RulesetStatus::PartiallyEnforced => Landlock::Partial,
        RulesetStatus::NotEnforced => Landlock::None,
    })
}

fn apply(root: &PathFd, tun: Option<BorrowedFd<'_>>) -> Result<RestrictionStatus, RulesetError> {
    let inside: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
        ReadFile | WriteFile | ReadDir | RemoveFile | MakeReg | MakeSock | Truncate | IoctlDev
    });
    let device: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .add_rule(PathBeneath::new(root, inside))?;
    if let Some(tun) = tun {
        rules = rules.add_rule(PathBeneath::new(tun, device))?;
    }
    rules.restrict_self()
}
