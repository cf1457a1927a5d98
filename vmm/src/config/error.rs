//! Why a configuration was refused.

/// A configuration that cannot be used. The message names the section (as in the API path or the
/// configuration file) and the field at fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("machine-config: vcpu_count must be between 1 and {max}, not {count}", max = super::MachineConfig::MAX_VCPUS)]
    VcpuCount { count: u8 },

    #[error("machine-config: vcpu_count must be 1 or an even number when smt is true, not {count}")]
    VcpuCountOdd { count: u8 },

    #[error("machine-config: mem_size_mib must be between 1 and {max}, not {mib}", max = super::MachineConfig::MAX_MEM_SIZE_MIB)]
    MemSize { mib: u64 },

    #[error("machine-config: mem_size_mib must be a multiple of 2 with huge_pages, not {mib}")]
    MemSizeOdd { mib: u64 },

    #[error("machine-config: mem_size_mib {mib} is smaller than the balloon's amount_mib {balloon_mib}")]
    MemSizeBelowBalloon { mib: u64, balloon_mib: u32 },

    #[error("machine-config: cpu_template {template} is not supported; set CPU features with cpu-config")]
    CpuTemplate { template: &'static str },

    #[error("boot-source: no boot source was configured (kernel_image_path)")]
    NoBootSource,

    #[error("boot-source: {field} is empty")]
    BootSourceEmptyPath { field: &'static str },

    #[error("boot-source: boot_args is {len} bytes long; the limit is {max}", max = super::BootSourceConfig::MAX_BOOT_ARGS)]
    BootArgsTooLong { len: usize },

    #[error("boot-source: boot_args may only contain printable ASCII characters")]
    BootArgsNotPrintable,

    #[error("{section}: {field} is empty")]
    EmptyId { section: &'static str, field: &'static str },

    #[error("{section}: {field} {id:?} may only contain letters, digits and underscores")]
    IdCharacter { section: &'static str, field: &'static str, id: String },

    #[error("{section}: {field} is {len} characters long; the limit is {max}", max = super::id::MAX_ID_LEN)]
    IdTooLong { section: &'static str, field: &'static str, len: usize },

    #[error("id: {id:?} must be 1 to {max} letters, digits and hyphens", max = super::id::MAX_ID_LEN)]
    InstanceId { id: String },

    #[error("drives: drive {id}: path_on_host is missing")]
    DriveWithoutPath { id: String },

    #[error("drives: drive {id}: socket (vhost-user) is not supported; give path_on_host")]
    DriveSocket { id: String },

    #[error("drives: drive {id}: partuuid {partuuid:?} is not a partition id")]
    DrivePartuuid { id: String, partuuid: String },

    #[error("{section}: {id} cannot be the root device: {existing} already is")]
    SecondRootDevice { section: &'static str, id: String, existing: String },

    #[error("{section}: there may be at most {max} of them")]
    TooManyDevices { section: &'static str, max: usize },

    #[error("network-interfaces: interface {id}: guest_mac {mac} is already used by {other}")]
    MacInUse { id: String, mac: super::MacAddr, other: String },

    #[error("network-interfaces: interface {id}: guest_mac {mac} is a multicast address")]
    MacMulticast { id: String, mac: super::MacAddr },

    #[error(
        "network-interfaces: interface {id}: host_dev_name {name:?} must be 1 to 15 characters \
         without '/' or white space"
    )]
    HostDevName { id: String, name: String },

    #[error("network-interfaces: interface {id}: host_dev_name {name} is already used by {other}")]
    HostDevInUse { id: String, name: String, other: String },

    #[error("network-interfaces: interface {id}: mtu must be between 68 and 65535, not {mtu}")]
    Mtu { id: String, mtu: u16 },

    #[error("vsock: guest_cid must be between 3 and 4294967294, not {cid}")]
    VsockCid { cid: u32 },

    #[error("vsock: uds_path is empty")]
    VsockEmptyPath,

    #[error(
        "vsock: uds_path is {len} bytes long; with the port suffix a socket path holds {max}",
        max = super::VsockConfig::MAX_PATH
    )]
    VsockPathTooLong { len: usize },

    #[error("pmem: device {id}: path_on_host is empty")]
    PmemEmptyPath { id: String },

    #[error("balloon: amount_mib {amount_mib} is larger than the memory, {mem_mib} MiB")]
    BalloonTooLarge { amount_mib: u32, mem_mib: u64 },

    #[error("mmds-config: network_interfaces is empty")]
    MmdsNoInterface,

    #[error("mmds-config: network_interfaces names {id:?}, which does not exist")]
    MmdsUnknownInterface { id: String },

    #[error(
        "mmds-config: ipv4_address {address} is not a link-local address (169.254.1.0 to \
         169.254.254.255)"
    )]
    MmdsAddress { address: std::net::Ipv4Addr },

    #[error("unknown field `{name}`")]
    UnknownField { name: String },

    #[error("cpu-config: {problem}")]
    Cpu { problem: String },

    #[error("snapshot: either mem_backend or mem_file_path is required, and not both")]
    SnapshotBackend,
    #[error("snapshot: it has no {kind} {id:?} to override")]
    SnapshotNoDevice { kind: &'static str, id: String },
}
