//! One microVM: its VMM process, its jail and everything else it leaves on the host, from preparation to
//! the last file removed. Instances, functions and tasks all stand on this layer; it knows none of them.
//!
//! A [`MicroVm`] is a handle. Behind it one driver task owns the machine, takes requests one after the
//! other, and publishes every change of [`State`]:
//!
//! ```text
//!              ┌────────────────────────────┐ any step fails, Stop
//!   create ─▶ Starting ──────▶ Running ⇄ Paused
//!   adopt  ─┘  │                 │         │   Stop, the guest ends, the VMM dies
//!              ▼                 ▼         ▼
//!             Stopping ◀─────────┴─────────┘
//!              │  everything removed
//!              ▼
//!             Stopped (why)            Detached, from all but these two
//! ```
//!
//! - **Starting**: the home directory is made and locked, files are put into the jail, the VMM is spawned,
//!   answers, is configured and told to boot. Each step has a bound in time. If one fails, what was done is
//!   undone, and the state goes to Stopped with the reason. Only `Stop` and `Detach` are accepted; the former
//!   abandons the start.
//!   Or, for one that another process left ([`MicroVm::adopt`]): its home is locked, its VMM found and asked how
//!   it is. If the start had never been finished, or the VMM has ended, the state goes to Stopped with the reason,
//!   which the VMM has written down.
//! - **Running**, **Paused**: requests ([`Action`] and others) go to the VMM one by one. `Pause` and `Resume` that
//!   change nothing succeed; a request the VMM refuses leaves everything as it was. `Stop` is orderly (the guest
//!   is asked, with a bound) or forced. When the VMM process ends, for whatever reason, the driver goes on to
//!   Stopping by itself.
//! - **Stopping**: whatever is left of the VMM is killed; its cgroup, sockets and directory are removed and
//!   borrowed files given back. Nothing is accepted but a forced `Stop`, which ends an orderly one.
//! - **Stopped**: final. The handle still tells the [`Ending`]: why, and the last lines of console and log.
//! - **Detached**: final. The VMM runs on and its home is as it was, free for another to adopt.
//!
//! When the last handle is dropped the driver stops the machine by force. When the whole process dies
//! instead, or the runtime the driver lives in ends, that is a detachment. After a restart, [`homes`] lists what
//! is there, [`MicroVm::adopt`] takes over what is known, and then [`sweep`] removes all that nobody has taken.
//!
//! [`Machines`] is this host or a simulation of one ([`sim`]), with the same handles.
//!
//! What the guest and the VMM can touch is hostile: the driver follows no symbolic link in the jail,
//! bounds what it reads from there, and waits for nothing without a limit.

mod adopt;
mod api;
mod boot_times;
mod cgroup;
mod console;
mod driver;
mod ending;
#[cfg(test)]
mod fake;
mod guest;
mod handle;
mod home;
mod jail;
mod machine;
mod machines;
mod process;
mod request;
pub mod sim;
mod socket;
mod spec;
mod start;
mod tail;
mod usage;

pub use api::{Api, ApiError};
pub use boot_times::BootTimes;
pub use console::ConsoleLog;
pub use ending::{Ending, Reason, StartError};
pub use guest::{Agent, GuestError};
pub use handle::MicroVm;
pub use home::{HomeError, homes, sweep};
pub use jail::{JailError, JailSpec, Network};
pub use machines::Machines;
pub use process::Exit;
pub use request::{Action, RequestError, State, Stop};
pub use spec::{Console, Host, Spec, SpecError, furnish};
pub use usage::{DiskUsage, NetworkUsage, Usage};
