//! System call filters: the kernel ends the process when a thread does what it never has to.
//!
//! Every thread runs under a filter of its own kind (see [`Thread`]), which lists what that thread needs
//! and, where it is cheap, with which arguments. Filters are made at compile time: turning one on costs two
//! system calls. A filter stays for the life of its thread, is inherited by the threads it starts, and a
//! further one can only take away.
//!
//! A violation raises SIGSYS in the thread, whose handler (see [`crate::signals`]) names the system call and
//! ends the process; where it cannot run, the signal itself ends the process.
//!
//! The lists are in `policy.rs`. Something missing there shows as such a line: look at who makes the call
//! and whether that thread has to, and add it with the reason.

mod compile;
mod policy;

use std::io;

/// Kinds of threads, by what they may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The main thread until the guest starts: opens files and sockets, sets KVM up, starts threads.
    Setup,
    /// The main thread from then on: runs the event loop, the devices and the API.
    Vmm,
    /// A vCPU's thread.
    Vcpu,
}

impl Thread {
    fn filter(self) -> &'static [libc::sock_filter] {
        match self {
            Self::Setup => &policy::SETUP,
            Self::Vmm => &policy::VMM,
            Self::Vcpu => &policy::VCPU,
        }
    }
}

/// Restricts the calling thread, and those it starts, to what such a thread may do. There is no way back.
pub fn apply(thread: Thread) -> io::Result<()> {
    let filter = thread.filter();
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        // The kernel only reads it.
        filter: filter.as_ptr().cast_mut(),
    };
    let failed = || Err(io::Error::last_os_error());
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return failed();
    }
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: `program` describes a filter that lives as long as the process.
    if unsafe { libc::syscall(libc::SYS_seccomp, mode, 0, &raw const program) } < 0 {
        return failed();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
