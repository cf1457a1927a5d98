//! The machine's virtio devices: made from the configuration, in the order in which the guest finds them.

use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryBackend;

use super::{BuildError, Placer, random};
use crate::arch::{cpu, layout};
use crate::config::VmConfig;
use crate::event_loop::lock;
use crate::mmds::MmdsNetwork;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, BlockError};
use crate::virtio::net::{Net, NetError};
use crate::virtio::pmem::{Pmem, PmemError};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};

/// Why a device could not be made. The message names the device and the field.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The host gave no descriptors for a device.
    #[error("{0}: {1}")]
    Host(&'static str, #[source] io::Error),
    /// See [`BlockError`].
    #[error(transparent)]
    Block(#[from] BlockError),
    /// See [`PmemError`].
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// Persistent memory would end above what the guest's processor can address.
    #[error("pmem: device {id}: path_on_host: {mib} MiB do not fit: the guest's addresses end at {limit:#x}")]
    PmemTooLarge {
        /// The device.
        id: String,
        /// Its size in MiB.
        mib: u64,
        /// The first address that is too high.
        limit: u64,
    },
    /// See [`NetError`].
    #[error(transparent)]
    Net(#[from] NetError),
    /// See [`VsockError`].
    #[error(transparent)]
    Vsock(#[from] VsockError),
}

/// Handles by which running devices are adjusted.
#[derive(Default)]
pub struct Devices {
    all: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    drives: Vec<Arc<Mutex<Block>>>,
    pmem: Vec<Arc<Mutex<Pmem>>>,
    networks: Vec<Arc<Mutex<Net>>>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
}

impl Devices {
    fn add(&mut self, placer: &mut Placer, device: Arc<Mutex<dyn VirtioDevice>>) -> Result<(), BuildError> {
        placer.place(device.clone())?;
        self.all.push(device);
        Ok(())
    }

    /// Stops every device.
    pub fn pause(&self) {
        self.all.iter().for_each(|d| lock(d).pause());
    }

    /// Lets every device go on.
    pub fn resume(&self) {
        self.all.iter().for_each(|d| lock(d).resume());
    }

    /// The drive with this id.
    pub fn drive(&self, id: &str) -> Option<&Arc<Mutex<Block>>> {
        self.drives.iter().find(|d| lock(d).id() == id)
    }

    /// The network interface with this id.
    pub fn network(&self, id: &str) -> Option<&Arc<Mutex<Net>>> {
        self.networks.iter().find(|n| lock(n).id() == id)
    }

    /// The persistent memory device with this id.
    pub fn pmem(&self, id: &str) -> Option<&Arc<Mutex<Pmem>>> {
        self.pmem.iter().find(|p| lock(p).id() == id)
    }

    /// The vsock device.
    pub fn vsock(&self) -> Option<&Arc<Mutex<Vsock>>> {
        self.vsock.as_ref()
    }

    /// The balloon.
    pub fn balloon(&self) -> Option<&Arc<Mutex<Balloon>>> {
        self.balloon.as_ref()
    }
}

/// Persistent memory starts at multiples of this, above all other memory: the unit in which Linux adds
/// memory, so that none has to share one.
const PMEM_SECTION: u64 = 128 << 20;

/// Makes and places every device of `config`.
pub(super) fn create(config: &VmConfig, placer: &mut Placer) -> Result<Devices, BuildError> {
    let mut devices = Devices::default();
    for drive in &config.drives {
        let device = Arc::new(Mutex::new(Block::new(drive).map_err(DeviceError::from)?));
        devices.add(placer, device.clone())?;
        devices.drives.push(device);
    }
    let mut address = placer.memory.last_addr().0.max(layout::HIGH_MEMORY_START);
    let limit = cpu::physical_address_limit(placer.vm.cpuid());
    for pmem in &config.pmem {
        address = address.next_multiple_of(PMEM_SECTION);
        let mut device = Pmem::new(pmem).map_err(DeviceError::from)?;
        device.place(address);
        let mapping = device.mapping();
        if address.checked_add(mapping.len()).is_none_or(|end| end > limit) {
            let (id, mib) = (pmem.id.clone(), mapping.len() >> 20);
            return Err(DeviceError::PmemTooLarge { id, mib, limit }.into());
        }
        // SAFETY: `Devices` keeps the device, and with it the mapping, and `Machine` drops its vCPUs and
        // its VM before them.
        unsafe { placer.vm.add_slot(address, mapping.len(), mapping.address(), mapping.read_only()) }?;
        address += mapping.len();
        let device = Arc::new(Mutex::new(device));
        devices.add(placer, device.clone())?;
        devices.pmem.push(device);
    }
    for interface in &config.network_interfaces {
        let mmds = match &config.mmds {
            Some(mmds) if mmds.network_interfaces.contains(&interface.iface_id) => {
                let mut seed = [0; 8];
                random(&mut seed).map_err(|e| DeviceError::Host("random numbers", e))?;
                Some(MmdsNetwork::new(mmds.address(), placer.mmds.clone(), u64::from_ne_bytes(seed)))
            }
            _ => None,
        };
        let device = Arc::new(Mutex::new(Net::new(interface, mmds).map_err(DeviceError::from)?));
        devices.add(placer, device.clone())?;
        devices.networks.push(device);
    }
    if let Some(vsock) = &config.vsock {
        let device = Vsock::new(vsock.guest_cid.into(), &vsock.uds_path).map_err(DeviceError::from)?;
        let device = Arc::new(Mutex::new(device));
        devices.add(placer, device.clone())?;
        devices.vsock = Some(device);
    }
    if let Some(entropy) = &config.entropy {
        let device = Rng::new(entropy.rate_limiter.as_ref()).map_err(|e| DeviceError::Host("entropy", e))?;
        devices.add(placer, Arc::new(Mutex::new(device)))?;
    }
    if let Some(balloon) = &config.balloon {
        let device = Balloon::new(balloon).map_err(|e| DeviceError::Host("balloon", e))?;
        let device = Arc::new(Mutex::new(device));
        devices.add(placer, device.clone())?;
        devices.balloon = Some(device);
    }
    Ok(devices)
}
