use super::*;
use crate::config::*;

/// What a request is found to ask for: the action as `Debug` shows it, or the error.
fn ask(method: &str, path: &str, body: &str) -> String {
    match route(method, path, body.as_bytes()) {
        Ok(routed) => format!("{:?}", routed.action),
        Err(error) => error.to_string(),
    }
}

#[track_caller]
fn asks(method: &str, path: &str, body: &str, action: Action) {
    assert_eq!(route(method, path, body.as_bytes()).unwrap().action, action, "{method} {path} {body}");
}

fn deprecated(method: &str, path: &str, body: &str) -> bool {
    route(method, path, body.as_bytes()).unwrap().deprecated.is_some()
}

/// Every path a PUT takes, with a body it takes.
const PUTS: [(&str, &str); 17] = [
    ("/actions", r#"{"action_type":"InstanceStart"}"#),
    ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#),
    ("/boot-source", r#"{"kernel_image_path":"k"}"#),
    ("/cpu-config", r#"{}"#),
    ("/drives/d", r#"{"drive_id":"d","is_root_device":true,"path_on_host":"p"}"#),
    ("/pmem/p", r#"{"id":"p","path_on_host":"p"}"#),
    ("/network-interfaces/n", r#"{"iface_id":"n","host_dev_name":"tap0"}"#),
    ("/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#),
    ("/entropy", r#"{}"#),
    ("/serial", r#"{}"#),
    ("/balloon", r#"{"amount_mib":1,"deflate_on_oom":true}"#),
    ("/logger", r#"{}"#),
    ("/metrics", r#"{"metrics_path":"m"}"#),
    ("/mmds", r#"{"a":1}"#),
    ("/mmds/config", r#"{"network_interfaces":["n"]}"#),
    ("/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"m"}"#),
    ("/snapshot/load", r#"{"snapshot_path":"s","mem_file_path":"m"}"#),
];

/// Every path a PATCH takes, with a body it takes.
const PATCHES: [(&str, &str); 10] = [
    ("/vm", r#"{"state":"Paused"}"#),
    ("/machine-config", r#"{"vcpu_count":2}"#),
    ("/drives/d", r#"{"drive_id":"d","path_on_host":"p"}"#),
    ("/pmem/p", r#"{"id":"p"}"#),
    ("/network-interfaces/n", r#"{"iface_id":"n"}"#),
    ("/balloon", r#"{"amount_mib":1}"#),
    ("/balloon/statistics", r#"{"stats_polling_interval_s":1}"#),
    ("/balloon/hinting/start", r#"{}"#),
    ("/balloon/hinting/stop", r#"{}"#),
    ("/mmds", r#"{"a":null}"#),
];

const GETS: [(&str, Action); 10] = [
    ("/metrics", Action::GetMetrics),
    ("/", Action::GetInstanceInfo),
    ("/version", Action::GetVersion),
    ("/vm/config", Action::GetFullConfig),
    ("/machine-config", Action::GetMachineConfig),
    ("/mmds", Action::GetMmds),
    ("/balloon", Action::GetBalloon),
    ("/balloon/statistics", Action::GetBalloonStats),
    ("/balloon/hinting/status", Action::GetBalloonHinting),
    ("/hotplug/memory", Action::Unsupported("Memory hotplug is")),
];

#[test]
fn gets() {
    for (path, action) in GETS {
        asks("GET", path, "", action.clone());
        asks("GET", &format!("/{path}/"), "", action);
        assert_eq!(ask("GET", path, "{}"), "GET request cannot have a body.");
    }
}

#[test]
fn puts_become_their_actions() {
    asks("PUT", PUTS[0].0, PUTS[0].1, Action::Start);
    asks("PUT", "/actions", r#"{"action_type":"FlushMetrics"}"#, Action::FlushMetrics);
    asks("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#, Action::SendCtrlAltDel);
    asks("PUT", PUTS[1].0, PUTS[1].1, Action::SetMachineConfig(MachineConfig::default()));
    asks(
        "PUT",
        "/machine-config",
        r#"{"vcpu_count":3,"mem_size_mib":5,"smt":true,"track_dirty_pages":true,"huge_pages":"2M"}"#,
        Action::SetMachineConfig(MachineConfig {
            vcpu_count: 3,
            mem_size_mib: 5,
            smt: true,
            cpu_template: None,
            track_dirty_pages: true,
            huge_pages: HugePages::Hugetlbfs2M,
        }),
    );
    asks(
        "PUT",
        "/boot-source",
        r#"{"kernel_image_path":"k","initrd_path":"i","boot_args":"a b"}"#,
        Action::SetBootSource(BootSourceConfig {
            kernel_image_path: "k".into(),
            initrd_path: Some("i".into()),
            boot_args: Some("a b".into()),
        }),
    );
    let limiter = r#"{"bandwidth":{"size":1,"refill_time":2,"one_time_burst":3},"ops":null}"#;
    let rate_limiter = Some(RateLimiterConfig {
        bandwidth: Some(TokenBucketConfig { size: 1, refill_time: 2, one_time_burst: Some(3) }),
        ops: None,
    });
    asks(
        "PUT",
        "/drives/d_1",
        &format!(
            r#"{{"drive_id":"d_1","is_root_device":false,"path_on_host":"p","is_read_only":true,
            "cache_type":"Writeback","io_engine":"Async","partuuid":"a-1","rate_limiter":{limiter}}}"#
        ),
        Action::SetDrive(DriveConfig {
            drive_id: "d_1".into(),
            partuuid: Some("a-1".into()),
            is_root_device: false,
            cache_type: CacheType::Writeback,
            is_read_only: Some(true),
            path_on_host: Some("p".into()),
            rate_limiter,
            io_engine: Some(IoEngine::Async),
            socket: None,
        }),
    );
    asks(
        "PUT",
        "/pmem/p",
        &format!(
            r#"{{"id":"p","path_on_host":"f","root_device":true,"read_only":true,"rate_limiter":{limiter}}}"#
        ),
        Action::SetPmem(PmemConfig {
            id: "p".into(),
            path_on_host: "f".into(),
            root_device: true,
            read_only: true,
            rate_limiter,
        }),
    );
    asks(
        "PUT",
        "/network-interfaces/n",
        &format!(
            r#"{{"iface_id":"n","host_dev_name":"t","guest_mac":"06:00:AC:10:00:02","mtu":1400,
            "rx_rate_limiter":{limiter}}}"#
        ),
        Action::SetNetworkInterface(NetworkInterfaceConfig {
            iface_id: "n".into(),
            host_dev_name: "t".into(),
            guest_mac: Some(MacAddr([6, 0, 0xac, 0x10, 0, 2])),
            mtu: Some(1400),
            rx_rate_limiter: rate_limiter,
            tx_rate_limiter: None,
        }),
    );
    let vsock = VsockConfig { vsock_id: None, guest_cid: 3, uds_path: "v".into() };
    asks("PUT", PUTS[7].0, PUTS[7].1, Action::SetVsock(vsock));
    let entropy = format!(r#"{{"rate_limiter":{limiter}}}"#);
    asks("PUT", "/entropy", &entropy, Action::SetEntropy(EntropyConfig { rate_limiter }));
    asks(
        "PUT",
        "/serial",
        r#"{"serial_out_path":"s","rate_limiter":{"size":1,"refill_time":2}}"#,
        Action::SetSerial(SerialConfig {
            serial_out_path: Some("s".into()),
            rate_limiter: Some(TokenBucketConfig { size: 1, refill_time: 2, one_time_burst: None }),
            socket_path: None,
        }),
    );
    asks(
        "PUT",
        "/balloon",
        r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":2,"free_page_hinting":true,
        "free_page_reporting":true}"#,
        Action::SetBalloon(BalloonConfig {
            amount_mib: 1,
            deflate_on_oom: true,
            stats_polling_interval_s: 2,
            free_page_hinting: true,
            free_page_reporting: true,
        }),
    );
    asks(
        "PUT",
        "/logger",
        r#"{"log_path":"l","level":"WARNING","show_level":true,"show_log_origin":false,"module":"m"}"#,
        Action::SetLogger(LoggerConfig {
            log_path: Some("l".into()),
            level: Some(LogLevel::Warn),
            show_level: Some(true),
            show_log_origin: Some(false),
            module: Some("m".into()),
        }),
    );
    asks(
        "PUT",
        "/metrics",
        r#"{"metrics_path":"m","emit_id":true,"properties":{"a":"b"}}"#,
        Action::SetMetrics(MetricsConfig {
            metrics_path: "m".into(),
            emit_id: true,
            properties: Some([("a".into(), "b".into())].into()),
        }),
    );
    asks("PUT", "/mmds", "[1]", Action::PutMmds(serde_json::json!([1])));
    asks(
        "PUT",
        "/mmds/config",
        r#"{"version":"V2","network_interfaces":["n"],"ipv4_address":"169.254.1.2","imds_compat":true}"#,
        Action::SetMmdsConfig(MmdsConfig {
            version: MmdsVersion::V2,
            network_interfaces: vec!["n".into()],
            ipv4_address: Some([169, 254, 1, 2].into()),
            imds_compat: true,
        }),
    );
}

#[test]
fn cpu_configurations_are_read_as_firecracker_writes_them() {
    let body = r#"{"kvm_capabilities":["121","!56"],"cpuid_modifiers":[{"leaf":"0x7","subleaf":"0b0",
        "flags":1,"modifiers":[{"register":"ebx","bitmap":"0bx01x"}]}],
        "msr_modifiers":[{"addr":"0x10a","bitmap":"0b1_0"}]}"#;
    let config = CpuConfig {
        kvm_capabilities: vec![KvmCapability::Add(121), KvmCapability::Remove(56)],
        cpuid_modifiers: vec![CpuidLeafModifier {
            leaf: 7,
            subleaf: 0,
            flags: 1,
            modifiers: vec![CpuidRegisterModifier {
                register: CpuidRegister::Ebx,
                bitmap: BitPattern { mask: 0b0110, value: 0b0010 },
            }],
        }],
        msr_modifiers: vec![MsrModifier { addr: 0x10a, bitmap: BitPattern { mask: 0b11, value: 0b10 } }],
    };
    asks("PUT", "/cpu-config", body, Action::SetCpuConfig(config));
    for (part, message) in [
        (r#"{"kvm_capabilities":["x"]}"#, "not the number of a KVM capability"),
        (r#"{"kvm_capabilities":["!"]}"#, "not the number of a KVM capability"),
        (r#"{"msr_modifiers":[{"addr":"5","bitmap":"0b1"}]}"#, "must begin with 0x or 0b"),
        (r#"{"msr_modifiers":[{"addr":"0x100000000","bitmap":"0b1"}]}"#, "not a 32-bit number"),
        (r#"{"msr_modifiers":[{"addr":"0x5","bitmap":"0b2"}]}"#, "may only contain"),
        (r#"{"reg_modifiers":[]}"#, "unknown field `reg_modifiers`"),
    ] {
        let error = ask("PUT", "/cpu-config", part);
        assert!(error.contains(message), "{error}");
    }
    let long = format!(r#"{{"msr_modifiers":[{{"addr":"0x5","bitmap":"0b{}"}}]}}"#, "1".repeat(65));
    assert!(ask("PUT", "/cpu-config", &long).contains("has more than 64 bits"));
}

#[test]
fn patches_become_their_actions() {
    asks("PATCH", "/vm", r#"{"state":"Paused"}"#, Action::Pause);
    asks("PATCH", "/vm", r#"{"state":"Resumed"}"#, Action::Resume);
    asks(
        "PATCH",
        "/machine-config",
        r#"{"vcpu_count":2,"huge_pages":"None"}"#,
        Action::UpdateMachineConfig(MachineConfigUpdate {
            vcpu_count: Some(2),
            huge_pages: Some(HugePages::None),
            ..Default::default()
        }),
    );
    asks(
        "PATCH",
        "/drives/d",
        r#"{"drive_id":"d","path_on_host":"p"}"#,
        Action::UpdateDrive(DriveUpdate {
            drive_id: "d".into(),
            path_on_host: Some("p".into()),
            rate_limiter: None,
        }),
    );
    let pmem = PmemUpdate { id: "p".into(), rate_limiter: None };
    asks("PATCH", "/pmem/p", r#"{"id":"p"}"#, Action::UpdatePmem(pmem));
    asks(
        "PATCH",
        "/network-interfaces/n",
        r#"{"iface_id":"n","tx_rate_limiter":{}}"#,
        Action::UpdateNetworkInterface(NetworkInterfaceUpdate {
            iface_id: "n".into(),
            rx_rate_limiter: None,
            tx_rate_limiter: Some(RateLimiterConfig::default()),
        }),
    );
    let balloon = BalloonUpdate { amount_mib: 1 };
    asks("PATCH", "/balloon", r#"{"amount_mib":1}"#, Action::UpdateBalloon(balloon));
    asks(
        "PATCH",
        "/balloon/statistics",
        r#"{"stats_polling_interval_s":1}"#,
        Action::UpdateBalloonStats(BalloonStatsUpdate { stats_polling_interval_s: 1 }),
    );
    for (body, acknowledge_on_stop) in [("", true), ("{}", true), (r#"{"acknowledge_on_stop":false}"#, false)]
    {
        let start = BalloonHintingStart { acknowledge_on_stop };
        asks("PATCH", "/balloon/hinting/start", body, Action::StartBalloonHinting(start));
        asks("PATCH", "/balloon/hinting/stop", body, Action::StopBalloonHinting);
    }
    asks("PATCH", "/mmds", r#"{"a":null}"#, Action::PatchMmds(serde_json::json!({"a": null})));
    assert_eq!(ask("PATCH", "/machine-config", "{}"), "Empty PATCH request.");
}

#[test]
fn deletes_say_what_is_missing() {
    for kind in ["drives", "pmem", "network-interfaces"] {
        let path = format!("/{kind}/a");
        asks("DELETE", &path, "", Action::Unsupported("Hot unplug of devices is"));
        assert_eq!(ask("DELETE", &path, "{}"), "DELETE request cannot have a body.");
        assert_eq!(ask("DELETE", &format!("/{kind}"), ""), "The ID cannot be empty.");
    }
}

#[test]
fn bodies_are_required_and_must_be_right() {
    for (method, all) in [("PUT", &PUTS[..]), ("PATCH", &PATCHES[..])] {
        for (path, body) in all {
            assert!(route(method, path, body.as_bytes()).is_ok(), "{method} {path}");
            if path.contains("hinting") {
                continue;
            }
            assert_eq!(ask(method, path, ""), format!("Empty {method} request."), "{path}");
            for wrong in ["{", "nonsense", "\u{0}", &body[..body.len() - 1], &format!("{body}x")] {
                let error = ask(method, path, wrong);
                let start = "An error occurred when deserializing the json body of a request: ";
                assert!(error.starts_with(start) && error.ends_with('.'), "{path} {wrong}: {error}");
            }
            if path != &"/mmds" {
                let more =
                    if *body == "{}" { r#"{"x_1":1}"# } else { &body.replacen('{', r#"{"x_1":1,"#, 1) };
                assert!(ask(method, path, more).contains("unknown field `x_1`"), "{path}");
                assert!(ask(method, path, "5").contains("invalid type"), "{path}");
            }
            let not_utf8 = route(method, path, b"{\"\xff\":1}");
            assert!(matches!(not_utf8, Err(RouteError::Json(_))), "{path}");
            // Deeper than any stack: refused, not followed.
            assert!(route(method, path, "[".repeat(50_000).as_bytes()).is_err(), "{path}");
        }
    }
}

#[test]
fn a_field_that_is_wrong_is_named() {
    for (method, path, body, field) in [
        ("PUT", "/machine-config", r#"{"vcpu_count":1}"#, "missing field `mem_size_mib`"),
        ("PUT", "/machine-config", r#"{"vcpu_count":-1,"mem_size_mib":1}"#, "invalid value: integer `-1`"),
        ("PUT", "/machine-config", r#"{"vcpu_count":256,"mem_size_mib":1}"#, "invalid value: integer `256`"),
        ("PUT", "/actions", r#"{"action_type":"Stop"}"#, "unknown variant `Stop`"),
        ("PUT", "/drives/d", r#"{"drive_id":"d","path_on_host":"p"}"#, "missing field `is_root_device`"),
        ("PATCH", "/vm", r#"{"state":"Running"}"#, "unknown variant `Running`"),
        ("PUT", "/vsock", r#"{"guest_cid":4294967296,"uds_path":"v"}"#, "invalid value: integer"),
        (
            "PUT",
            "/network-interfaces/n",
            r#"{"iface_id":"n","host_dev_name":"t","guest_mac":"06:00:00:00:00"}"#,
            "\"06:00:00:00:00\" is not a MAC address",
        ),
        ("PUT", "/logger", r#"{"level":"Loud"}"#, "\"Loud\" is not a log level"),
        (
            "PUT",
            "/mmds/config",
            r#"{"network_interfaces":["n"],"ipv4_address":"1.2.3"}"#,
            "invalid IPv4 address",
        ),
        ("PUT", "/snapshot/load", r#"{"snapshot_path":"s"}"#, "either mem_backend or mem_file_path"),
        (
            "PUT",
            "/snapshot/load",
            r#"{"snapshot_path":"s","mem_file_path":"m","mem_backend":{"backend_type":"File","backend_path":"m"}}"#,
            "either mem_backend or mem_file_path",
        ),
    ] {
        let error = ask(method, path, body);
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn ids_of_path_and_body_must_agree() {
    for (method, all) in [("PUT", &PUTS[..]), ("PATCH", &PATCHES[..])] {
        for (path, body) in all
            .iter()
            .filter(|(path, _)| ["/drives", "/pmem", "/network"].iter().any(|kind| path.starts_with(kind)))
        {
            let (kind, id) = path.rsplit_once('/').unwrap();
            let message = format!("The id from the path [other] does not match the id from the body [{id}]!");
            assert_eq!(ask(method, &format!("{kind}/other"), body), message);
            assert_eq!(ask(method, kind, body), "The ID cannot be empty.");
            assert_eq!(ask(method, &format!("{kind}/"), body), "The ID cannot be empty.");
        }
    }
}

#[test]
fn what_is_not_a_route_is_refused() {
    let methods = ["GET", "PUT", "PATCH", "DELETE", "POST", "HEAD", "OPTIONS", "get", ""];
    let known: Vec<&str> = (PUTS.iter().map(|(path, _)| *path))
        .chain(PATCHES.iter().map(|(path, _)| *path))
        .chain(GETS.iter().map(|(path, _)| *path))
        .collect();
    let taken = |method: &str, path: &str| match method {
        "GET" => GETS.iter().any(|(p, _)| *p == path),
        "PUT" => PUTS.iter().any(|(p, _)| *p == path) || path == "/hotplug/memory",
        "PATCH" => PATCHES.iter().any(|(p, _)| *p == path) || path == "/hotplug/memory",
        "DELETE" => ["/drives/d", "/pmem/p", "/network-interfaces/n"].contains(&path),
        _ => false,
    };
    let unknown = ["/unknown", "/Version", "/vm/config/x", "/machine-config/x", "/drives/a/b", "/mmds/x"];
    let deep = ["/balloon/hinting/status/x", "/balloon/hinting", "/a/b/c/d/e", "/?x", "/version?x"];
    for method in methods {
        let body = if ["PUT", "PATCH"].contains(&method) { "{}" } else { "" };
        for path in known.iter().chain(&unknown).chain(&deep) {
            if !taken(method, path) {
                let message = format!("Invalid request method and/or path: {method} {path}.");
                assert_eq!(ask(method, path, body), message);
            }
        }
    }
    let long = ask("GET", &format!("/{}", "a".repeat(5000)), "");
    assert!(long.len() < 300);
}

#[test]
fn deprecated_ways_are_marked() {
    let machine = r#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":"None"}"#;
    assert!(deprecated("PUT", "/machine-config", machine));
    assert!(!deprecated("PUT", PUTS[1].0, PUTS[1].1));
    assert!(deprecated("PATCH", "/machine-config", r#"{"cpu_template":"T2"}"#));
    assert!(deprecated("PUT", "/vsock", r#"{"vsock_id":"v","guest_cid":3,"uds_path":"v"}"#));
    assert!(!deprecated("PUT", PUTS[7].0, PUTS[7].1));
    assert!(deprecated("PUT", "/mmds/config", r#"{"network_interfaces":["n"]}"#));
    assert!(!deprecated("PUT", "/mmds/config", r#"{"network_interfaces":["n"],"version":"V2"}"#));
    assert!(deprecated("PUT", "/snapshot/load", PUTS[16].1));
    let new = r#"{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"}}"#;
    assert!(!deprecated("PUT", "/snapshot/load", new));
}

#[test]
fn answers_have_firecrackers_shape() {
    let text = |answer| {
        let response = respond(&Ok(answer));
        (response.status.code(), response.body)
    };
    assert_eq!(text(Answer::Done), (204, String::new()));
    assert_eq!(text(Answer::Version("1.2".into())), (200, r#"{"firecracker_version":"1.2"}"#.into()));
    let info = InstanceInfo {
        id: "i".into(),
        state: VmState::NotStarted,
        vmm_version: "1".into(),
        app_name: "Pulau".into(),
    };
    assert_eq!(
        text(Answer::InstanceInfo(info)).1,
        r#"{"id":"i","state":"Not started","vmm_version":"1","app_name":"Pulau"}"#
    );
    assert_eq!(
        text(Answer::MachineConfig(MachineConfig::default())).1,
        r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#
    );
    assert_eq!(
        text(Answer::FullConfig(Box::new(FullVmConfig::from(&VmConfig::default())))).1,
        concat!(
            r#"{"balloon":null,"drives":[],"boot-source":{"kernel_image_path":"","initrd_path":null,"#,
            r#""boot_args":null},"cpu-config":null,"logger":null,"machine-config":{"vcpu_count":1,"#,
            r#""mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"},"#,
            r#""metrics":null,"mmds-config":null,"network-interfaces":[],"vsock":null,"#,
            r#""entropy":null,"pmem":[],"memory-hotplug":null}"#
        )
    );
    let stats = BalloonStats { target_mib: 1, free_memory: Some(5), ..Default::default() };
    assert_eq!(
        text(Answer::BalloonStats(Box::new(stats))).1,
        r#"{"target_pages":0,"actual_pages":0,"target_mib":1,"actual_mib":0,"free_memory":5}"#
    );
    let hinting = BalloonHintingStatus { host_cmd: 2, guest_cmd: None };
    assert_eq!(text(Answer::BalloonHinting(hinting)).1, r#"{"host_cmd":2,"guest_cmd":null}"#);
    assert_eq!(text(Answer::Mmds("{}".into())), (200, "{}".into()));
    let error = respond(&Err(ControlError::NotAfterStart));
    assert_eq!(error.status.code(), 400);
    assert_eq!(
        error.body,
        r#"{"fault_message":"The requested operation is not supported after starting the microVM."}"#
    );
    let too_large = crate::mmds::MmdsError::TooLarge { size: 2, limit: 1 };
    assert_eq!(respond(&Err(too_large.into())).status.code(), 413);
}
