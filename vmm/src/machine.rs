//! A machine: memory, vCPUs and devices put together from a configuration, over KVM.
//!
//! Building goes in the order in which things can fail for reasons a user can mend: files and their
//! contents first, KVM next, threads last; whatever was made is dropped again with an error. Then the
//! vCPUs run, and this type only pauses, resumes and adjusts them.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::acpi::{Platform, VirtioWindow};
use crate::arch::boot::BootInfo;
use crate::arch::cpu::Topology;
use crate::arch::cpu_config::{self, CpuConfigError};
use crate::arch::{acpi, boot, layout, mptable};
use crate::bus::{Bus, BusDevice, Overlap};
use crate::config::{HugePages, MachineConfig, VmConfig};
use crate::devices::boot_timer::{self, BootTimer};
use crate::devices::i8042::{self, I8042};
use crate::devices::power::{self, Power, PvPanic};
use crate::devices::serial::{self, Console, SerialState};
use crate::event_loop::{EventLoop, lock};
use crate::loader::{self, Entry, LoadError};
use crate::memory::{self, Memory, MemoryError};
use crate::mmds::SharedMmds;
use crate::rate_limiter::TokenBucket;
use crate::stop::StopSink;
use crate::vcpu::{self, Environment, Vcpu, VcpuError};
use crate::virtio::mmio::{self, MmioTransport};
use crate::virtio::registers::{Acknowledgements, Registers};
use crate::virtio::{Interrupt, VirtioDevice};
use crate::vm::{Vm, VmError};

mod cmdline;
mod operations;
mod restore;
mod save;
mod virtio_devices;

pub use cmdline::CmdlineError;
pub use restore::RestoreError;
pub use virtio_devices::DeviceError;

/// Why a machine could not be built. The messages name the field or file at fault.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file named in the configuration cannot be opened.
    #[error("{field}: cannot open {}: {source}", .path.display())]
    Open {
        /// API field.
        field: &'static str,
        /// The path given.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// See [`MemoryError`].
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// See [`LoadError`].
    #[error(transparent)]
    Load(#[from] LoadError),
    /// See [`CmdlineError`].
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// See [`DeviceError`].
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// See [`CpuConfigError`].
    #[error(transparent)]
    Cpu(#[from] CpuConfigError),
    /// See [`VmError`].
    #[error(transparent)]
    Vm(#[from] VmError),
    /// See [`VcpuError`].
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Guest memory is too small for what a boot needs.
    #[error("mem_size_mib: too small to boot: {0}")]
    TooSmall(#[from] GuestMemoryError),
    /// Two devices at one address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// More devices than interrupt lines.
    #[error("too many devices: a microVM has room for {0} virtio devices")]
    TooManyDevices(usize),
    /// A resource of the host.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] io::Error),
}

fn host(what: &'static str) -> impl Fn(io::Error) -> BuildError {
    move |source| BuildError::Host(what, source)
}

/// What a machine is given besides its configuration.
pub struct Resources<'a> {
    /// Open handle of `/dev/kvm`.
    pub kvm: &'a Kvm,
    /// Loop in which the devices work.
    pub event_loop: &'a mut EventLoop,
    /// Told of the machine's end.
    pub stop: StopSink,
    /// Whether to listen for the guest's boot timer.
    pub boot_timer: bool,
    /// Where the serial console goes.
    pub console: serial::Sink,
    /// Metadata, for interfaces that serve it.
    pub mmds: SharedMmds,
    /// Runs first on each vCPU thread.
    pub prepare_vcpu: fn() -> io::Result<()>,
}

/// See the module's text.
pub struct Machine {
    // The order matters: vCPUs end first, then KVM lets go of memory.
    vcpus: Vec<Vcpu>,
    vm: Vm,
    _registers: Vec<Arc<Registers>>,
    memory: Arc<Memory>,
    keyboard: Arc<I8042>,
    console: Arc<Mutex<Console>>,
    boot_timer: Option<Arc<BootTimer>>,
    transports: Vec<Arc<MmioTransport>>,
    devices: virtio_devices::Devices,
    /// Raises the interrupt of the VM generation identifier.
    _generation: Option<EventFd>,
    acpi: bool,
}

/// A machine without its vCPUs.
struct Board {
    vm: Vm,
    memory: Arc<Memory>,
    keyboard: Arc<I8042>,
    console: Arc<Mutex<Console>>,
    boot_timer: Option<Arc<BootTimer>>,
    transports: Vec<Arc<MmioTransport>>,
    devices: virtio_devices::Devices,
    windows: Vec<VirtioWindow>,
    registers: Vec<Arc<Registers>>,
    acknowledgements: Arc<Acknowledgements>,
    environment: Environment,
}

/// Interrupt line of the VM generation announcement: the first, so that virtio devices follow in a row.
const IRQ_VMGENID: u32 = layout::IRQ_VIRTIO_FIRST;

impl Machine {
    /// Builds the machine that `config` describes. Its vCPUs wait for [`Machine::run`].
    pub fn build(config: &VmConfig, resources: Resources) -> Result<Self, BuildError> {
        let boot_timer = resources.boot_timer.then(|| Arc::new(BootTimer::start()));
        let prepare_vcpu = resources.prepare_vcpu;
        let huge = config.machine.huge_pages == HugePages::Hugetlbfs2M;
        let memory = Arc::new(memory::create(config.machine.mem_size_mib, huge)?);
        if config.machine.huge_pages == HugePages::Transparent {
            memory::advise_huge(&memory);
        }
        let boot = load_boot_source(config, &memory)?;
        let mut vm = Vm::new(resources.kvm)?;
        if let Some(cpu) = &config.cpu {
            cpu_config::check_capabilities(resources.kvm, cpu)?;
            cpu_config::apply_cpuid(vm.cpuid_mut(), cpu)?;
        }
        let board = Board::new(config, vm, memory, resources, boot_timer, None)?;
        write_firmware(config, &board.memory, &boot, &board.windows)?;
        let vcpus = start_vcpus(config, &board, &boot.entry, prepare_vcpu)?;
        Ok(board.with(vcpus, None, !cmdline::acpi_is_off(config)))
    }

    /// Lets the vCPUs run.
    pub fn run(&self) {
        for vcpu in &self.vcpus {
            vcpu.resume();
        }
    }

    /// Time the guest took to its init, where the boot timer is on and it got there.
    pub fn guest_init_time(&self) -> Option<std::time::Duration> {
        self.boot_timer.as_ref()?.guest_init()
    }
}

impl Board {
    /// Puts memory and devices into a fresh VM. With `saved`, the serial port goes on from there.
    fn new(
        config: &VmConfig,
        mut vm: Vm,
        memory: Arc<Memory>,
        resources: Resources,
        boot_timer: Option<Arc<BootTimer>>,
        saved: Option<&SerialState>,
    ) -> Result<Self, BuildError> {
        let Resources { event_loop, stop, console, mmds, .. } = resources;
        vm.set_memory(&memory)?;

        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        let keyboard = Arc::new(I8042::new(event().map_err(host("eventfd"))?, stop.clone()));
        vm.bind_irq(keyboard.irq(), layout::IRQ_KEYBOARD)?;
        pio.insert(layout::PORT_I8042, i8042::PORTS, keyboard.clone())?;
        pio.insert(layout::PORT_POWER, power::PORTS, Arc::new(Power(stop.clone())))?;
        pio.insert(layout::PORT_PVPANIC, 1, Arc::new(PvPanic(stop.clone())))?;
        let console = attach_console(config, console, saved, &vm, &mut pio, event_loop)?;
        if let Some(timer) = &boot_timer {
            mmio.insert(layout::BOOT_TIMER, boot_timer::WINDOW, timer.clone())?;
        }

        let mut placer = Placer {
            vm: &mut vm,
            mmio: &mut mmio,
            memory: &memory,
            event_loop,
            mmds,
            windows: Vec::new(),
            registers: Vec::new(),
            transports: Vec::new(),
            acknowledgements: Arc::default(),
        };
        let devices = virtio_devices::create(config, &mut placer)?;
        let Placer { windows, registers, transports, acknowledgements, .. } = placer;
        let environment = Environment { pio: Arc::new(pio), mmio: Arc::new(mmio), stop };
        Ok(Self {
            vm,
            memory,
            keyboard,
            console,
            boot_timer,
            transports,
            devices,
            windows,
            registers,
            acknowledgements,
            environment,
        })
    }

    /// The machine that this is with vCPUs.
    fn with(self, vcpus: Vec<Vcpu>, generation: Option<EventFd>, acpi: bool) -> Machine {
        Machine {
            vcpus,
            vm: self.vm,
            _registers: self.registers,
            memory: self.memory,
            keyboard: self.keyboard,
            console: self.console,
            boot_timer: self.boot_timer,
            transports: self.transports,
            devices: self.devices,
            _generation: generation,
            acpi,
        }
    }
}

impl Board {
    /// Starts a thread for each vCPU, which waits.
    fn start(&self, fds: Vec<VcpuFd>, prepare: fn() -> io::Result<()>) -> Result<Vec<Vcpu>, BuildError> {
        vcpu::install_kick_handler().map_err(host("signal handler"))?;
        if let Some(fd) = fds.first() {
            self.acknowledgements.attach(fd).map_err(host("ring of acknowledgements"))?;
        }
        let start = |(index, fd)| Vcpu::start(fd, index, self.environment.clone(), prepare);
        Ok((0..).zip(fds).map(start).collect::<Result<_, _>>()?)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpus.clear();
        lock(&self.console).finish();
    }
}

/// What was loaded for booting.
struct Boot {
    entry: Entry,
    initrd: Option<(u64, u64)>,
}

fn open(field: &'static str, path: &Path) -> Result<File, BuildError> {
    let fail = |source| BuildError::Open { field, path: path.to_owned(), source };
    let file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(fail(io::Error::other("not a regular file")));
    }
    Ok(file)
}

fn load_boot_source(config: &VmConfig, memory: &Memory) -> Result<Boot, BuildError> {
    let source = config.boot_source.clone().unwrap_or_default();
    let kernel = loader::load_kernel(&open("kernel_image_path", &source.kernel_image_path)?, memory)?;
    let limit = match &kernel.entry {
        Entry::Linux64 { header: Some(header), .. } => header.initrd_limit(),
        _ => layout::MMIO_HOLE_START,
    };
    let initrd = match &source.initrd_path {
        Some(path) => Some(loader::load_initrd(&open("initrd_path", path)?, memory, kernel.end, limit)?),
        None => None,
    };
    Ok(Boot { entry: kernel.entry, initrd })
}

fn attach_console(
    config: &VmConfig,
    sink: serial::Sink,
    saved: Option<&SerialState>,
    vm: &Vm,
    pio: &mut Bus,
    event_loop: &mut EventLoop,
) -> Result<Arc<Mutex<Console>>, BuildError> {
    let irq = event().map_err(host("eventfd"))?;
    vm.bind_irq(&irq, layout::IRQ_SERIAL)?;
    let limit = config.serial.as_ref().and_then(|serial| serial.rate_limiter);
    let limit = limit.and_then(|limit| TokenBucket::from_config(&limit, Instant::now()));
    let (port, console) = serial::create(irq, sink, limit, saved).map_err(host("serial console"))?;
    pio.insert(layout::PORT_SERIAL, serial::PORTS, Arc::new(port))?;
    let console = Arc::new(Mutex::new(console));
    let events = event_loop.subscribe(console.clone());
    lock(&console).attach(events).map_err(host("serial console"))?;
    Ok(console)
}

/// Writes command line, memory map and tables: ACPI, or the MP table and devices on the command line
/// where the command line turns ACPI off.
fn write_firmware(
    config: &VmConfig,
    memory: &Memory,
    boot: &Boot,
    windows: &[VirtioWindow],
) -> Result<(), BuildError> {
    let cpus = config.machine.vcpu_count;
    let with_acpi = !cmdline::acpi_is_off(config);
    let cmdline = cmdline::build(config, if with_acpi { &[] } else { windows })?;
    let rsdp = if with_acpi {
        let mut id = [0; 16];
        random(&mut id).map_err(host("random numbers"))?;
        memory.write_slice(&id, GuestAddress(layout::VMGENID))?;
        Some(acpi::write_tables(memory, &Platform { cpus, virtio: windows, vmgenid_irq: IRQ_VMGENID })?)
    } else {
        None
    };
    mptable::write_table(memory, cpus)?;
    boot::write_gdt(memory, &boot.entry)?;
    let info = BootInfo { entry: &boot.entry, cmdline: &cmdline, initrd: boot.initrd, rsdp };
    Ok(boot::write_boot_info(memory, &info)?)
}

fn random(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: the pointer and length are those of a live, writable slice.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if count == bytes.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn start_vcpus(
    config: &VmConfig,
    board: &Board,
    entry: &Entry,
    prepare: fn() -> io::Result<()>,
) -> Result<Vec<Vcpu>, BuildError> {
    let MachineConfig { vcpu_count: count, smt, .. } = config.machine;
    let mut fds = Vec::new();
    for index in 0..count {
        let fd = vcpu::create(board.vm.fd(), board.vm.cpuid(), Topology { index, count, smt })?;
        vcpu::set_boot_msrs(&fd, index)?;
        if let Some(cpu) = &config.cpu {
            cpu_config::apply_msrs(&fd, cpu)?;
        }
        if index == 0 {
            vcpu::set_boot_state(&fd, entry)?;
        }
        fds.push(fd);
    }
    board.start(fds, prepare)
}

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// Gives virtio devices their windows, interrupt lines and notifications.
struct Placer<'a> {
    vm: &'a mut Vm,
    mmio: &'a mut Bus,
    memory: &'a Arc<Memory>,
    event_loop: &'a mut EventLoop,
    mmds: SharedMmds,
    windows: Vec<VirtioWindow>,
    registers: Vec<Arc<Registers>>,
    transports: Vec<Arc<MmioTransport>>,
    acknowledgements: Arc<Acknowledgements>,
}

impl Placer<'_> {
    fn place(&mut self, device: Arc<Mutex<dyn VirtioDevice>>) -> Result<(), BuildError> {
        const ROOM: usize = (layout::IRQ_LAST - IRQ_VMGENID) as usize;
        let index = self.windows.len();
        if index == ROOM {
            return Err(BuildError::TooManyDevices(ROOM));
        }
        let window = VirtioWindow {
            address: layout::VIRTIO_MMIO + index as u64 * mmio::WINDOW,
            irq: IRQ_VMGENID + 1 + index as u32,
        };
        let irqfd = event().map_err(host("eventfd"))?;
        self.vm.bind_irq(&irqfd, window.irq)?;
        let interrupt = Interrupt::acknowledged_by(irqfd, self.acknowledgements.clone());
        let registers = interrupt.registers().clone();
        let transport = MmioTransport::new(device, self.memory.clone(), interrupt, self.event_loop)
            .map_err(host("virtio device"))?;
        for (queue, notifier) in transport.notifiers().iter().enumerate() {
            self.vm.bind_notification(notifier, window.address + mmio::QUEUE_NOTIFY, queue as u32)?;
        }
        let transport = Arc::new(transport);
        self.mmio.insert(window.address, mmio::WINDOW, transport.clone() as Arc<dyn BusDevice>)?;
        self.transports.push(transport);
        // SAFETY: `Machine` keeps the registers, and drops them after the VM.
        unsafe { self.vm.show_registers(window.address, &registers) }?;
        if self.vm.note_writes(window.address + mmio::INTERRUPT_ACK)? {
            self.acknowledgements.add(window.address, registers.clone());
        }
        self.registers.push(registers);
        self.windows.push(window);
        Ok(())
    }
}
