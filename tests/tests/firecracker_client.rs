//! A program made for Firecracker drives `pulau-vmm` unchanged: the client library `fctools`, which starts
//! the VMM, configures it by requests or by a file, and controls the guest.

use std::path::{Path, PathBuf};
use std::time::Instant;

use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::Vm;
use fctools::vm::VmState;
use fctools::vm::api::{VmApi, VmApiError};
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BalloonDevice, BootSource, Drive, DriveCacheType, DriveIoEngine, EntropyDevice, LoggerSystem,
    MachineConfiguration, MetricsSystem, RateLimiter, TokenBucket, UpdateBalloonDevice,
    UpdateBalloonStatistics, UpdateDrive, VsockDevice,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments, VmmLogLevel};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, Resource, ResourceType};
use futures_util::AsyncReadExt;
use pulau_agent_protocol::client::connect;
use pulau_tests::vmm::BOOT_ARGS;
use pulau_tests::{PATIENCE, artifact, program};

type Resources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;
type Machine = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

fn existing(resources: &mut Resources, path: PathBuf) -> Resource {
    resources.create_resource(path, ResourceType::Moved(MovedResourceType::Copied)).unwrap()
}

/// A guest with nothing but a root file system.
fn bare(resources: &mut Resources, _: &Path) -> VmConfigurationData {
    VmConfigurationData {
        boot_source: BootSource {
            kernel_image: existing(resources, artifact("PULAU_TEST_KERNEL")),
            boot_args: Some("console=ttyS0 reboot=k panic=1 pulau.overlay=tmpfs".into()),
            initrd: None,
        },
        drives: vec![Drive {
            drive_id: "rootfs".into(),
            is_root_device: true,
            cache_type: None,
            partuuid: None,
            is_read_only: Some(true),
            block: Some(existing(resources, artifact("PULAU_TEST_ROOTFS_MINIMAL"))),
            rate_limiter: None,
            io_engine: None,
            socket: None,
        }],
        machine_configuration: MachineConfiguration {
            vcpu_count: 2,
            mem_size_mib: 128,
            smt: None,
            track_dirty_pages: None,
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: Vec::new(),
        balloon_device: None,
        vsock_device: None,
        logger_system: None,
        metrics_system: None,
        mmds_configuration: None,
        entropy_device: None,
    }
}

/// A guest with one of everything that needs no preparation on the host.
fn full(resources: &mut Resources, dir: &Path) -> VmConfigurationData {
    let mut data = bare(resources, dir);
    data.boot_source.boot_args = Some(format!("{BOOT_ARGS} pulau.overlay=tmpfs"));
    std::fs::write(dir.join("disk"), vec![0; 1 << 20]).unwrap();
    let bucket = TokenBucket { size: 1 << 30, one_time_burst: None, refill_time: 100 };
    data.drives.push(Drive {
        drive_id: "data".into(),
        is_root_device: false,
        cache_type: Some(DriveCacheType::Writeback),
        partuuid: None,
        is_read_only: None,
        block: Some(existing(resources, dir.join("disk"))),
        rate_limiter: Some(RateLimiter { bandwidth: bucket.clone(), ops: bucket }),
        io_engine: Some(DriveIoEngine::Sync),
        socket: None,
    });
    data.balloon_device =
        Some(BalloonDevice { amount_mib: 16, deflate_on_oom: false, stats_polling_interval_s: Some(1) });
    let uds = resources.create_resource(dir.join("vsock"), ResourceType::Produced).unwrap();
    data.vsock_device = Some(VsockDevice { guest_cid: 3, uds });
    let created = ResourceType::Created(CreatedResourceType::File);
    data.logger_system = Some(LoggerSystem {
        logs: Some(resources.create_resource(dir.join("log"), created).unwrap()),
        level: Some(VmmLogLevel::Debug),
        show_level: Some(true),
        show_log_origin: Some(true),
        module: None,
    });
    let metrics = resources.create_resource(dir.join("metrics"), created).unwrap();
    data.metrics_system = Some(MetricsSystem { metrics });
    data.entropy_device = Some(EntropyDevice::default());
    data
}

/// Starts a VMM the way the client starts Firecracker, and the guest.
async fn start(
    dir: &Path,
    init_method: InitMethod,
    configure: fn(&mut Resources, &Path) -> VmConfigurationData,
) -> Machine {
    let mut resources = Resources::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let data = configure(&mut resources, dir);
    let arguments = VmmArguments::new(VmmApiSocket::Enabled(dir.join("api"))).enable_boot_timer();
    let executor = UnrestrictedVmmExecutor::new(arguments).id("client-sdk".to_owned().try_into().unwrap());
    // The client only ever starts the first of the three.
    let vmm = program("pulau-vmm");
    let installation = VmmInstallation::new(vmm.clone(), vmm.clone(), vmm);
    let configuration = VmConfiguration::New { init_method, data };
    let mut machine = Vm::prepare(executor, resources, installation, configuration).await.unwrap();
    machine.start(PATIENCE).await.unwrap();
    machine
}

/// Waits until the guest has written `text` to its console.
async fn console_says(machine: &mut Machine, text: &str) {
    let mut output = machine.take_pipes().unwrap().stdout;
    let mut seen = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&seen).contains(text) {
            let mut chunk = [0; 4096];
            let count = output.read(&mut chunk).await.unwrap();
            assert_ne!(count, 0, "the console ended with {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&chunk[..count]);
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap();
}

/// Waits until the guest's init serves requests.
async fn wait_for_agent(dir: &Path) {
    let socket = dir.join("vsock");
    let connecting =
        tokio::task::spawn_blocking(move || connect(&socket, Instant::now() + PATIENCE).map(drop));
    connecting.await.unwrap().unwrap();
}

/// The client itself waits for answers for ever.
async fn in_time(test: impl Future<Output = ()>) {
    tokio::time::timeout(3 * PATIENCE, test).await.expect("all of it in time");
}

async fn shut_down(machine: &mut Machine, method: VmShutdownMethod) -> VmState {
    let action = VmShutdownAction { method, timeout: Some(PATIENCE), graceful: true };
    machine.shutdown([action]).await.unwrap();
    machine.get_state()
}

#[tokio::test]
async fn a_guest_configured_by_requests_is_controlled_and_stops_when_asked_to() {
    in_time(controlled_and_stopped()).await;
}

async fn controlled_and_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = start(dir.path(), InitMethod::ViaApiCalls, full).await;
    wait_for_agent(dir.path()).await;

    let info = machine.get_info().await.unwrap();
    assert_eq!((info.id.as_str(), info.is_paused), ("client-sdk", false));
    assert!(!machine.get_firecracker_version().await.unwrap().is_empty());
    let configuration = machine.get_machine_configuration().await.unwrap();
    assert_eq!((configuration.vcpu_count, configuration.mem_size_mib), (2, 128));

    machine.pause().await.unwrap();
    assert_eq!(machine.get_state(), VmState::Paused);
    assert!(machine.get_info().await.unwrap().is_paused);
    machine.resume().await.unwrap();
    assert_eq!(machine.get_state(), VmState::Running);

    machine.update_balloon_device(UpdateBalloonDevice { amount_mib: 8 }).await.unwrap();
    let statistics = UpdateBalloonStatistics { stats_polling_interval_s: 2 };
    machine.update_balloon_statistics(statistics).await.unwrap();
    let balloon = machine.get_balloon_device().await.unwrap();
    assert_eq!((balloon.amount_mib, balloon.stats_polling_interval_s), (8, Some(2)));
    assert_eq!(machine.get_balloon_statistics().await.unwrap().target_mib, 8);

    let document = serde_json::json!({"a": {"b": 1}});
    machine.create_mmds_untyped(&document).await.unwrap();
    machine.update_mmds_untyped(&serde_json::json!({"a": {"c": "x"}})).await.unwrap();
    let document: serde_json::Value = machine.get_mmds_untyped().await.unwrap();
    assert_eq!(document, serde_json::json!({"a": {"b": 1, "c": "x"}}));

    let nothing = UpdateDrive { drive_id: "none".into(), block: None, rate_limiter: None };
    match machine.update_drive(nothing).await.unwrap_err() {
        VmApiError::ReceivedErrorResponse { status_code, fault_message } => {
            assert_eq!(status_code.as_u16(), 400);
            assert!(fault_message.contains("none"), "{fault_message}");
        }
        other => panic!("{other}"),
    }
    machine.flush_metrics().await.unwrap();
    let metrics = std::fs::read_to_string(dir.path().join("metrics")).unwrap();
    let line: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!(line["put_api_requests"]["drive_count"], 2);
    assert!(std::fs::read_to_string(dir.path().join("log")).unwrap().contains(":main:DEBUG:"));

    assert_eq!(shut_down(&mut machine, VmShutdownMethod::CtrlAltDel).await, VmState::Exited);
    assert!(!dir.path().join("api").exists() && !dir.path().join("vsock").exists());
    // Firecracker leaves the vsock device's socket behind, and this client insists on removing it.
    std::fs::write(dir.path().join("vsock"), "").unwrap();
    machine.cleanup().await.unwrap();
}

/// The client writes some sections under names Firecracker does not know, and which it ignores: as null.
#[tokio::test]
async fn a_guest_configured_by_a_file_boots() {
    in_time(configured_by_a_file()).await;
}

async fn configured_by_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    let mut machine = start(dir.path(), InitMethod::ViaJsonConfiguration(file), bare).await;
    console_says(&mut machine, "Linux version").await;
    let state = shut_down(&mut machine, VmShutdownMethod::PauseThenKill).await;
    assert!(matches!(state, VmState::Crashed(_)), "{state}");
    machine.cleanup().await.unwrap();
}
