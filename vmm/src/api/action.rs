//! What a control API request asks for, and what it is answered, apart from HTTP.

use crate::config::{
    BalloonConfig, BalloonHintingStart, BalloonHintingStatus, BalloonStats, BalloonStatsUpdate,
    BalloonUpdate, BootSourceConfig, CpuConfig, DriveConfig, DriveUpdate, EntropyConfig, FullVmConfig,
    InstanceInfo, LoggerConfig, MachineConfig, MachineConfigUpdate, MetricsConfig, MmdsConfig,
    NetworkInterfaceConfig, NetworkInterfaceUpdate, PmemConfig, PmemUpdate, SerialConfig,
    SnapshotCreateConfig, SnapshotLoadConfig, VsockConfig,
};

/// What a request asks for. Whether it can be done now is the controller's to say.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    GetInstanceInfo,
    GetVersion,
    GetFullConfig,
    GetMachineConfig,
    SetMachineConfig(MachineConfig),
    UpdateMachineConfig(MachineConfigUpdate),
    SetCpuConfig(CpuConfig),
    SetBootSource(BootSourceConfig),
    SetDrive(DriveConfig),
    UpdateDrive(DriveUpdate),
    SetPmem(PmemConfig),
    UpdatePmem(PmemUpdate),
    SetNetworkInterface(NetworkInterfaceConfig),
    UpdateNetworkInterface(NetworkInterfaceUpdate),
    SetVsock(VsockConfig),
    SetEntropy(EntropyConfig),
    SetSerial(SerialConfig),
    GetBalloon,
    SetBalloon(BalloonConfig),
    UpdateBalloon(BalloonUpdate),
    GetBalloonStats,
    UpdateBalloonStats(BalloonStatsUpdate),
    StartBalloonHinting(BalloonHintingStart),
    GetBalloonHinting,
    StopBalloonHinting,
    SetLogger(LoggerConfig),
    SetMetrics(MetricsConfig),
    FlushMetrics,
    GetMetrics,
    GetMmds,
    PutMmds(serde_json::Value),
    PatchMmds(serde_json::Value),
    SetMmdsConfig(MmdsConfig),
    Start,
    SendCtrlAltDel,
    Pause,
    Resume,
    CreateSnapshot(SnapshotCreateConfig),
    LoadSnapshot(SnapshotLoadConfig),
    /// A part of Firecracker's API that is not here: what it is called, with its verb ("Snapshots are").
    Unsupported(&'static str),
}

/// What a successful action answers.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Nothing but that it was done.
    Done,
    InstanceInfo(InstanceInfo),
    Version(String),
    FullConfig(Box<FullVmConfig>),
    MachineConfig(MachineConfig),
    Balloon(BalloonConfig),
    BalloonStats(Box<BalloonStats>),
    BalloonHinting(BalloonHintingStatus),
    /// The metadata, as JSON text.
    Mmds(String),
    /// The metrics, as JSON text.
    Metrics(String),
}
