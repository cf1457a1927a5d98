//! One virtual CPU: a thread that runs guest code in KVM and hands what the guest does outside it to the
//! buses.
//!
//! ```text
//!            start()                 pause()                  
//!  CREATED ───────────▶ RUNNING ◀──────────────▶ PAUSED
//!                          │        resume()        │
//!                          └────────▶ ENDED ◀───────┘      stop(), or the guest's own end
//! ```
//! The thread that controls a vCPU writes the wanted state, sets KVM's `immediate_exit` flag and sends a
//! signal: whether the vCPU is in guest code, about to enter it, or handling an exit, it comes back and
//! looks. The vCPU never blocks outside KVM but in PAUSED.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, Msrs};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use log::{error, warn};

use crate::arch::boot;
use crate::arch::cpu::{self, Topology};
use crate::bus::Bus;
use crate::event_loop::lock;
use crate::loader::Entry;
use crate::metrics::METRICS;
use crate::stop::{StopReason, StopSink};

/// Where a vCPU's accesses go, and whom it tells of the end.
#[derive(Clone)]
pub struct Environment {
    /// Port I/O. Devices are one byte wide: a wider or repeated access is one access per byte.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Told when the guest ends or KVM fails.
    pub stop: StopSink,
}

/// Why a vCPU could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// A KVM request failed.
    #[error("vCPU {index}: {what}: {source}")]
    Kvm {
        /// Which vCPU.
        index: u8,
        /// What was asked of KVM.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// Its thread could not be started.
    #[error("vCPU thread: {0}")]
    Thread(#[source] io::Error),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Running,
    Paused,
    Ended,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Actual {
    Running,
    Paused,
    Ended,
}

struct Shared {
    state: Mutex<(Wanted, Actual)>,
    changed: Condvar,
}

/// The `immediate_exit` byte of a vCPU's shared page with KVM.
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte lies in a page shared with the kernel for as long as the VcpuFd lives; it is only
// accessed atomically, and `Vcpu` owns the VcpuFd too.
unsafe impl Send for ImmediateExit {}

/// The controlling side of a vCPU.
pub struct Vcpu {
    shared: Arc<Shared>,
    /// Its thread has it but while it is paused.
    fd: Arc<Mutex<VcpuFd>>,
    immediate_exit: ImmediateExit,
    thread: Option<JoinHandle<()>>,
}

/// Creates vCPU `topology.index` of the VM with this VM's CPUID and boot MSRs.
pub fn create(vm: &VmFd, cpuid: &CpuId, topology: Topology) -> Result<VcpuFd, VcpuError> {
    let index = topology.index;
    let kvm = |what| move |source| VcpuError::Kvm { index, what, source };
    let fd = create_empty(vm, index)?;
    let mut cpuid = cpuid.clone();
    cpu::adapt_cpuid(&mut cpuid, topology);
    fd.set_cpuid2(&cpuid).map_err(kvm("set CPUID"))?;
    Ok(fd)
}

/// Creates vCPU `index` of the VM, for a state to be put into.
pub fn create_empty(vm: &VmFd, index: u8) -> Result<VcpuFd, VcpuError> {
    vm.create_vcpu(index.into()).map_err(|source| VcpuError::Kvm { index, what: "create", source })
}

/// Puts the first vCPU at the kernel's entry point. Others wait for it to start them.
pub fn set_boot_state(fd: &VcpuFd, entry: &Entry) -> Result<(), VcpuError> {
    let kvm = |what| move |source| VcpuError::Kvm { index: 0, what, source };
    let (regs, sregs) = boot::registers(entry, fd.get_sregs().map_err(kvm("get special registers"))?);
    fd.set_sregs(&sregs).map_err(kvm("set special registers"))?;
    fd.set_regs(&regs).map_err(kvm("set registers"))
}

/// Sets the MSRs a kernel expects from firmware.
pub fn set_boot_msrs(fd: &VcpuFd, index: u8) -> Result<(), VcpuError> {
    let what = "set MSRs";
    let fail = |source| VcpuError::Kvm { index, what, source };
    let msrs =
        Msrs::from_entries(&cpu::boot_msrs()).map_err(|_| fail(kvm_ioctls::Error::new(libc::EINVAL)))?;
    match fd.set_msrs(&msrs) {
        Ok(count) if count == msrs.as_slice().len() => Ok(()),
        Ok(_) => Err(fail(kvm_ioctls::Error::new(libc::EINVAL))),
        Err(source) => Err(fail(source)),
    }
}

impl Vcpu {
    /// Starts the vCPU's thread. It begins paused; [`Vcpu::resume`] lets it run. `prepare` runs first on
    /// the new thread (its system call filter).
    pub fn start(
        mut fd: VcpuFd,
        index: u8,
        environment: Environment,
        prepare: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, VcpuError> {
        let shared =
            Arc::new(Shared { state: Mutex::new((Wanted::Paused, Actual::Paused)), changed: Condvar::new() });
        let immediate_exit = ImmediateExit((&raw const fd.get_kvm_run().immediate_exit).cast());
        let fd = Arc::new(Mutex::new(fd));
        let (thread_shared, thread_fd) = (shared.clone(), fd.clone());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu {index}"))
            .stack_size(256 << 10)
            .spawn(move || {
                if let Err(e) = prepare() {
                    environment.stop.stop(StopReason::Failure(format!("vCPU {index}: {e}")));
                    thread_shared.set_actual(Actual::Ended);
                } else {
                    run(&thread_fd, index, &environment, &thread_shared);
                }
            })
            .map_err(VcpuError::Thread)?;
        Ok(Self { shared, fd, immediate_exit, thread: Some(thread) })
    }

    /// Lets the vCPU run.
    pub fn resume(&self) {
        self.want(Wanted::Running);
    }

    /// Asks the vCPU to pause; [`Vcpu::wait_paused`] waits for it, so that many pause side by side.
    pub fn pause(&self) {
        self.want(Wanted::Paused);
    }

    /// Waits until the vCPU no longer runs guest code.
    pub fn wait_paused(&self) {
        let mut state = lock(&self.shared.state);
        while state.1 == Actual::Running {
            state = self.shared.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// What KVM is asked about it while it does not run: waits until it is paused, or has ended.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.fd)
    }

    fn want(&self, wanted: Wanted) {
        {
            let mut state = lock(&self.shared.state);
            if state.0 == Wanted::Ended {
                return;
            }
            state.0 = wanted;
            if wanted == Wanted::Running && state.1 == Actual::Paused {
                state.1 = Actual::Running;
            }
            self.shared.changed.notify_all();
        }
        if wanted != Wanted::Running {
            self.kick();
        }
    }

    /// Gets the vCPU out of guest code, once.
    fn kick(&self) {
        let Some(thread) = &self.thread else { return };
        // SAFETY: the page is mapped for as long as the VcpuFd lives, which `self` has.
        unsafe { &*self.immediate_exit.0 }.store(1, Ordering::SeqCst);
        use std::os::unix::thread::JoinHandleExt;
        // SAFETY: the thread has not been joined, so its id is valid.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.want(Wanted::Ended);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn set_actual(&self, actual: Actual) {
        lock(&self.state).1 = actual;
        self.changed.notify_all();
    }

    /// Waits while a pause is wanted; `false` when the vCPU is to end.
    fn may_run(&self) -> bool {
        let mut state = lock(&self.state);
        loop {
            match state.0 {
                Wanted::Running => {
                    state.1 = Actual::Running;
                    return true;
                }
                Wanted::Ended => {
                    state.1 = Actual::Ended;
                    self.changed.notify_all();
                    return false;
                }
                Wanted::Paused => {
                    state.1 = Actual::Paused;
                    self.changed.notify_all();
                    state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
                }
            }
        }
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler of the signal that interrupts a vCPU: it does nothing, its arrival is enough.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction with a handler that touches nothing is valid.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        if libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn run(fd: &Mutex<VcpuFd>, index: u8, environment: &Environment, shared: &Shared) {
    while shared.may_run() {
        if let Err(reason) = run_until_kicked(&mut lock(fd), index, environment) {
            environment.stop.stop(reason);
            shared.set_actual(Actual::Ended);
            return;
        }
    }
}

/// Runs guest code until someone wants to be heard (`Ok`) or it cannot go on (`Err`).
fn run_until_kicked(fd: &mut VcpuFd, index: u8, environment: &Environment) -> Result<(), StopReason> {
    loop {
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                METRICS.vcpu.exit_io_in.inc();
                for byte in data.chunks_mut(1) {
                    environment.pio.read(port.into(), byte);
                }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                METRICS.vcpu.exit_io_out.inc();
                for byte in data.chunks(1) {
                    environment.pio.write(port.into(), byte);
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                METRICS.vcpu.exit_mmio_read.inc();
                environment.mmio.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                METRICS.vcpu.exit_mmio_write.inc();
                environment.mmio.write(address, data);
            }
            Ok(VcpuExit::Shutdown) => return Err(StopReason::TripleFault),
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                return Err(match kind {
                    kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => StopReason::PowerOff,
                    kvm_bindings::KVM_SYSTEM_EVENT_RESET => StopReason::Reset,
                    kvm_bindings::KVM_SYSTEM_EVENT_CRASH => StopReason::Panic,
                    other => StopReason::Failure(format!("vCPU {index}: system event {other}")),
                });
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::FailEntry(why, cpu)) => {
                return Err(failure(
                    fd,
                    index,
                    format!("cannot enter the guest: reason {why:#x}, host CPU {cpu}"),
                ));
            }
            Ok(VcpuExit::InternalError) => {
                let what = internal_error(fd);
                return Err(failure(fd, index, what));
            }
            Ok(other) => {
                let what = format!("unexpected exit {other:?}");
                return Err(failure(fd, index, what));
            }
            Err(e) if e.errno() == libc::EINTR => {
                fd.set_kvm_immediate_exit(0);
                return Ok(());
            }
            Err(e) if e.errno() == libc::EAGAIN => {}
            Err(e) => return Err(failure(fd, index, format!("KVM_RUN: {e}"))),
        }
    }
}

fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: after this exit KVM has filled the `internal` member of the union.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    let what = match internal.suberror {
        1 => "KVM cannot emulate an instruction",
        2 => "an event arrived while another was delivered",
        4 => "unexpected exit reason",
        _ => "KVM internal error",
    };
    format!("{what} (suberror {}, data {:x?})", internal.suberror, &internal.data[..count])
}

fn failure(fd: &VcpuFd, index: u8, what: String) -> StopReason {
    METRICS.vcpu.failures.inc();
    match fd.get_regs() {
        Ok(regs) => {
            error!("vCPU {index}: {what}; rip={:#x} rsp={:#x} rflags={:#x}", regs.rip, regs.rsp, regs.rflags)
        }
        Err(e) => warn!("vCPU {index}: {what}; registers unavailable: {e}"),
    }
    StopReason::Failure(format!("vCPU {index}: {what}"))
}
