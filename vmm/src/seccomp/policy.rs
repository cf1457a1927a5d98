//! The lists: which thread needs which system call, and what for.
//!
//! A vCPU's thread is started by the main thread and stays under [`SETUP`] as well, and so does the main
//! thread under [`VMM`]: what these allow must be in [`SETUP`] too.

use libc::*;

use super::compile::Test::{Is, Masked};
use super::compile::{Rule, Test, Verdict, allow, allow_if, compile, len};

pub(super) static SETUP: [sock_filter; len(SETUP_RULES)] = compile(SETUP_RULES);
pub(super) static VMM: [sock_filter; len(VMM_RULES)] = compile(VMM_RULES);
pub(super) static VCPU: [sock_filter; len(VCPU_RULES)] = compile(VCPU_RULES);

const SETUP_RULES: &[&[Rule]] = &[EVERY, MAIN, START, &[allow_if(SYS_ioctl, 1, &START_IOCTLS)]];
const VMM_RULES: &[&[Rule]] = &[EVERY, MAIN, &[allow_if(SYS_ioctl, 1, &MAIN_IOCTLS)]];
const VCPU_RULES: &[&[Rule]] = &[EVERY, &[allow_if(SYS_ioctl, 1, &VCPU_IOCTLS)]];

/// What a thread's filter was made of, to compare it with.
#[cfg(test)]
pub(super) fn rules(thread: super::Thread) -> &'static [&'static [Rule]] {
    match thread {
        super::Thread::Setup => SETUP_RULES,
        super::Thread::Vmm => VMM_RULES,
        super::Thread::Vcpu => VCPU_RULES,
    }
}

/// What any thread does: memory, locks, signals, time, its own end, and the descriptors it has.
const EVERY: &[Rule] = &[
    // Event and timer descriptors, files, sockets, the log.
    allow(SYS_read),
    allow(SYS_write),
    allow(SYS_writev),
    // Whoever drops the last reference closes. Debug builds look with fcntl first.
    allow(SYS_close),
    allow_if(SYS_fcntl, 1, &FCNTLS),
    // A driver that starts or resets its device does so on a vCPU: what is waited for changes, and a drive
    // finishes what it has begun.
    allow(SYS_epoll_ctl),
    allow(SYS_timerfd_settime),
    allow(SYS_io_uring_enter),
    // The allocator. Nothing is ever made executable.
    allow(SYS_brk),
    allow_if(SYS_mmap, 2, &[Masked(PROT_EXEC as u32, 0)]),
    allow_if(SYS_mprotect, 2, &[Masked(PROT_EXEC as u32, 0)]),
    allow(SYS_mremap),
    allow(SYS_munmap),
    allow(SYS_madvise),
    // Locks and waiting for other threads.
    allow(SYS_futex),
    allow(SYS_sched_yield),
    // Signals: kicking a vCPU out of the guest, and aborting. To this process only, there being no other.
    allow(SYS_getpid),
    allow(SYS_gettid),
    allow_if(SYS_tgkill, 2, &[Is(KICK), Is(SIGABRT as u32)]),
    allow(SYS_rt_sigprocmask),
    allow(SYS_rt_sigreturn),
    allow(SYS_restart_syscall),
    // Taking down a thread's signal stack.
    allow(SYS_sigaltstack),
    // Where the host's clock cannot be read without a call.
    allow(SYS_clock_gettime),
    // The seed of a hash table, and what the entropy device gives.
    allow(SYS_getrandom),
    allow(SYS_exit),
    allow(SYS_exit_group),
    // The handler of fatal signals and the panic hook remove the sockets, wherever they run.
    allow(SYS_unlink),
];

/// `SIGRTMIN`, which the C library makes of the kernel's 32 by keeping two for itself.
const KICK: u32 = 34;

/// What the main thread does from first to last: the event loop, the devices' work, the API, a drive
/// replaced by another.
const MAIN: &[Rule] = &[
    allow(SYS_epoll_wait),
    allow(SYS_epoll_pwait),
    allow(SYS_poll),
    // Files: kernel and drives, the log, metrics, and what a drive is replaced with.
    allow(SYS_openat),
    allow(SYS_fstat),
    allow(SYS_newfstatat),
    allow(SYS_statx),
    allow(SYS_lseek),
    allow(SYS_flock),
    // Drives, without and with io_uring, whose rings can do nothing but this to the one file they have.
    allow(SYS_pread64),
    allow(SYS_pwrite64),
    allow(SYS_readv),
    allow(SYS_preadv),
    allow(SYS_pwritev),
    allow(SYS_fsync),
    allow(SYS_fdatasync),
    allow(SYS_fallocate),
    allow(SYS_io_uring_register),
    // Snapshots: which pages of memory there are, and files that are put in their place when they are whole.
    allow(SYS_mincore),
    allow(SYS_sysinfo),
    allow(SYS_ftruncate),
    allow(SYS_rename),
    // Connections to the API and of the vsock device.
    allow_if(SYS_socket, 0, &[Is(AF_UNIX as u32)]),
    allow(SYS_connect),
    allow(SYS_accept4),
    allow(SYS_shutdown),
    allow(SYS_recvfrom),
    allow(SYS_sendto),
    allow(SYS_recvmsg),
    allow(SYS_sendmsg),
    allow(SYS_getsockopt),
    allow(SYS_setsockopt),
];

/// `fcntl` requests: blocking or not, copies of descriptors, locks on drives.
const FCNTLS: [Test; 6] = [
    Is(F_GETFD as u32),
    Is(F_GETFL as u32),
    Is(F_SETFL as u32),
    Is(F_DUPFD_CLOEXEC as u32),
    Is(F_OFD_SETLK as u32),
    Is(F_SETLK as u32),
];

/// What is only done before the guest runs: everything is made.
const START: &[Rule] = &[
    allow(SYS_epoll_create1),
    allow(SYS_eventfd2),
    allow(SYS_timerfd_create),
    allow(SYS_io_uring_setup),
    allow(SYS_memfd_create),
    allow(SYS_bind),
    allow(SYS_listen),
    allow(SYS_rt_sigaction),
    allow(SYS_prlimit64),
    allow(SYS_sched_getaffinity),
    allow(SYS_getpgrp),
    // Threads, as the C library makes them: with `clone3` or, when that is not there, with `clone`, whose
    // flags can be looked at. No other flags, so no processes and no namespaces.
    Rule { call: SYS_clone3, verdict: Verdict::Fail(ENOSYS as u16) },
    allow_if(SYS_clone, 0, &[Is(THREAD)]),
    allow(SYS_set_robust_list),
    allow(SYS_rseq),
    // A thread's name; and the next filter.
    allow_if(SYS_prctl, 0, &[Is(PR_SET_NAME as u32), Is(PR_SET_NO_NEW_PRIVS as u32)]),
    allow_if(SYS_seccomp, 0, &[Is(SECCOMP_SET_MODE_FILTER)]),
];

/// What `pthread_create` of glibc asks of `clone`.
const THREAD: u32 = (CLONE_VM
    | CLONE_FS
    | CLONE_FILES
    | CLONE_SYSVSEM
    | CLONE_SIGHAND
    | CLONE_THREAD
    | CLONE_SETTLS
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_CLEARTID) as u32;

// Requests to devices, from linux/kvm.h, linux/if_tun.h, linux/sockios.h, linux/fs.h and
// asm-generic/ioctls.h.

const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;

/// Requests of a vCPU: run, its registers when it cannot go on, and the terminal's settings put back then;
/// and what a tap may leave to a driver that starts.
const VCPU_IOCTLS: [Test; 4] = [Is(KVM_RUN), Is(KVM_GET_REGS), Is(TCSETS), Is(TUNSETOFFLOAD)];

const BLKDISCARD: u32 = 0x1277;
const BLKZEROOUT: u32 = 0x127f;
const BLKGETSIZE64: u32 = 0x8008_1272;
const TCGETS: u32 = 0x5401;
const TCSETS: u32 = 0x5402;
const FIONBIO: u32 = 0x5421;

const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_GET_MSRS: u32 = 0xc008_ae88;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
const KVM_GET_CPUID2: u32 = 0xc008_ae91;
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
const KVM_GET_TSC_KHZ: u32 = 0xaea3;
const KVM_GET_XSAVE: u32 = 0x9000_aea4;
const KVM_GET_XCRS: u32 = 0x8188_aea6;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_GET_DEVICE_ATTR: u32 = 0x4018_aee2;

/// Requests of the main thread: drives that are block devices, the terminal's settings at the end,
/// sockets that do not block; and what a machine that stands still is asked for a snapshot, and told when it
/// goes on.
const MAIN_IOCTLS: [Test; 21] = [
    Is(BLKDISCARD),
    Is(BLKZEROOUT),
    Is(BLKGETSIZE64),
    Is(TCGETS),
    Is(TCSETS),
    Is(FIONBIO),
    Is(KVM_GET_REGS),
    Is(KVM_GET_IRQCHIP),
    Is(KVM_GET_CLOCK),
    Is(KVM_GET_SREGS),
    Is(KVM_GET_MSRS),
    Is(KVM_GET_LAPIC),
    Is(KVM_GET_CPUID2),
    Is(KVM_GET_MP_STATE),
    Is(KVM_GET_VCPU_EVENTS),
    Is(KVM_GET_DEBUGREGS),
    Is(KVM_GET_TSC_KHZ),
    Is(KVM_GET_XSAVE),
    Is(KVM_GET_XCRS),
    Is(KVM_KVMCLOCK_CTRL),
    Is(KVM_GET_DEVICE_ATTR),
];

const KVM: Test = Masked(0xff00, 0xae00);
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNGETFEATURES: u32 = 0x8004_54cf;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const SIOCGIFINDEX: u32 = 0x8933;
const TIOCGPGRP: u32 = 0x540f;

/// The same, anything to KVM, what attaches a tap, and whether the terminal is ours.
const START_IOCTLS: [Test; 13] = [
    KVM,
    Is(BLKDISCARD),
    Is(BLKZEROOUT),
    Is(BLKGETSIZE64),
    Is(TCGETS),
    Is(TCSETS),
    Is(FIONBIO),
    Is(TUNSETIFF),
    Is(TUNGETFEATURES),
    Is(TUNSETOFFLOAD),
    Is(TUNSETVNETHDRSZ),
    Is(SIOCGIFINDEX),
    Is(TIOCGPGRP),
];
