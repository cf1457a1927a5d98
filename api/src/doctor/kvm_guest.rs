//! A 64-bit guest of twenty bytes that tells real KVM from software KVM.
//!
//! The guest runs one `cmpxchg16b`, which software KVM does not emulate, and then counts down in ring 0. A
//! timer interrupts it every few milliseconds of the thread's processor time, and how far it got is the
//! speed. Processor time rather than wall time, so that a busy host does not look like a slow KVM.
//!
//! The guest has no devices and 24 KiB of memory of its own. [`probe`] changes the process's `SIGPROF`
//! handler and timer, and may be stuck if KVM is: call it in a process made for it.

use std::fmt;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};

/// How long one measurement lasts, in processor time.
const SLICE: Duration = Duration::from_millis(5);
/// How many measurements are made before the best is taken as the truth.
const SLICES: usize = 4;
/// Loops a second that leave no doubt; a measurement that reaches it is the last.
const FAST_ENOUGH: f64 = 200e6;

/// Guest physical addresses. The first 2 MiB are mapped to themselves; only 24 KiB have memory behind them.
const CODE: usize = 0x1000;
const PML4: usize = 0x2000;
const PDPT: usize = 0x3000;
const PAGE_DIRECTORY: usize = 0x4000;
const OPERAND: usize = 0x5000;
const MEMORY: usize = 0x6000;

const PROGRAM: &[u8] = &[
    0xf0, 0x48, 0x0f, 0xc7, 0x0e, // lock cmpxchg16b [rsi]
    0x48, 0xff, 0xcf, // count: dec rdi
    0x75, 0xfb, // jnz count
    0xf4, // hlt
];
/// Where the count-down starts, relative to [`CODE`].
const AFTER_CMPXCHG: u64 = 5;

/// What the guest showed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Two-instruction loops a second of processor time, the best of a few measurements.
    pub loops_per_second: f64,
    /// Whether `cmpxchg16b` ran. Where it did not, KVM interprets instructions and knows only some.
    pub complete: bool,
}

/// Which step with KVM failed, and how.
#[derive(Debug)]
pub struct ProbeError {
    step: &'static str,
    cause: String,
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.cause)
    }
}

fn failed<E: fmt::Display>(step: &'static str) -> impl FnOnce(E) -> ProbeError {
    move |cause| ProbeError { step, cause: cause.to_string() }
}

#[repr(C, align(4096))]
struct Memory([u8; MEMORY]);

impl Memory {
    fn new() -> Box<Self> {
        let mut memory = Box::new(Memory([0; MEMORY]));
        let mut put = |at: usize, bytes: &[u8]| memory.0[at..at + bytes.len()].copy_from_slice(bytes);
        const PRESENT_WRITABLE: u64 = 0b11;
        const LARGE: u64 = 1 << 7;
        put(CODE, PROGRAM);
        put(PML4, &(PDPT as u64 | PRESENT_WRITABLE).to_le_bytes());
        put(PDPT, &(PAGE_DIRECTORY as u64 | PRESENT_WRITABLE).to_le_bytes());
        put(PAGE_DIRECTORY, &(PRESENT_WRITABLE | LARGE).to_le_bytes());
        memory
    }
}

/// Runs the guest and measures it. Takes about 5 ms on real KVM and 20 ms on slow ones.
///
/// # Errors
///
/// The step of KVM's set-up that failed, or an exit no KVM should make.
pub fn probe() -> Result<Speed, ProbeError> {
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    let mut memory = Memory::new();
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: std::ptr::from_mut(&mut *memory) as u64,
    };
    // SAFETY: the region is page-aligned memory of this size that nothing here touches any more, and that is
    // dropped only after the vCPU and the VM, below.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    enter_long_mode(&vcpu)?;
    let _timer = Interrupts::every(SLICE)?;
    let speed = measure(&mut vcpu);
    drop(vcpu);
    drop(vm);
    drop(memory);
    speed
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), ProbeError> {
    let mut sregs: kvm_sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let data =
        kvm_segment { limit: 0xffff_ffff, type_: 3, present: 1, db: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 11, db: 0, l: 1, ..data };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = kvm_segment { selector: 16, ..data };
    }
    sregs.cr3 = PML4 as u64;
    sregs.cr4 |= 1 << 5; // PAE
    sregs.cr0 |= 1 << 31 | 1; // paging, protected mode
    sregs.efer |= 1 << 8 | 1 << 10; // long mode enabled and active
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    Ok(())
}

fn set_counter(vcpu: &VcpuFd, rip: u64) -> Result<(), ProbeError> {
    let regs = kvm_regs { rip, rsi: OPERAND as u64, rdi: u64::MAX, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
}

fn measure(vcpu: &mut VcpuFd) -> Result<Speed, ProbeError> {
    let mut speed = Speed { loops_per_second: 0.0, complete: true };
    set_counter(vcpu, CODE as u64)?;
    if run_until_interrupted(vcpu)? == Stop::Unable {
        speed.complete = false;
        set_counter(vcpu, CODE as u64 + AFTER_CMPXCHG)?;
    }
    for _ in 0..SLICES {
        let counter = |vcpu: &VcpuFd| vcpu.get_regs().map(|r| r.rdi).map_err(failed("KVM_GET_REGS"));
        let (before, started) = (counter(vcpu)?, processor_time());
        if run_until_interrupted(vcpu)? == Stop::Unable {
            return Err(ProbeError { step: "KVM_RUN", cause: "the guest stopped in its loop".into() });
        }
        let (after, spent) = (counter(vcpu)?, processor_time().saturating_sub(started));
        let loops = before.wrapping_sub(after) as f64;
        speed.loops_per_second = speed.loops_per_second.max(loops / spent.as_secs_f64().max(1e-6));
        if speed.loops_per_second >= FAST_ENOUGH {
            break;
        }
    }
    speed.loops_per_second = speed.loops_per_second.round();
    Ok(speed)
}

#[derive(PartialEq)]
enum Stop {
    /// The timer's signal ended the run; the guest would go on.
    Interrupted,
    /// KVM could not go on with the guest.
    Unable,
}

fn run_until_interrupted(vcpu: &mut VcpuFd) -> Result<Stop, ProbeError> {
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline {
        match vcpu.run() {
            Err(e) if e.errno() == libc::EINTR => return Ok(Stop::Interrupted),
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(failed("KVM_RUN")(e)),
            Ok(VcpuExit::Intr) => return Ok(Stop::Interrupted),
            Ok(VcpuExit::IrqWindowOpen) => {}
            Ok(_) => return Ok(Stop::Unable),
        }
    }
    Err(ProbeError { step: "KVM_RUN", cause: "it returns without running the guest".into() })
}

fn processor_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Into::into).unwrap_or_default()
}

/// `SIGPROF` at an interval of the process's processor time, so that `KVM_RUN` returns with `EINTR`.
///
/// Repeating rather than once, because a signal that arrives just before `KVM_RUN` would be lost.
struct Interrupts;

impl Interrupts {
    fn every(interval: Duration) -> Result<Self, ProbeError> {
        extern "C" fn nothing(_: libc::c_int) {}
        let action = nix::sys::signal::SigAction::new(
            nix::sys::signal::SigHandler::Handler(nothing),
            nix::sys::signal::SaFlags::empty(),
            nix::sys::signal::SigSet::empty(),
        );
        // SAFETY: the handler does nothing, so it is safe at any point of the program.
        unsafe { nix::sys::signal::sigaction(nix::sys::signal::Signal::SIGPROF, &action) }
            .map_err(failed("sigaction"))?;
        Self::set(interval).map_err(failed("setitimer"))?;
        Ok(Interrupts)
    }

    fn set(interval: Duration) -> std::io::Result<()> {
        let tick = libc::timeval { tv_sec: 0, tv_usec: interval.subsec_micros().into() };
        let timer = libc::itimerval { it_interval: tick, it_value: tick };
        // SAFETY: `timer` is a valid itimerval and the old value is not asked for.
        match unsafe { libc::setitimer(libc::ITIMER_PROF, &timer, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        // A timer that cannot be stopped does no harm: its handler does nothing.
        let _ = Self::set(Duration::ZERO);
    }
}
