//! One microVM: its VMM process, its jail and everything else it leaves on the host, from preparation to
//! the last file removed. Instances, functions and tasks all stand on this layer; it knows none of them.
//!
//! A [`MicroVm`] is a handle. Behind it one driver task owns the machine, takes requests one after the
//! other, and publishes every change of [`State`]:
//!
//! ```text
//!              ┌────────────────────────────┐ any step fails, Stop
//!   create ─▶ Starting ──────▶ Running ⇄ Paused
//!              │                 │         │   Stop, the guest ends, the VMM dies
//!              ▼                 ▼         ▼
//!             Stopping ◀─────────┴─────────┘
//!              │  everything removed
//!              ▼
//!             Stopped (why)
//! ```
//!
//! - **Starting**: the home directory is made and locked, files are put into the jail, the VMM is spawned,
//!   answers, is configured and told to boot. Each step has a bound in time. If one fails, what was done is
//!   undone, and the state goes to Stopped with the reason. Only `Stop` is accepted; it abandons the start.
//! - **Running**, **Paused**: `Pause` and `Resume` go to the VMM; one that changes nothing succeeds; one
//!   the VMM refuses leaves the state as it was. `Stop` is orderly (the guest is asked, with a bound) or
//!   forced. When the VMM process ends, for whatever reason, the driver goes on to Stopping by itself.
//! - **Stopping**: whatever is left of the VMM is killed; its cgroup, sockets and directory are removed and
//!   borrowed files given back. Nothing is accepted but a forced `Stop`, which ends an orderly one.
//! - **Stopped**: final. The handle still tells the [`Ending`]: why, and the last lines of console and log.
//!
//! When the last handle is dropped the driver stops the machine by force. When the whole process dies
//! instead, the VMM runs on: its home directory's lock is free then, and [`sweep`] removes all of it.
//!
//! What the guest and the VMM can touch is hostile: the driver follows no symbolic link in the jail,
//! bounds what it reads from there, and waits for nothing without a limit.

mod api;
mod boot_times;
mod cgroup;
mod driver;
mod ending;
mod guest;
mod home;
mod jail;
mod process;
mod socket;
mod spec;
mod start;
mod tail;

pub use api::{Api, ApiError};
pub use boot_times::BootTimes;
pub use driver::{MicroVm, RequestError, State, Stop};
pub use ending::{Ending, Reason, StartError};
pub use guest::{Agent, GuestError};
pub use home::{HomeError, sweep};
pub use jail::{JailError, JailSpec, Network};
pub use spec::{Host, Spec, SpecError};
