//! The whole configuration of one microVM, put together request by request.

use super::{
    BalloonConfig, BootSourceConfig, ConfigError, CpuConfig, DriveConfig, EntropyConfig, MachineConfig,
    MmdsConfig, NetworkInterfaceConfig, PmemConfig, SerialConfig, VsockConfig,
};

/// The whole configuration of one microVM.
///
/// Each setter either takes its value or, with an error, changes nothing; what was set before with
/// the same id is replaced. The order of devices is the order in which the guest finds them: that
/// of their first setting, save that a root drive comes first. Where Firecracker shows a default for what
/// was left out, the setter fills it in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmConfig {
    pub machine: MachineConfig,
    pub cpu: Option<CpuConfig>,
    pub boot_source: Option<BootSourceConfig>,
    pub drives: Vec<DriveConfig>,
    pub pmem: Vec<PmemConfig>,
    pub network_interfaces: Vec<NetworkInterfaceConfig>,
    pub vsock: Option<VsockConfig>,
    pub entropy: Option<EntropyConfig>,
    pub balloon: Option<BalloonConfig>,
    pub serial: Option<SerialConfig>,
    pub mmds: Option<MmdsConfig>,
}

impl VmConfig {
    /// The most drives, pmem devices or network interfaces, of each.
    pub const MAX_DEVICES: usize = 32;

    /// Checks that the configuration is complete enough to boot and returns what it boots.
    pub fn check_bootable(&self) -> Result<&BootSourceConfig, ConfigError> {
        self.boot_source.as_ref().ok_or(ConfigError::NoBootSource)
    }

    /// Sets vCPUs and memory.
    pub fn set_machine(&mut self, machine: MachineConfig) -> Result<(), ConfigError> {
        machine.check()?;
        if let Some(balloon) = &self.balloon
            && u64::from(balloon.amount_mib) > machine.mem_size_mib
        {
            return Err(ConfigError::MemSizeBelowBalloon {
                mib: machine.mem_size_mib,
                balloon_mib: balloon.amount_mib,
            });
        }
        self.machine = machine;
        Ok(())
    }

    /// Sets what the guest sees of the CPU.
    pub fn set_cpu(&mut self, cpu: CpuConfig) -> Result<(), ConfigError> {
        cpu.check()?;
        self.cpu = Some(cpu);
        Ok(())
    }

    /// Sets what is booted.
    pub fn set_boot_source(&mut self, boot_source: BootSourceConfig) -> Result<(), ConfigError> {
        boot_source.check()?;
        self.boot_source = Some(boot_source);
        Ok(())
    }

    /// Adds a drive, or replaces the one with its id.
    pub fn set_drive(&mut self, mut drive: DriveConfig) -> Result<(), ConfigError> {
        drive.check()?;
        drive.is_read_only.get_or_insert_default();
        drive.io_engine.get_or_insert_default();
        let position = self.drives.iter().position(|d| d.drive_id == drive.drive_id);
        if drive.is_root_device {
            let except = ("drives", drive.drive_id.as_str());
            self.check_single_root(except)?;
        }
        // A root drive comes first, where it stands replaced or not.
        match position {
            Some(index) if index == 0 || !drive.is_root_device => self.drives[index] = drive,
            Some(index) => {
                self.drives.remove(index);
                self.drives.insert(0, drive);
            }
            None => {
                check_room("drives", self.drives.len())?;
                let index = if drive.is_root_device { 0 } else { self.drives.len() };
                self.drives.insert(index, drive);
            }
        }
        Ok(())
    }

    /// Adds a pmem device, or replaces the one with its id.
    pub fn set_pmem(&mut self, pmem: PmemConfig) -> Result<(), ConfigError> {
        pmem.check()?;
        if pmem.root_device {
            self.check_single_root(("pmem", &pmem.id))?;
        }
        match self.pmem.iter_mut().find(|p| p.id == pmem.id) {
            Some(existing) => *existing = pmem,
            None => {
                check_room("pmem", self.pmem.len())?;
                self.pmem.push(pmem);
            }
        }
        Ok(())
    }

    /// Adds a network interface, or replaces the one with its id.
    pub fn set_network_interface(&mut self, interface: NetworkInterfaceConfig) -> Result<(), ConfigError> {
        interface.check()?;
        let id = interface.iface_id.clone();
        for other in self.network_interfaces.iter().filter(|i| i.iface_id != id) {
            let other_id = || other.iface_id.clone();
            if let Some(mac) = interface.guest_mac.filter(|_| other.guest_mac == interface.guest_mac) {
                let other = other_id();
                return Err(ConfigError::MacInUse { id, mac, other });
            }
            if other.host_dev_name == interface.host_dev_name {
                let (name, other) = (interface.host_dev_name, other_id());
                return Err(ConfigError::HostDevInUse { id, name, other });
            }
        }
        match self.network_interfaces.iter_mut().find(|i| i.iface_id == id) {
            Some(existing) => *existing = interface,
            None => {
                check_room("network-interfaces", self.network_interfaces.len())?;
                self.network_interfaces.push(interface);
            }
        }
        Ok(())
    }

    /// Sets the vsock device.
    pub fn set_vsock(&mut self, mut vsock: VsockConfig) -> Result<(), ConfigError> {
        vsock.check()?;
        vsock.vsock_id = None;
        self.vsock = Some(vsock);
        Ok(())
    }

    /// Sets the entropy device.
    pub fn set_entropy(&mut self, entropy: EntropyConfig) {
        self.entropy = Some(entropy);
    }

    /// Sets the balloon.
    pub fn set_balloon(&mut self, balloon: BalloonConfig) -> Result<(), ConfigError> {
        self.check_balloon_amount(balloon.amount_mib)?;
        self.balloon = Some(balloon);
        Ok(())
    }

    /// Checks that a balloon of this size fits into memory.
    pub fn check_balloon_amount(&self, amount_mib: u32) -> Result<(), ConfigError> {
        let mem_mib = self.machine.mem_size_mib;
        if u64::from(amount_mib) > mem_mib {
            return Err(ConfigError::BalloonTooLarge { amount_mib, mem_mib });
        }
        Ok(())
    }

    /// Sets where the serial console goes.
    pub fn set_serial(&mut self, serial: SerialConfig) {
        self.serial = Some(serial);
    }

    /// Sets how the guest reaches its metadata. The interfaces must already be there.
    pub fn set_mmds(&mut self, mut mmds: MmdsConfig) -> Result<(), ConfigError> {
        mmds.check()?;
        mmds.ipv4_address = Some(mmds.address());
        for id in &mmds.network_interfaces {
            if !self.network_interfaces.iter().any(|i| i.iface_id == *id) {
                return Err(ConfigError::MmdsUnknownInterface { id: id.clone() });
            }
        }
        self.mmds = Some(mmds);
        Ok(())
    }

    /// Checks that nothing but `(section, id)` is the root device.
    fn check_single_root(&self, except: (&'static str, &str)) -> Result<(), ConfigError> {
        let drives = self.drives.iter().filter(|d| d.is_root_device);
        let pmem = self.pmem.iter().filter(|p| p.root_device);
        let roots = drives.map(|d| ("drives", d.drive_id.as_str()));
        let mut roots = roots.chain(pmem.map(|p| ("pmem", p.id.as_str())));
        match roots.find(|root| *root != except) {
            None => Ok(()),
            Some((section, existing)) => Err(ConfigError::SecondRootDevice {
                section: except.0,
                id: except.1.to_owned(),
                existing: format!("{section}/{existing}"),
            }),
        }
    }
}

/// Checks that one more device fits beside `count` of its kind.
fn check_room(section: &'static str, count: usize) -> Result<(), ConfigError> {
    let max = VmConfig::MAX_DEVICES;
    if count >= max {
        return Err(ConfigError::TooManyDevices { section, max });
    }
    Ok(())
}
