use super::*;

fn machine(vcpu_count: u8, mem_size_mib: u64) -> MachineConfig {
    MachineConfig { vcpu_count, mem_size_mib, ..Default::default() }
}

fn drive(id: &str, root: bool) -> DriveConfig {
    DriveConfig {
        drive_id: id.into(),
        is_root_device: root,
        path_on_host: Some("/disk".into()),
        ..Default::default()
    }
}

fn interface(id: &str, tap: &str, mac: Option<[u8; 6]>) -> NetworkInterfaceConfig {
    NetworkInterfaceConfig {
        iface_id: id.into(),
        host_dev_name: tap.into(),
        guest_mac: mac.map(MacAddr),
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    }
}

fn pmem(id: &str, root: bool) -> PmemConfig {
    PmemConfig { id: id.into(), path_on_host: "/p".into(), root_device: root, ..Default::default() }
}

/// Tries a change that is refused; its message, after a look that nothing changed.
#[track_caller]
fn refused(config: &mut VmConfig, change: impl FnOnce(&mut VmConfig) -> Result<(), ConfigError>) -> String {
    let before = config.clone();
    let error = change(config).unwrap_err().to_string();
    assert_eq!(*config, before);
    error
}

#[test]
fn vcpus_and_memory_have_limits() {
    let mut config = VmConfig::default();
    for (count, mib) in [(1, 1), (32, 1 << 20), (3, 100)] {
        config.set_machine(machine(count, mib)).unwrap();
    }
    for count in [0, 33, 255] {
        let error = refused(&mut config, |c| c.set_machine(machine(count, 128)));
        assert_eq!(error, format!("machine-config: vcpu_count must be between 1 and 32, not {count}"));
    }
    for mib in [0, (1 << 20) + 1, u64::MAX] {
        let error = refused(&mut config, |c| c.set_machine(machine(1, mib)));
        assert!(error.starts_with("machine-config: mem_size_mib must be between 1 and 1048576"), "{error}");
    }
    let smt = |count| MachineConfig { smt: true, ..machine(count, 128) };
    config.set_machine(smt(1)).unwrap();
    config.set_machine(smt(4)).unwrap();
    assert!(refused(&mut config, |c| c.set_machine(smt(3))).contains("vcpu_count"));
    for huge_pages in [HugePages::Transparent, HugePages::Hugetlbfs2M] {
        config.set_machine(MachineConfig { huge_pages, ..machine(1, 2) }).unwrap();
        let odd = MachineConfig { huge_pages, ..machine(1, 3) };
        assert!(refused(&mut config, |c| c.set_machine(odd)).contains("mem_size_mib"));
    }
    let template = MachineConfig { cpu_template: Some(CpuTemplate::T2), ..machine(1, 2) };
    assert!(refused(&mut config, |c| c.set_machine(template)).contains("cpu_template T2"));
}

#[test]
fn balloon_and_memory_agree_whichever_comes_first() {
    let balloon = |amount_mib| BalloonConfig { amount_mib, ..Default::default() };
    let mut config = VmConfig::default();
    assert!(refused(&mut config, |c| c.set_balloon(balloon(129))).contains("amount_mib 129"));
    config.set_balloon(balloon(128)).unwrap();
    let error = refused(&mut config, |c| c.set_machine(machine(1, 127)));
    assert!(error.contains("mem_size_mib 127") && error.contains("amount_mib 128"), "{error}");
}

#[test]
fn boot_sources_are_checked() {
    let source = |args: &str| BootSourceConfig {
        kernel_image_path: "k".into(),
        initrd_path: None,
        boot_args: Some(args.into()),
    };
    let mut config = VmConfig::default();
    assert_eq!(config.check_bootable(), Err(ConfigError::NoBootSource));
    config.set_boot_source(source(&"a".repeat(2047))).unwrap();
    assert!(config.check_bootable().is_ok());
    assert!(refused(&mut config, |c| c.set_boot_source(source(&"a".repeat(2048)))).contains("2048 bytes"));
    for args in ["a\nb", "a\0b", "ä", "\u{7f}"] {
        assert!(refused(&mut config, |c| c.set_boot_source(source(args))).contains("boot_args"));
    }
    let empty = BootSourceConfig::default();
    assert!(refused(&mut config, |c| c.set_boot_source(empty)).contains("kernel_image_path is empty"));
    let empty = BootSourceConfig { initrd_path: Some("".into()), ..source("") };
    assert!(refused(&mut config, |c| c.set_boot_source(empty)).contains("initrd_path is empty"));
    let default = BootSourceConfig { boot_args: None, ..source("") };
    assert!(default.check().is_ok() && default.boot_args().starts_with("reboot=k panic=1"));
}

#[test]
fn drives_are_checked() {
    let mut config = VmConfig::default();
    for id in ["", "a-b", "a b", "ä", "a/b"] {
        let error = refused(&mut config, |c| c.set_drive(drive(id, false)));
        assert!(error.starts_with("drives: drive_id"), "{error}");
    }
    let long = "a".repeat(65);
    assert!(refused(&mut config, |c| c.set_drive(drive(&long, false))).contains("65 characters"));
    let bad = |change: fn(&mut DriveConfig)| {
        let mut drive = drive("a", true);
        change(&mut drive);
        drive.check().unwrap_err().to_string()
    };
    assert!(bad(|d| d.path_on_host = None).contains("drive a: path_on_host is missing"));
    assert!(bad(|d| d.path_on_host = Some("".into())).contains("path_on_host"));
    assert!(bad(|d| d.socket = Some("s".into())).contains("socket"));
    for partuuid in ["", "x y", "a b", "g"] {
        let drive = DriveConfig { partuuid: Some(partuuid.into()), ..drive("a", true) };
        assert!(drive.check().unwrap_err().to_string().contains("partuuid"));
    }
    let good = DriveConfig { partuuid: Some("0eaa91a0-01".into()), ..drive("a", true) };
    good.check().unwrap();
}

#[test]
fn there_is_one_root_device_and_it_comes_first() {
    let ids = |c: &VmConfig| c.drives.iter().map(|d| d.drive_id.clone()).collect::<Vec<_>>().join(" ");
    let mut config = VmConfig::default();
    for (id, root, order) in [
        ("a", false, "a"),
        ("b", false, "a b"),
        ("root", true, "root a b"),
        ("c", false, "root a b c"),
        ("root", true, "root a b c"),
        ("a", false, "root a b c"),
    ] {
        config.set_drive(drive(id, root)).unwrap();
        assert_eq!(ids(&config), order);
    }
    for id in ["b", "new"] {
        let error = refused(&mut config, |c| c.set_drive(drive(id, true)));
        assert_eq!(error, format!("drives: {id} cannot be the root device: drives/root already is"));
    }
    let error = refused(&mut config, |c| c.set_pmem(pmem("p", true)));
    assert_eq!(error, "pmem: p cannot be the root device: drives/root already is");
    // Another one can become it once the first is not.
    config.set_drive(drive("root", false)).unwrap();
    config.set_drive(drive("b", true)).unwrap();
    assert_eq!(ids(&config), "b root a c");
    config.set_drive(drive("b", false)).unwrap();
    config.set_pmem(pmem("p", true)).unwrap();
    config.set_pmem(pmem("p", true)).unwrap();
    assert!(refused(&mut config, |c| c.set_pmem(pmem("q", true))).contains("pmem/p already is"));
    // Ids of drives and of pmem devices are apart.
    assert!(refused(&mut config, |c| c.set_drive(drive("p", true))).contains("pmem/p already is"));
    let empty = PmemConfig { id: "q".into(), ..Default::default() };
    assert!(refused(&mut config, |c| c.set_pmem(empty)).contains("path_on_host is empty"));
}

#[test]
fn there_is_room_for_32_devices_of_a_kind() {
    let mut config = VmConfig::default();
    for n in 0..32 {
        config.set_drive(drive(&format!("d{n}"), false)).unwrap();
        config.set_pmem(pmem(&format!("p{n}"), false)).unwrap();
        config.set_network_interface(interface(&format!("n{n}"), &format!("t{n}"), None)).unwrap();
    }
    assert!(refused(&mut config, |c| c.set_drive(drive("x", false))).contains("at most 32"));
    assert!(refused(&mut config, |c| c.set_pmem(pmem("x", false))).contains("at most 32"));
    assert!(
        refused(&mut config, |c| c.set_network_interface(interface("x", "x", None))).contains("at most 32")
    );
    config.set_drive(drive("d31", false)).unwrap();
}

#[test]
fn interfaces_are_checked() {
    let mut config = VmConfig::default();
    config.set_network_interface(interface("a", "tap0", Some([2, 0, 0, 0, 0, 1]))).unwrap();
    for name in ["", "0123456789abcdef", "a/b", "a b", "a\0"] {
        let error = refused(&mut config, |c| c.set_network_interface(interface("b", name, None)));
        assert!(error.contains("interface b: host_dev_name"), "{error}");
    }
    let same_mac = interface("b", "tap1", Some([2, 0, 0, 0, 0, 1]));
    let error = refused(&mut config, |c| c.set_network_interface(same_mac));
    assert_eq!(error, "network-interfaces: interface b: guest_mac 02:00:00:00:00:01 is already used by a");
    let error = refused(&mut config, |c| c.set_network_interface(interface("b", "tap0", None)));
    assert!(error.contains("host_dev_name tap0 is already used by a"), "{error}");
    let multicast = interface("b", "tap1", Some([1, 0, 0, 0, 0, 1]));
    assert!(refused(&mut config, |c| c.set_network_interface(multicast)).contains("multicast"));
    for (mtu, good) in [(67, false), (68, true), (65_535, true), (0, false)] {
        let with_mtu = NetworkInterfaceConfig { mtu: Some(mtu), ..interface("b", "tap1", None) };
        assert_eq!(with_mtu.check().is_ok(), good, "{mtu}");
    }
    // No address and no address are no clash.
    config.set_network_interface(interface("b", "tap1", None)).unwrap();
    config.set_network_interface(interface("c", "tap2", None)).unwrap();
    config.set_network_interface(interface("a", "tap3", Some([2, 0, 0, 0, 0, 1]))).unwrap();
    let order: Vec<_> = config.network_interfaces.iter().map(|i| i.iface_id.as_str()).collect();
    assert_eq!(order, ["a", "b", "c"]);
}

#[test]
fn mac_addresses_are_six_pairs() {
    let mac: MacAddr = "0A:1b:2C:3d:4E:5f".parse().unwrap();
    assert_eq!(mac.to_string(), "0a:1b:2c:3d:4e:5f");
    for bad in [
        "",
        "0a:1b:2c:3d:4e",
        "0a:1b:2c:3d:4e:5f:",
        "0a:1b:2c:3d:4e:5f:60",
        "0a-1b-2c-3d-4e-5f",
        "a:1b:2c:3d:4e:5f",
        "0a:1b:2c:3d:4e:+5",
        "0a:1b:2c:3d:4e:gg",
    ] {
        assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
    }
}

#[test]
fn vsock_is_checked() {
    let vsock = |guest_cid, path: &str| VsockConfig { vsock_id: None, guest_cid, uds_path: path.into() };
    for cid in [0, 1, 2, u32::MAX] {
        assert_eq!(vsock(cid, "v").check(), Err(ConfigError::VsockCid { cid }));
    }
    vsock(3, "v").check().unwrap();
    vsock(u32::MAX - 1, &"v".repeat(96)).check().unwrap();
    assert_eq!(vsock(3, "").check(), Err(ConfigError::VsockEmptyPath));
    let error = vsock(3, &"v".repeat(97)).check().unwrap_err();
    assert_eq!(
        error.to_string(),
        "vsock: uds_path is 97 bytes long; with the port suffix a socket path holds 96"
    );
}

#[test]
fn metadata_needs_interfaces_and_a_link_local_address() {
    let mmds = |address: Option<[u8; 4]>, ids: &[&str]| MmdsConfig {
        network_interfaces: ids.iter().map(|id| (*id).to_owned()).collect(),
        ipv4_address: address.map(Into::into),
        ..Default::default()
    };
    let mut config = VmConfig::default();
    config.set_network_interface(interface("eth0", "tap0", None)).unwrap();
    assert!(refused(&mut config, |c| c.set_mmds(mmds(None, &[]))).contains("network_interfaces is empty"));
    assert!(refused(&mut config, |c| c.set_mmds(mmds(None, &["eth0", "eth1"]))).contains("\"eth1\""));
    for bad in [[169, 254, 0, 5], [169, 254, 255, 5], [169, 253, 1, 1], [10, 0, 0, 1]] {
        let error = refused(&mut config, |c| c.set_mmds(mmds(Some(bad), &["eth0"])));
        assert!(error.contains("ipv4_address"), "{error}");
    }
    config.set_mmds(mmds(Some([169, 254, 170, 2]), &["eth0"])).unwrap();
    config.set_mmds(mmds(None, &["eth0"])).unwrap();
    assert_eq!(config.mmds.unwrap().address().to_string(), "169.254.169.254");
}

#[test]
fn cpu_registers_are_given_once() {
    let msr = |addr| MsrModifier { addr, bitmap: BitPattern::default() };
    let leaf = |leaf, registers: &[CpuidRegister]| CpuidLeafModifier {
        leaf,
        subleaf: 0,
        flags: 0,
        modifiers: registers
            .iter()
            .map(|&register| CpuidRegisterModifier { register, bitmap: BitPattern::default() })
            .collect(),
    };
    use CpuidRegister::{Eax, Ebx};
    let cpu =
        |cpuid_modifiers, msr_modifiers| CpuConfig { cpuid_modifiers, msr_modifiers, ..Default::default() };
    cpu(vec![leaf(1, &[Eax, Ebx]), leaf(2, &[Eax])], vec![msr(1), msr(2)]).check().unwrap();
    for (bad, message) in [
        (cpu(vec![leaf(1, &[]), leaf(1, &[])], vec![]), "leaf 0x1 subleaf 0x0 twice"),
        (cpu(vec![leaf(7, &[Eax, Ebx, Eax])], vec![]), "register Eax of leaf 0x7 twice"),
        (cpu(vec![], vec![msr(16), msr(16)]), "address 0x10 twice"),
    ] {
        assert!(bad.check().unwrap_err().to_string().ends_with(message));
    }
    let pattern = BitPattern::<64> { mask: 0b110, value: 0b100 };
    assert_eq!(pattern.apply(0b011), 0b101);
}

#[test]
fn defaults_are_shown_where_firecracker_shows_them() {
    let mut config = VmConfig::default();
    config.set_drive(drive("d", false)).unwrap();
    assert_eq!(
        (config.drives[0].is_read_only, config.drives[0].io_engine),
        (Some(false), Some(IoEngine::Sync))
    );
    let vsock = VsockConfig { vsock_id: Some("v".into()), guest_cid: 3, uds_path: "v".into() };
    config.set_vsock(vsock).unwrap();
    assert_eq!(config.vsock.unwrap().vsock_id, None);
}

#[test]
fn instance_ids_are_checked() {
    let longest = "a".repeat(64);
    for good in ["a", "0-9-a-Z", DEFAULT_INSTANCE_ID, &longest] {
        check_instance_id(good).unwrap();
    }
    let too_long = "a".repeat(65);
    for bad in ["", "a_b", "a b", "ä", "../x", &too_long] {
        assert!(check_instance_id(bad).is_err(), "{bad}");
    }
}

#[test]
fn rate_limiter_updates_merge() {
    let bucket = |size| Some(TokenBucketConfig { size, refill_time: 1, one_time_burst: None });
    let limiter = |bandwidth, ops| Some(RateLimiterConfig { bandwidth, ops });
    for (old, update, new) in [
        (None, None, None),
        (None, limiter(bucket(1), None), limiter(bucket(1), None)),
        (limiter(bucket(1), None), None, limiter(bucket(1), None)),
        (limiter(bucket(1), bucket(2)), limiter(None, bucket(3)), limiter(bucket(1), bucket(3))),
        (limiter(bucket(1), bucket(2)), limiter(bucket(0), None), limiter(None, bucket(2))),
        (limiter(bucket(1), None), limiter(bucket(0), None), None),
    ] {
        assert_eq!(RateLimiterConfig::merge(&old, &update), new, "{old:?} {update:?}");
    }
}

/// What the API writes it also reads, and a client sends what the API takes.
#[test]
fn a_whole_configuration_survives_json() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "/k", "boot_args": "a", "initrd_path": "/i"},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 512, "smt": false},
        "cpu-config": {"msr_modifiers": [{"addr": "0x10", "bitmap": "0b1x0"}], "kvm_capabilities": ["!1"],
            "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
                "modifiers": [{"register": "ecx", "bitmap": "0b1"}]}]},
        "drives": [{"drive_id": "r", "is_root_device": true, "path_on_host": "/d", "io_engine": "Async"}],
        "network-interfaces": [{"iface_id": "e", "host_dev_name": "t", "guest_mac": "06:00:00:00:00:01"}],
        "vsock": {"guest_cid": 3, "uds_path": "/v"},
        "balloon": {"amount_mib": 1, "deflate_on_oom": false},
        "entropy": {"rate_limiter": {"ops": {"size": 1, "refill_time": 1}}},
        "pmem": [{"id": "p", "path_on_host": "/p"}],
        "mmds-config": {"network_interfaces": ["e"], "ipv4_address": "169.254.1.1"},
        "memory-hotplug": null,
        "serial": {"serial_out_path": "/s"},
        "logger": {"level": "warn"},
        "metrics": {"metrics_path": "/m"}
    }"#;
    let full: FullVmConfig = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::from_str::<FullVmConfig>(&serde_json::to_string(&full).unwrap()).unwrap(), full);
    let config = VmConfig::try_from(full.clone()).unwrap();
    let back = FullVmConfig::from(&config);
    let mut shown = FullVmConfig { logger: None, metrics: None, ..full };
    shown.drives[0].is_read_only = Some(false);
    assert_eq!(back, shown);
    assert_eq!(VmConfig::try_from(back).unwrap(), config);
    let full = FullVmConfig::from(&config);
    let mut unknown = FullVmConfig { unknown: [("a_b".into(), serde_json::Value::Null)].into(), ..full };
    assert_eq!(VmConfig::try_from(unknown.clone()).unwrap(), config);
    assert!(!serde_json::to_string(&unknown).unwrap().contains("a_b"));
    let text = r#"{"a_b": null, "boot_source": {}}"#;
    unknown.unknown = serde_json::from_str::<FullVmConfig>(text).unwrap().unknown;
    let error = VmConfig::try_from(unknown).unwrap_err().to_string();
    assert_eq!(error, "unknown field `boot_source`");
    let hotplug = serde_json::from_str::<FullVmConfig>(r#"{"memory-hotplug": {}}"#).unwrap_err();
    assert!(hotplug.to_string().contains("memory-hotplug is not supported"), "{hotplug}");
    let none: FullVmConfig = serde_json::from_str("{}").unwrap();
    assert!(VmConfig::try_from(none).unwrap_err().to_string().contains("kernel_image_path"));
}
