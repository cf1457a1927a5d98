//! What a host changes about the guest as a whole: its clock, random pool, hostname, and its end.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::sethostname;
use pulau_agent_protocol::message::{
    EntropySeed, ErrorCode, ErrorReply, Resumed, Role, Shutdown, ShutdownAction, WallClock,
};

use crate::agent::Agent;
use crate::refusal::{Context, bad_request};
use crate::{init, net};

/// Sets the wall clock.
///
/// # Errors
/// `bad_request` for a time that is none or that the kernel cannot represent.
pub fn set_time(time: WallClock) -> Result<(), ErrorReply> {
    let (secs, nanos) = match (i64::try_from(time.secs), time.nanos) {
        (Ok(secs), nanos @ 0..=999_999_999) => (secs, i64::from(nanos)),
        _ => return Err(bad_request(format!("{} s and {} ns are no point in time", time.secs, time.nanos))),
    };
    match clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(secs, nanos)) {
        Err(Errno::EINVAL) => Err(bad_request(format!("{secs} s is outside what the kernel's clock holds"))),
        other => other.context("set the wall clock"),
    }
}

/// Sets the hostname.
///
/// # Errors
/// `bad_request` for one that is empty or longer than 64 bytes.
pub fn set_hostname(name: &str) -> Result<(), ErrorReply> {
    if !(1..=64).contains(&name.len()) || name.bytes().any(|b| b == 0 || b == b'\n') {
        return Err(bad_request(format!("hostname {name:?}: must be 1 to 64 bytes in one line")));
    }
    sethostname(name).context(format_args!("set hostname {name:?}"))
}

/// Makes a restored guest the one the host says it is. The seed goes first: whatever draws random bytes
/// after this must not draw what a sibling draws.
///
/// # Errors
/// Those of the step that failed; the ones before it have been applied.
pub fn resumed(agent: &Agent, resumed: &Resumed) -> Result<(), ErrorReply> {
    add_entropy(&resumed.entropy_seed)?;
    set_time(resumed.wall_clock)?;
    if let Some(name) = &resumed.identity.hostname {
        set_hostname(name)?;
    }
    agent.set_id(resumed.identity.id.clone());
    resumed.network.iter().try_for_each(net::configure)
}

/// `struct rand_pool_info` of `include/uapi/linux/random.h`, with room for the largest seed.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    data: [u8; 512],
}

nix::ioctl_write_ptr_bad!(rnd_add_entropy, nix::request_code_write!(b'R', 0x03, 8), RandPoolInfo);
nix::ioctl_none_bad!(rnd_reseed, nix::request_code_none!(b'R', 0x07));

fn add_entropy(seed: &EntropySeed) -> Result<(), ErrorReply> {
    let seed = seed.bytes();
    let mut info = RandPoolInfo { entropy_bits: 0, bytes: 0, data: [0; 512] };
    let room = info.data.get_mut(..seed.len()).ok_or_else(|| bad_request("entropy seed over 512 bytes"))?;
    room.copy_from_slice(seed);
    // At most 512: both fit.
    info.bytes = seed.len() as libc::c_int;
    info.entropy_bits = info.bytes * 8;
    let what = "add to the random pool";
    let pool = File::open("/dev/urandom").context(what)?;
    // SAFETY: the kernel reads the header and as many bytes after it as the header says, all within
    // `info`, which lives through the call.
    unsafe { rnd_add_entropy(pool.as_raw_fd(), &info) }.context(what)?;
    // Without this the generators go on from their old state for up to a minute.
    // SAFETY: takes no argument.
    unsafe { rnd_reseed(pool.as_raw_fd()) }.context("reseed the random generators")?;
    Ok(())
}

/// A way to end the guest that is known to be there.
#[derive(Debug)]
pub enum ShutdownPlan {
    /// The agent's own PID 1 does it.
    Init(Shutdown),
    /// The other init's program does it.
    Program(&'static str),
}

/// Where other inits keep their commands.
const POWER_OFF: [&str; 4] = ["/sbin/poweroff", "/usr/sbin/poweroff", "/bin/poweroff", "/usr/bin/poweroff"];
const REBOOT: [&str; 4] = ["/sbin/reboot", "/usr/sbin/reboot", "/bin/reboot", "/usr/bin/reboot"];

/// Finds out how to end the guest, without doing it.
///
/// # Errors
/// `not_found` for a service whose guest has no such command.
pub fn plan_shutdown(agent: &Agent, shutdown: Shutdown) -> Result<ShutdownPlan, ErrorReply> {
    if agent.role == Role::Init {
        return Ok(ShutdownPlan::Init(shutdown));
    }
    let programs = match shutdown.action {
        ShutdownAction::PowerOff => POWER_OFF,
        ShutdownAction::Reboot => REBOOT,
    };
    let found = programs.into_iter().find(|path| Path::new(path).exists());
    found.map(ShutdownPlan::Program).ok_or_else(|| {
        ErrorReply::new(ErrorCode::NotFound, format!("the guest has no {}", programs.join(", no ")))
    })
}

impl ShutdownPlan {
    pub fn carry_out(self) {
        let outcome = match self {
            Self::Init(shutdown) => init::request_shutdown(shutdown).map_err(Into::into),
            Self::Program(path) => Command::new(path).stdin(Stdio::null()).status().map(|_| ()),
        };
        if let Err(e) = outcome {
            log::error!("shutdown: {e}");
        }
    }
}

/// The hostname a guest has of its own, from `/etc/hostname`.
pub fn own_hostname() -> Option<String> {
    let text = fs::read_to_string("/etc/hostname").ok()?;
    let name = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'))?;
    Some(name.to_owned())
}
