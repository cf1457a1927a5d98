//! What the options of `pulau microvm run` make of a microVM.

use std::path::PathBuf;
use std::str::FromStr;

use pulau_agent_protocol::boot::{BootOptions, Overlay};
use pulau_vmm::config::{
    BootSourceConfig, CacheType, ConfigError, DriveConfig, HugePages, MachineConfig, VmConfig,
};

use crate::microvm::{JailSpec, Network, Spec, furnish};
use crate::model::id;

/// The kernel's own part of the command line: a console for messages that matter, an immediate end on a
/// panic, and no probing for what is not there.
const BOOT_ARGS: &str =
    "console=ttyS0 quiet reboot=k panic=-1 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd";

#[derive(Debug, clap::Args)]
pub struct MachineArgs {
    /// Kernel: an ELF `vmlinux` or a bzImage.
    #[arg(long, value_name = "FILE", env = "PULAU_KERNEL")]
    kernel: PathBuf,
    /// Initial RAM disk, as ordinary distribution kernels need it.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Root file system image. The guest's writes go to memory and are gone afterwards; with `:rw` they go to
    /// the image, which must be a writable file system. Not needed with an initrd that holds everything.
    #[arg(long, value_name = "FILE[:rw]", env = "PULAU_ROOTFS", required_unless_present = "initrd")]
    rootfs: Option<DiskArg>,
    /// Further disks, in order: /dev/vdb, /dev/vdc, … (from /dev/vda without a rootfs). Writable unless `:ro`.
    #[arg(long = "drive", value_name = "FILE[:ro]")]
    drives: Vec<DiskArg>,
    /// Number of vCPUs, 1 to 32.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// Guest memory, such as 128M or 2G; without a unit, MiB.
    #[arg(long, short, value_name = "SIZE", default_value = "256M")]
    memory: MemoryArg,
    /// Back guest memory with the host's reserved 2 MiB pages.
    #[arg(long)]
    huge_pages: bool,
    /// Kernel command line, in place of Pulau's usual one; devices and the agent's options are still added.
    #[arg(long, value_name = "ARGS", default_value = BOOT_ARGS, hide_default_value = true)]
    boot_args: String,
    /// Name of the microVM and its hostname: letters, digits and hyphens. A random one if not given.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Run the VMM with this user's rights and without limits, for development. Needs only /dev/kvm.
    #[arg(long)]
    no_jail: bool,
    /// Run without a control group, on hosts that lack cgroup v2: nothing limits the VMM's memory.
    #[arg(long)]
    no_cgroup: bool,
}

/// A disk image and what follows its colon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    path: PathBuf,
    /// None if nothing was said.
    writable: Option<bool>,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, writable) = match text.rsplit_once(':') {
            Some((path, "ro")) => (path, Some(false)),
            Some((path, "rw")) => (path, Some(true)),
            _ => (text, None),
        };
        if path.is_empty() {
            return Err("the path is empty".into());
        }
        Ok(DiskArg { path: path.into(), writable })
    }
}

/// An amount of memory in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryArg(u64);

impl MemoryArg {
    pub fn mib(self) -> u64 {
        self.0
    }
}

impl FromStr for MemoryArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mb" | "mib" => 1,
            "g" | "gb" | "gib" => 1024,
            _ => return Err("expected a number and M or G, such as 256M".into()),
        };
        let number: u64 =
            number.parse().map_err(|_| "expected a number and M or G, such as 256M".to_owned())?;
        number.checked_mul(factor).map(MemoryArg).ok_or_else(|| "that is more memory than there is".into())
    }
}

impl MachineArgs {
    /// The microVM these options describe.
    ///
    /// # Errors
    ///
    /// A value that no microVM can have.
    pub fn spec(&self) -> Result<Spec, ConfigError> {
        let id = self.name.clone().unwrap_or_else(random_name);
        let root_writable = self.rootfs.as_ref().is_some_and(|root| root.writable == Some(true));
        let options = BootOptions {
            boot_timer: true,
            overlay: (self.rootfs.is_some() && !root_writable).then_some(Overlay::Tmpfs),
            hostname: Some(id.clone()),
            ..Default::default()
        };
        let mut vm = VmConfig::default();
        vm.set_machine(MachineConfig {
            vcpu_count: self.cpus,
            mem_size_mib: self.memory.0,
            huge_pages: if self.huge_pages { HugePages::Hugetlbfs2M } else { HugePages::None },
            ..Default::default()
        })?;
        vm.set_boot_source(BootSourceConfig {
            kernel_image_path: self.kernel.clone(),
            initrd_path: self.initrd.clone(),
            boot_args: Some(format!("{} {options}", self.boot_args)),
        })?;
        let disk = |id: &str, disk: &DiskArg, writable: bool| DriveConfig {
            drive_id: id.to_owned(),
            path_on_host: Some(disk.path.clone()),
            is_root_device: id == "root",
            is_read_only: Some(!writable),
            // What the guest has flushed is to outlive the host's power, too.
            cache_type: if writable { CacheType::Writeback } else { CacheType::Unsafe },
            ..Default::default()
        };
        if let Some(root) = &self.rootfs {
            vm.set_drive(disk("root", root, root_writable))?;
        }
        for (n, drive) in self.drives.iter().enumerate() {
            vm.set_drive(disk(&format!("drive{}", n + 1), drive, drive.writable.unwrap_or(true)))?;
        }
        furnish(&mut vm)?;
        let jail = (!self.no_jail).then_some(JailSpec { network: Network::None, cgroup: !self.no_cgroup });
        Ok(Spec { id, vm, jail, boot_timer: true, ..Default::default() })
    }
}

/// A name nobody else is likely to use at the same time.
fn random_name() -> String {
    format!("vm-{}", id::hex(&id::random::<4>()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        machine: MachineArgs,
    }

    fn spec(options: &str) -> Result<Spec, ConfigError> {
        spec_with_root("/r", options)
    }

    fn spec_with_root(rootfs: &str, options: &str) -> Result<Spec, ConfigError> {
        let line = ["x", "--kernel", "/k", "--rootfs", rootfs].into_iter().chain(options.split_whitespace());
        Line::try_parse_from(line).unwrap_or_else(|e| panic!("{e}")).machine.spec()
    }

    #[test]
    fn understands_memory() {
        assert_eq!("128".parse(), Ok(MemoryArg(128)));
        assert_eq!("128M".parse(), Ok(MemoryArg(128)));
        assert_eq!("2GiB".parse(), Ok(MemoryArg(2048)));
        for bad in ["", "M", "1T", "-1", "1.5G", "99999999999999999999", "18014398509481984G"] {
            assert!(bad.parse::<MemoryArg>().is_err(), "{bad}");
        }
    }

    #[test]
    fn understands_disks() {
        let disk = |text: &str| text.parse::<DiskArg>().map(|d| (d.path, d.writable));
        assert_eq!(disk("/a.img"), Ok(("/a.img".into(), None)));
        assert_eq!(disk("/a.img:ro"), Ok(("/a.img".into(), Some(false))));
        assert_eq!(disk("/a:b.img:rw"), Ok(("/a:b.img".into(), Some(true))));
        assert_eq!(disk("/a:b.img"), Ok(("/a:b.img".into(), None)), "a colon in the name is a name's");
        assert!(disk(":ro").is_err());
    }

    #[test]
    fn the_root_is_read_only_below_memory_unless_asked_otherwise() {
        let plain = spec("--drive /d --drive /e:ro").unwrap();
        let read_only: Vec<_> = plain.vm.drives.iter().map(|d| d.is_read_only).collect();
        assert_eq!(read_only, [Some(true), Some(false), Some(true)]);
        let flushed: Vec<_> = plain.vm.drives.iter().map(|d| d.cache_type == CacheType::Writeback).collect();
        assert_eq!(flushed, [false, true, false]);
        assert!(plain.vm.boot_source.unwrap().boot_args().contains("pulau.overlay=tmpfs"));

        let writable = spec_with_root("/r:rw", "").unwrap();
        assert_eq!(writable.vm.drives[0].is_read_only, Some(false));
        assert!(!writable.vm.boot_source.unwrap().boot_args().contains("overlay"));
    }

    #[test]
    fn a_jail_is_what_one_gets_without_asking() {
        let jail = |options| spec(options).unwrap().jail;
        assert!(jail("").is_some_and(|jail| jail.cgroup && jail.network == Network::None));
        assert!(jail("--no-cgroup").is_some_and(|jail| !jail.cgroup));
        assert!(jail("--no-jail").is_none());
    }

    #[test]
    fn names_are_unlike_each_other_and_impossible_values_are_refused() {
        assert_ne!(spec("").unwrap().id, spec("").unwrap().id);
        assert_eq!(spec("--name web-1").unwrap().id, "web-1");
        assert!(spec("--cpus 33").unwrap_err().to_string().contains("33"));
        assert!(spec("--memory 0").unwrap_err().to_string().contains("mem_size_mib"));
    }
}
