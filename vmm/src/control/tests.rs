use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;
use crate::config::*;

/// What the fake machine was asked, and whether it is to fail.
#[derive(Default)]
struct Script {
    calls: Vec<String>,
    fail: bool,
}

impl Script {
    fn call(script: &Rc<RefCell<Script>>, call: impl Into<String>) -> Result<(), MachineError> {
        let mut script = script.borrow_mut();
        script.calls.push(call.into());
        if script.fail { Err(MachineError::failed("broken")) } else { Ok(()) }
    }
}

struct FakeBuilder(Rc<RefCell<Script>>);
struct FakeMachine(Rc<RefCell<Script>>);

impl MachineBuilder for FakeBuilder {
    fn start(&mut self, config: &VmConfig) -> Result<Box<dyn Machine>, StartError> {
        let call = format!("start {}", config.machine.vcpu_count);
        Script::call(&self.0, call).map_err(|e| StartError(e.into()))?;
        Ok(Box::new(FakeMachine(self.0.clone())))
    }

    fn load(&mut self, request: &SnapshotLoadConfig) -> Result<(Box<dyn Machine>, VmConfig), StartError> {
        let call = format!("load {}", request.snapshot_path.display());
        Script::call(&self.0, call).map_err(|e| StartError(e.into()))?;
        let mut config = VmConfig::default();
        config.set_machine(MachineConfig { vcpu_count: 3, ..Default::default() }).unwrap();
        request.apply(&mut config).map_err(|e| StartError(e.into()))?;
        Ok((Box::new(FakeMachine(self.0.clone())), config))
    }
}

impl Machine for FakeMachine {
    fn pause(&mut self) -> Result<(), MachineError> {
        Script::call(&self.0, "pause")
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        Script::call(&self.0, "resume")
    }
    fn save(&mut self, request: &SnapshotCreateConfig, config: &VmConfig) -> Result<(), MachineError> {
        let path = request.snapshot_path.display();
        Script::call(&self.0, format!("save {path} {}", config.machine.vcpu_count))
    }
    fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError> {
        Script::call(&self.0, "ctrl-alt-del")
    }
    fn update_drive(&mut self, update: &DriveUpdate) -> Result<(), MachineError> {
        Script::call(&self.0, format!("drive {}", update.drive_id))
    }
    fn update_network_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), MachineError> {
        Script::call(&self.0, format!("interface {}", update.iface_id))
    }
    fn update_pmem(&mut self, update: &PmemUpdate) -> Result<(), MachineError> {
        Script::call(&self.0, format!("pmem {}", update.id))
    }
    fn set_balloon_target(&mut self, amount_mib: u32) -> Result<(), MachineError> {
        Script::call(&self.0, format!("balloon {amount_mib}"))
    }
    fn set_balloon_stats_interval(&mut self, seconds: u16) -> Result<(), MachineError> {
        Script::call(&self.0, format!("interval {seconds}"))
    }
    fn balloon_stats(&mut self) -> Result<BalloonStats, MachineError> {
        Script::call(&self.0, "stats")?;
        Ok(BalloonStats { target_mib: 3, ..Default::default() })
    }
    fn start_balloon_hinting(&mut self, start: &BalloonHintingStart) -> Result<(), MachineError> {
        Script::call(&self.0, format!("hinting {}", start.acknowledge_on_stop))
    }
    fn balloon_hinting_status(&mut self) -> Result<BalloonHintingStatus, MachineError> {
        Script::call(&self.0, "hinting status")?;
        Ok(BalloonHintingStatus { host_cmd: 2, guest_cmd: None })
    }
    fn stop_balloon_hinting(&mut self) -> Result<(), MachineError> {
        Script::call(&self.0, "hinting stop")
    }
}

struct Test {
    controller: Controller,
    script: Rc<RefCell<Script>>,
    dir: tempfile::TempDir,
}

impl Test {
    fn new() -> Self {
        let script = Rc::<RefCell<Script>>::default();
        let mmds = Arc::new(Mutex::new(Mmds::new(100)));
        let controller = Controller::new("vm-1".into(), mmds, Box::new(FakeBuilder(script.clone())));
        Self { controller, script, dir: tempfile::tempdir().unwrap() }
    }

    /// A started machine with one of each device, the balloon with everything.
    fn started() -> Self {
        let mut test = Self::new();
        for action in test.configuration() {
            test.done(action);
        }
        test.done(Action::Start);
        test.calls();
        test
    }

    fn file(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, [0; 512]).unwrap();
        path
    }

    fn boot_source(&self) -> Action {
        let kernel_image_path = self.file("kernel");
        Action::SetBootSource(BootSourceConfig { kernel_image_path, ..Default::default() })
    }

    fn drive(&self, id: &str, root: bool) -> DriveConfig {
        let (drive_id, path_on_host) = (id.to_owned(), Some(self.file(id)));
        DriveConfig { drive_id, is_root_device: root, path_on_host, ..Default::default() }
    }

    /// Requests that make one of everything.
    fn configuration(&self) -> Vec<Action> {
        let parse = |text: serde_json::Value| serde_json::from_value(text).unwrap();
        vec![
            Action::SetMachineConfig(MachineConfig { vcpu_count: 2, ..Default::default() }),
            Action::UpdateMachineConfig(MachineConfigUpdate {
                mem_size_mib: Some(256),
                ..Default::default()
            }),
            Action::SetCpuConfig(CpuConfig::default()),
            self.boot_source(),
            Action::SetDrive(self.drive("root", true)),
            Action::SetPmem(PmemConfig {
                id: "p".into(),
                path_on_host: self.file("p"),
                ..Default::default()
            }),
            Action::SetNetworkInterface(parse_interface(json!({}))),
            Action::SetVsock(VsockConfig { guest_cid: 3, uds_path: "/run/v".into(), ..Default::default() }),
            Action::SetEntropy(EntropyConfig::default()),
            Action::SetSerial(SerialConfig::default()),
            Action::SetBalloon(BalloonConfig {
                amount_mib: 1,
                stats_polling_interval_s: 1,
                free_page_hinting: true,
                ..Default::default()
            }),
            Action::SetMmdsConfig(parse(json!({"network_interfaces": ["eth0"], "version": "V2"}))),
        ]
    }

    fn fails(&mut self, action: Action) -> String {
        let before = self.controller.config().clone();
        let error = self.controller.handle(action).unwrap_err().to_string();
        assert_eq!(*self.controller.config(), before, "{error}");
        error
    }

    fn done(&mut self, action: Action) {
        assert_eq!(self.controller.handle(action).unwrap(), Answer::Done);
    }

    /// What the machine was asked since the last call.
    fn calls(&mut self) -> Vec<String> {
        std::mem::take(&mut self.script.borrow_mut().calls)
    }
}

fn parse_interface(more: serde_json::Value) -> NetworkInterfaceConfig {
    let mut value = json!({"iface_id": "eth0", "host_dev_name": "tap0"});
    value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    serde_json::from_value(value).unwrap()
}

fn drive_update(id: &str) -> DriveUpdate {
    let limit = TokenBucketConfig { size: 10, refill_time: 100, one_time_burst: None };
    let rate_limiter = Some(RateLimiterConfig { bandwidth: Some(limit), ops: None });
    DriveUpdate { drive_id: id.into(), path_on_host: None, rate_limiter }
}

/// Requests for which the machine must have been started.
fn runtime_actions() -> Vec<Action> {
    vec![
        Action::Pause,
        Action::Resume,
        Action::SendCtrlAltDel,
        Action::FlushMetrics,
        Action::UpdateDrive(drive_update("root")),
        Action::UpdatePmem(PmemUpdate { id: "p".into(), rate_limiter: None }),
        Action::UpdateNetworkInterface(NetworkInterfaceUpdate {
            iface_id: "eth0".into(),
            ..Default::default()
        }),
        Action::UpdateBalloon(BalloonUpdate { amount_mib: 2 }),
        Action::GetBalloonStats,
        Action::UpdateBalloonStats(BalloonStatsUpdate { stats_polling_interval_s: 2 }),
        Action::StartBalloonHinting(BalloonHintingStart::default()),
        Action::GetBalloonHinting,
        Action::StopBalloonHinting,
        Action::CreateSnapshot(SnapshotCreateConfig {
            snapshot_type: SnapshotType::Full,
            snapshot_path: "s".into(),
            mem_file_path: "m".into(),
        }),
    ]
}

const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const AFTER: &str = "The requested operation is not supported after starting the microVM.";

#[test]
fn what_needs_a_machine_is_refused_before_the_start() {
    let mut test = Test::new();
    for action in runtime_actions() {
        assert_eq!(test.fails(action.clone()), BEFORE, "{action:?}");
    }
    assert!(test.calls().is_empty());
}

#[test]
fn what_configures_a_machine_is_refused_after_the_start() {
    for paused in [false, true] {
        let mut test = Test::started();
        if paused {
            test.done(Action::Pause);
        }
        let load = json!({"snapshot_path": "s", "mem_file_path": "m"});
        let process_wide = [
            Action::SetLogger(LoggerConfig::default()),
            Action::SetMetrics(MetricsConfig::default()),
            Action::LoadSnapshot(serde_json::from_value(load).unwrap()),
            Action::Start,
        ];
        for action in test.configuration().into_iter().chain(process_wide) {
            assert_eq!(test.fails(action.clone()), AFTER, "{action:?}");
        }
        assert_eq!(test.calls(), if paused { vec!["pause"] } else { vec![] });
    }
}

#[test]
fn everything_at_run_time_works_running_and_paused() {
    for paused in [false, true] {
        let mut test = Test::started();
        if paused {
            test.done(Action::Pause);
            test.calls();
        }
        let expected = vec![
            "ctrl-alt-del",
            "drive root",
            "pmem p",
            "interface eth0",
            "balloon 2",
            "stats",
            "interval 2",
            "hinting true",
            "hinting status",
            "hinting stop",
        ];
        for action in runtime_actions() {
            match action {
                // They have tests of their own.
                Action::Pause | Action::Resume | Action::CreateSnapshot(_) => {}
                action => drop(test.controller.handle(action).unwrap()),
            }
        }
        assert_eq!(test.calls(), expected);
    }
}

#[test]
fn states_follow_start_pause_and_resume() {
    let mut test = Test::new();
    let state = |test: &mut Test| match test.controller.handle(Action::GetInstanceInfo).unwrap() {
        Answer::InstanceInfo(info) => {
            assert_eq!((info.id.as_str(), info.app_name.as_str()), ("vm-1", "Pulau"));
            info.state.to_string()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(state(&mut test), "Not started");
    test.done(test.boot_source());
    test.done(Action::Start);
    assert_eq!(state(&mut test), "Running");
    test.done(Action::Resume);
    test.done(Action::Pause);
    test.done(Action::Pause);
    assert_eq!(state(&mut test), "Paused");
    test.done(Action::Resume);
    assert_eq!(state(&mut test), "Running");
    assert_eq!(test.calls(), ["start 1", "pause", "resume"]);
    test.script.borrow_mut().fail = true;
    test.fails(Action::SendCtrlAltDel);
    assert!(!test.controller.stop_asked_for());
    test.script.borrow_mut().fail = false;
    test.done(Action::SendCtrlAltDel);
    assert!(test.controller.stop_asked_for());
}

#[test]
fn a_failed_start_can_be_repeated() {
    let mut test = Test::new();
    assert!(test.fails(Action::Start).starts_with("boot-source: "));
    test.done(test.boot_source());
    test.script.borrow_mut().fail = true;
    assert_eq!(test.fails(Action::Start), "Start microvm error: broken");
    assert_eq!(test.controller.state(), VmState::NotStarted);
    test.script.borrow_mut().fail = false;
    test.done(Action::SetMachineConfig(MachineConfig { vcpu_count: 4, ..Default::default() }));
    test.done(Action::Start);
    assert_eq!(test.calls(), ["start 1", "start 4"]);
}

#[test]
fn a_machine_that_fails_changes_neither_state_nor_configuration() {
    let mut test = Test::started();
    test.script.borrow_mut().fail = true;
    for action in runtime_actions() {
        if !matches!(action, Action::Resume | Action::FlushMetrics | Action::CreateSnapshot(_)) {
            assert_eq!(test.fails(action.clone()), "broken", "{action:?}");
        }
    }
    assert_eq!(test.controller.state(), VmState::Running);
    test.script.borrow_mut().fail = false;
    test.done(Action::Pause);
    test.script.borrow_mut().fail = true;
    assert_eq!(test.fails(Action::Resume), "broken");
    assert_eq!(test.controller.state(), VmState::Paused);
}

#[test]
fn the_configuration_follows_updates() {
    let mut test = Test::started();
    let other = test.file("other");
    test.done(Action::UpdateDrive(DriveUpdate { path_on_host: Some(other.clone()), ..drive_update("root") }));
    let remove = TokenBucketConfig { size: 0, refill_time: 0, one_time_burst: None };
    let add = TokenBucketConfig { size: 5, refill_time: 7, one_time_burst: Some(1) };
    test.done(Action::UpdateDrive(DriveUpdate {
        rate_limiter: Some(RateLimiterConfig { bandwidth: Some(remove), ops: Some(add) }),
        ..drive_update("root")
    }));
    test.done(Action::UpdateBalloon(BalloonUpdate { amount_mib: 256 }));
    test.done(Action::UpdateBalloonStats(BalloonStatsUpdate { stats_polling_interval_s: 9 }));
    let Answer::FullConfig(config) = test.controller.handle(Action::GetFullConfig).unwrap() else { panic!() };
    assert_eq!(config.drives[0].path_on_host.as_ref(), Some(&other));
    let limiter = RateLimiterConfig { bandwidth: None, ops: Some(add) };
    assert_eq!(config.drives[0].rate_limiter, Some(limiter));
    let balloon = config.balloon.unwrap();
    assert_eq!((balloon.amount_mib, balloon.stats_polling_interval_s), (256, 9));
    assert_eq!(config.machine_config.unwrap().mem_size_mib, 256);
}

#[test]
fn updates_of_what_is_not_there_are_refused() {
    let mut test = Test::started();
    assert_eq!(test.fails(Action::UpdateDrive(drive_update("x"))), "there is no drive \"x\"");
    let empty = DriveUpdate { rate_limiter: None, ..drive_update("root") };
    assert!(test.fails(Action::UpdateDrive(empty)).contains("root needs path_on_host"));
    let missing = DriveUpdate { path_on_host: Some(test.dir.path().join("no")), ..drive_update("root") };
    let error = test.fails(Action::UpdateDrive(missing));
    assert!(error.starts_with("drives: path_on_host") && error.contains("No such file"), "{error}");
    let pmem = PmemUpdate { id: "x".into(), rate_limiter: None };
    assert_eq!(test.fails(Action::UpdatePmem(pmem)), "there is no pmem device \"x\"");
    let net = NetworkInterfaceUpdate { iface_id: "x".into(), ..Default::default() };
    let error = test.fails(Action::UpdateNetworkInterface(net));
    assert_eq!(error, "there is no network interface \"x\"");
    let balloon = Action::UpdateBalloon(BalloonUpdate { amount_mib: 257 });
    assert!(test.fails(balloon).contains("amount_mib 257 is larger"));
    let off = Action::UpdateBalloonStats(BalloonStatsUpdate { stats_polling_interval_s: 0 });
    assert!(test.fails(off).contains("cannot become 0"));
    assert!(test.calls().is_empty());
}

#[test]
fn balloon_requests_need_a_balloon_that_has_what_they_want() {
    let mut test = Test::new();
    test.done(test.boot_source());
    assert!(test.fails(Action::GetBalloon).contains("no balloon"));
    test.done(Action::Start);
    for action in runtime_actions() {
        if format!("{action:?}").contains("Balloon") {
            assert!(test.fails(action).contains("no balloon"));
        }
    }
    let mut test = Test::new();
    test.done(test.boot_source());
    test.done(Action::SetBalloon(BalloonConfig::default()));
    test.done(Action::Start);
    test.calls();
    assert!(test.fails(Action::GetBalloonStats).contains("no statistics"));
    let on = Action::UpdateBalloonStats(BalloonStatsUpdate { stats_polling_interval_s: 1 });
    assert!(test.fails(on).contains("no statistics"));
    for action in [Action::StartBalloonHinting(BalloonHintingStart::default()), Action::GetBalloonHinting] {
        assert!(test.fails(action).contains("free_page_hinting"));
    }
    assert!(test.calls().is_empty());
}

#[test]
fn files_are_looked_at_when_they_are_named() {
    let mut test = Test::new();
    let dir = test.dir.path().to_owned();
    let cases = [
        (
            Action::SetBootSource(BootSourceConfig {
                kernel_image_path: dir.join("no"),
                ..Default::default()
            }),
            "boot-source: kernel_image_path",
        ),
        (
            Action::SetBootSource(BootSourceConfig {
                kernel_image_path: test.file("kernel"),
                initrd_path: Some(dir.clone()),
                boot_args: None,
            }),
            "boot-source: initrd_path",
        ),
        (
            Action::SetDrive(DriveConfig { path_on_host: Some(dir.clone()), ..test.drive("a", false) }),
            "drives: path_on_host",
        ),
        (
            Action::SetPmem(PmemConfig { id: "p".into(), path_on_host: dir, ..Default::default() }),
            "pmem: path_on_host",
        ),
    ];
    for (action, start) in cases {
        let error = test.fails(action);
        assert!(error.starts_with(start), "{error}");
    }
}

#[test]
fn metadata_is_kept_within_its_limit_in_every_state() {
    let mut test = Test::new();
    test.done(test.boot_source());
    for started in [false, true] {
        if started {
            test.done(Action::Start);
        }
        test.done(Action::PutMmds(json!({"a": 1})));
        test.done(Action::PatchMmds(json!({"b": "x"})));
        let answer = test.controller.handle(Action::GetMmds).unwrap();
        assert_eq!(answer, Answer::Mmds(r#"{"a":1,"b":"x"}"#.into()));
        let big = Action::PatchMmds(json!({"c": "x".repeat(100)}));
        assert!(matches!(test.controller.handle(big), Err(ControlError::MmdsTooLarge(_))));
    }
    let mut test = Test::new();
    assert_eq!(test.controller.handle(Action::GetMmds).unwrap(), Answer::Mmds("{}".into()));
    let error = test.fails(Action::PatchMmds(json!({})));
    assert_eq!(error, "The MMDS data store is not initialized.");
}

#[test]
fn a_configuration_file_is_taken_whole_or_not_at_all() {
    let mut test = Test::new();
    let kernel = test.file("kernel");
    let disk = test.file("disk");
    let file = json!({
        "boot-source": {"kernel_image_path": kernel, "boot_args": "console=ttyS0"},
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "drives": [
            {"drive_id": "data", "is_root_device": false, "path_on_host": disk},
            {"drive_id": "root", "is_root_device": true, "path_on_host": disk, "is_read_only": true},
        ],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
        "mmds-config": {"network_interfaces": ["eth0"]},
        "balloon": null,
    });
    test.controller.load(serde_json::from_value(file.clone()).unwrap()).unwrap();
    let config = test.controller.config().clone();
    let drives: Vec<_> = config.drives.iter().map(|d| d.drive_id.as_str()).collect();
    assert_eq!(drives, ["root", "data"]);
    assert_eq!(config.boot_source.as_ref().unwrap().boot_args(), "console=ttyS0");
    for (pointer, value, message) in [
        ("/machine-config/vcpu_count", json!(0), "vcpu_count"),
        ("/drives/0/path_on_host", json!("/no/such/disk"), "/no/such/disk"),
        ("/boot-source/kernel_image_path", json!(""), "kernel_image_path is empty"),
        ("/mmds-config/network_interfaces/0", json!("eth1"), "\"eth1\""),
    ] {
        let mut bad = file.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        let error = test.controller.load(serde_json::from_value(bad).unwrap()).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(*test.controller.config(), config);
    }
}

#[test]
fn a_configuration_file_may_name_a_file_with_the_cpu_configuration() {
    let mut test = Test::new();
    let path = test.file("cpu.json");
    let file = json!({"boot-source": {"kernel_image_path": test.file("kernel")}, "cpu-config": path});
    let mut load = |text: &str| {
        std::fs::write(&path, text).unwrap();
        test.controller.load(serde_json::from_value(file.clone()).unwrap()).map_err(|e| e.to_string())?;
        Ok(test.controller.config().cpu.clone().unwrap().msr_modifiers.len())
    };
    let error: Result<usize, String> = load("{");
    let error = error.unwrap_err();
    assert!(error.contains("cpu-config: file") && error.contains("cpu.json\": EOF"), "{error}");
    let error = load(r#"{"msr_modifiers": [], "colour": 1}"#).unwrap_err();
    assert!(error.contains("unknown field `colour`"), "{error}");
    assert_eq!(load(r#"{"msr_modifiers": [{"addr": "0x10", "bitmap": "0b1"}]}"#), Ok(1));
    let missing = json!({"boot-source": {"kernel_image_path": "k"}, "cpu-config": "/no/file"});
    let error = test.controller.load(serde_json::from_value(missing).unwrap()).unwrap_err().to_string();
    assert!(error.contains("cpu-config: file \"/no/file\": No such file"), "{error}");
    let wrong = serde_json::from_value::<crate::config::FullVmConfig>(json!({"cpu-config": {"colour": 1}}));
    assert!(wrong.unwrap_err().to_string().contains("unknown field `colour`"));
}

#[test]
fn parts_that_are_not_here_say_so() {
    let mut test = Test::new();
    let error = test.fails(Action::Unsupported("Memory hotplug is"));
    assert_eq!(error, "Memory hotplug is not supported.");
}

fn save() -> Action {
    Action::CreateSnapshot(
        serde_json::from_value(json!({"snapshot_path": "s", "mem_file_path": "m"})).unwrap(),
    )
}

fn load(more: serde_json::Value) -> Action {
    let mut request = json!({"snapshot_path": "s", "mem_file_path": "m"});
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Action::LoadSnapshot(serde_json::from_value(request).unwrap())
}

#[test]
fn a_snapshot_is_made_of_a_paused_machine_as_it_is_configured() {
    let mut test = Test::started();
    let error = test.fails(save());
    assert!(error.contains("must be paused first"), "{error}");
    test.done(Action::Pause);
    test.done(save());
    assert_eq!(test.calls(), ["pause", "save s 2"]);
    test.script.borrow_mut().fail = true;
    assert_eq!(test.fails(save()), "broken");
    assert_eq!(test.controller.state(), VmState::Paused);
}

#[test]
fn a_snapshot_is_loaded_where_nothing_was_configured() {
    let mut test = Test::new();
    test.script.borrow_mut().fail = true;
    assert_eq!(test.fails(load(json!({}))), "Load microVM snapshot error: broken");
    test.script.borrow_mut().fail = false;
    test.calls();
    let error = test.fails(load(json!({"drive_overrides": [{"drive_id": "d", "path_on_host": "p"}]})));
    assert!(error.ends_with("snapshot: it has no drive \"d\" to override"), "{error}");
    assert_eq!(test.controller.state(), VmState::NotStarted);
    test.calls();
    test.done(load(json!({"track_dirty_pages": true})));
    assert_eq!((test.controller.state(), test.calls()), (VmState::Paused, vec!["load s".to_owned()]));
    let machine = &test.controller.config().machine;
    assert!(machine.vcpu_count == 3 && machine.track_dirty_pages);
    test.done(Action::Resume);
    assert_eq!(test.controller.state(), VmState::Running);
    assert_eq!(test.fails(load(json!({}))), AFTER);

    let mut test = Test::new();
    test.done(load(json!({"resume_vm": true})));
    assert_eq!(test.controller.state(), VmState::Running);
    assert_eq!(test.calls(), ["load s", "resume"]);

    let mut test = Test::new();
    test.done(test.boot_source());
    let error = test.fails(load(json!({})));
    assert!(error.contains("nothing has been configured"), "{error}");
}
