//! Code that runs in the VMM and is not the VMM's: makes one of its threads make a system call of the test's
//! choosing, as a guest would that has taken the process over.

use std::io;
use std::time::Instant;

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::PATIENCE;

/// The thread of process `pid` whose name is `name`.
#[track_caller]
pub fn thread_named(pid: u32, name: &str) -> i32 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process's threads");
    let mut ids = tasks.flatten().filter(|task| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    });
    let id = ids.next().unwrap_or_else(|| panic!("process {pid} has no thread {name:?}"));
    id.file_name().to_string_lossy().parse().expect("a thread's number")
}

/// Turns the next system call of a thread into `number` with these arguments, and lets the thread go on. The
/// kernel looks at filters after that change. `wake` makes a thread that sleeps come by; it is called over and
/// over.
#[track_caller]
pub fn make_system_call(thread: i32, number: i64, arguments: [u64; 3], mut wake: impl FnMut()) {
    let pid = Pid::from_raw(thread);
    ptrace(libc::PTRACE_SEIZE, thread, libc::PTRACE_O_TRACESYSGOOD as usize).expect("to trace the VMM");
    ptrace(libc::PTRACE_INTERRUPT, thread, 0).expect("to interrupt the thread");
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "the thread makes no system call");
        match waitpid(pid, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).expect("to wait for the thread")
        {
            WaitStatus::StillAlive => {
                wake();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            WaitStatus::PtraceSyscall(_) if enters_system_call(thread) => break,
            // A signal is for the thread: such as the one that gets a vCPU out of the guest.
            WaitStatus::Stopped(_, signal) => {
                ptrace(libc::PTRACE_SYSCALL, thread, signal as usize).expect("to let the thread go on");
            }
            _ => ptrace(libc::PTRACE_SYSCALL, thread, 0).expect("to let the thread go on"),
        }
    }
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, thread, &raw mut registers as usize).expect("the thread's registers");
    registers.orig_rax = number as u64;
    [registers.rdi, registers.rsi, registers.rdx] = arguments;
    ptrace(libc::PTRACE_SETREGS, thread, &raw const registers as usize).expect("to set registers");
    ptrace(libc::PTRACE_DETACH, thread, 0).expect("to let the thread go");
}

/// Whether the thread, which stands at a system call, is about to make it (and has not made it already).
fn enters_system_call(thread: i32) -> bool {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = std::mem::size_of_val(&info);
    // SAFETY: the kernel writes at most `size` bytes to `info`.
    let written = unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size, &raw mut info) };
    written > 0 && info.op == libc::PTRACE_SYSCALL_INFO_ENTRY
}

fn ptrace(request: libc::c_uint, thread: i32, data: usize) -> io::Result<()> {
    // SAFETY: the requests above take numbers, or the address of a live structure of the kernel's type.
    match unsafe { libc::ptrace(request, thread, 0, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
