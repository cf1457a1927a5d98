//! From an instance's record to the microVM it is.

use std::path::PathBuf;

use pulau_agent_protocol::boot::{BootOptions, Init, Overlay};
use pulau_agent_protocol::network::NetworkConfig;
use pulau_vmm::config::{
    BalloonConfig, BootSourceConfig, CacheType, ConfigError, DriveConfig, MachineConfig, MmdsConfig,
    MmdsVersion, NetworkInterfaceConfig, VmConfig,
};

use super::error::Error;
use super::host::Host;
use super::{metadata, volumes};
use crate::image::{Manifest, Root};
use crate::microvm::{Console, ConsoleLog, JailSpec, Network as Namespace, Spec, furnish};
use crate::model::{Instance, Kind, Network};
use crate::volume::Content;

/// A console's file is set aside when it is larger.
const CONSOLE_LOG_BYTES: u64 = 8 << 20;
/// The kernel's own part of the command line.
const BOOT_ARGS: &str =
    "console=ttyS0 reboot=k panic=-1 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd";

/// The name of the microVM that an instance's boot of this number is.
pub fn machine_id(instance: &str, generation: u64) -> String {
    format!("{instance}-{generation}")
}

/// The instance and the number of the boot that a microVM's name stands for.
pub fn of_machine(id: &str) -> Option<(&str, u64)> {
    let (instance, generation) = id.rsplit_once('-')?;
    Some((instance, generation.parse().ok()?))
}

/// The file an instance's console is kept in.
pub fn console_log(host: &Host, instance: &str) -> ConsoleLog {
    ConsoleLog { path: host.logs.join(format!("{instance}.console")), max_bytes: CONSOLE_LOG_BYTES }
}

/// Makes what an instance's boot needs of disks, unless it is there already. Blocks.
pub fn make_disks(host: &Host, instance: &Instance) -> Result<(), Error> {
    for volume in volumes::data_volumes(&host.records.read(), instance) {
        // Unless it was to grow, and the daemon died at that, it is so large already.
        host.volumes.grow(&volume.id, volume.size)?;
    }
    let manifest = manifest(host, instance)?;
    let size = root_size(host, instance)?;
    if host.volumes.exists(&instance.root_volume)? {
        return Ok(host.volumes.grow(&instance.root_volume, size)?);
    }
    let blobs = host.images.blobs();
    let path;
    let content = match &manifest.root {
        Root::Erofs { layer: None, .. } => Content::Ext4,
        Root::Erofs { layer: Some(layer), .. } => {
            path = blobs.path(&layer.digest);
            Content::Layer(&path)
        }
        Root::Disk { blob, .. } => {
            path = blobs.path(&blob.digest);
            Content::Disk(&path)
        }
    };
    Ok(host.volumes.create(&instance.root_volume, content, size, &crate::files::Task::quiet())?)
}

fn manifest(host: &Host, instance: &Instance) -> Result<Manifest, Error> {
    let image = host.records.get::<crate::model::Image>(&instance.image_id);
    let manifest = image.and_then(|image| image.manifest.clone());
    manifest.ok_or_else(|| Error::not_found(Kind::Image, &instance.image_id))
}

fn root_size(host: &Host, instance: &Instance) -> Result<u64, Error> {
    let volume = host.records.get::<crate::model::Volume>(&instance.root_volume);
    Ok(volume.ok_or_else(|| Error::not_found(Kind::Volume, &instance.root_volume))?.size)
}

/// The microVM that an instance is to be.
pub fn spec(host: &Host, instance: &Instance) -> Result<Spec, Error> {
    let manifest = manifest(host, instance)?;
    let vm = vm(host, instance, &manifest).map_err(|error| Error::Internal(error.to_string()))?;
    Ok(Spec {
        id: machine_id(&instance.id, instance.generation),
        vm,
        jail: host.jailed.then_some(JailSpec { network: Namespace::None, cgroup: true }),
        boot_timer: true,
        console: Console { log: Some(console_log(host, &instance.id)), attachable: true },
        metadata: host.wiring.is_connected().then(|| metadata::document(&host.records.read(), instance)),
    })
}

fn vm(host: &Host, instance: &Instance, manifest: &Manifest) -> Result<VmConfig, ConfigError> {
    let blobs = host.images.blobs();
    let network = host.records.get::<Network>(&instance.interface.network_id);
    let network = network.filter(|_| host.wiring.is_connected());
    let shared = matches!(manifest.root, Root::Erofs { .. });
    let image_args = manifest.boot_args();
    let options = BootOptions {
        boot_timer: true,
        // The image's word counts, if it has one.
        init: (!image_args.contains("pulau.init=")).then_some(Init::Auto),
        // Without a network there is no metadata to take at the first boot.
        instance: network.is_some().then(|| instance.id.clone()),
        overlay: shared.then(|| Overlay::Device("/dev/vdb".into())),
        hostname: Some(instance.hostname.clone()),
        network: network.iter().map(|network| address(instance, network)).collect(),
        ..Default::default()
    };
    let mut vm = VmConfig::default();
    vm.set_machine(MachineConfig {
        vcpu_count: instance.size.vcpus,
        mem_size_mib: instance.size.memory_mib,
        ..Default::default()
    })?;
    vm.set_boot_source(BootSourceConfig {
        kernel_image_path: blobs.path(&manifest.kernel.digest),
        initrd_path: manifest.initrd.as_ref().map(|initrd| blobs.path(&initrd.digest)),
        boot_args: Some(format!("{BOOT_ARGS} {image_args} {options}")),
    })?;
    // What the guest has flushed is on the host's disk; what it cannot write to has nothing to flush.
    let disk = |id: &str, path: PathBuf, root: bool, read_only: bool| DriveConfig {
        drive_id: id.to_owned(),
        path_on_host: Some(path),
        is_root_device: root,
        is_read_only: Some(read_only),
        cache_type: if read_only { CacheType::Unsafe } else { CacheType::Writeback },
        ..Default::default()
    };
    let own = host.volumes.path(&instance.root_volume).unwrap_or_default();
    match &manifest.root {
        Root::Erofs { blob, .. } => {
            vm.set_drive(disk("image", blobs.path(&blob.digest), true, true))?;
            vm.set_drive(disk("root", own, false, false))?;
        }
        Root::Disk { .. } => vm.set_drive(disk("root", own, true, false))?,
    }
    for volume in volumes::data_volumes(&host.records.read(), instance) {
        let path = host.volumes.path(&volume.id).unwrap_or_default();
        vm.set_drive(disk(&volume.serial(), path, false, false))?;
    }
    if network.is_some() {
        vm.set_network_interface(NetworkInterfaceConfig {
            iface_id: "eth0".into(),
            host_dev_name: instance.interface.tap.clone(),
            guest_mac: Some(instance.interface.mac),
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        })?;
        vm.set_mmds(MmdsConfig {
            version: MmdsVersion::V2,
            network_interfaces: vec!["eth0".into()],
            ipv4_address: None,
            imds_compat: true,
        })?;
    }
    furnish(&mut vm)?;
    vm.set_balloon(BalloonConfig {
        deflate_on_oom: true,
        stats_polling_interval_s: 10,
        free_page_reporting: true,
        ..Default::default()
    })?;
    Ok(vm)
}

/// The guest's end of its interface, for guests whose first process is our agent.
fn address(instance: &Instance, network: &Network) -> NetworkConfig {
    let address = format!("{}/{}", instance.interface.private_address, network.subnet.prefix_len());
    NetworkConfig {
        addresses: address.parse().into_iter().collect(),
        gateways: vec![network.gateway.into()],
        dns: vec![network.gateway.into()],
        search: vec![network.domain()],
        ..Default::default()
    }
}
