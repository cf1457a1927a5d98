//! What is wrong with a configuration is said by name, and nothing of it stays.

use pulau_tests::artifact;
use pulau_tests::vmm::{Vmm, drive, triple_fault_kernel};
use serde_json::json;

fn start(vmm: &Vmm) -> pulau_tests::api::Response {
    vmm.put("/actions", json!({"action_type": "InstanceStart"}))
}

#[test]
fn bad_kernels_are_refused_by_name() {
    let vmm = Vmm::start();
    let kernel = std::fs::read(artifact("PULAU_TEST_KERNEL")).unwrap();
    for (name, bytes, expect) in [
        ("empty", &[][..], "kernel_image_path"),
        ("text", b"this is not a kernel\n", "kernel_image_path"),
        ("truncated", &kernel[..kernel.len() / 2], "truncated"),
        ("head", &kernel[..100], "truncated"),
    ] {
        let path = vmm.path(name);
        std::fs::write(&path, bytes).unwrap();
        vmm.put("/boot-source", json!({"kernel_image_path": path})).ok();
        start(&vmm).refused(400, expect);
    }
    vmm.put("/boot-source", json!({"kernel_image_path": "/no/such/kernel"})).refused(400, "/no/such/kernel");
    // The same process still boots what is right.
    vmm.configure(1, 128, "");
    vmm.boot();
    assert_eq!(vmm.sh("echo up"), "up\n");
}

#[test]
fn memory_and_vcpus_out_of_range_are_refused_by_name() {
    let vmm = Vmm::start();
    let machine =
        |vcpus: i64, mib: i64| vmm.put("/machine-config", json!({"vcpu_count": vcpus, "mem_size_mib": mib}));
    machine(0, 128).refused(400, "vcpu_count");
    machine(33, 128).refused(400, "vcpu_count");
    machine(1, 0).refused(400, "mem_size_mib");
    machine(1, 1 << 40).refused(400, "mem_size_mib");
    vmm.put("/boot-source", json!({"kernel_image_path": artifact("PULAU_TEST_KERNEL")})).ok();
    machine(1, 1).ok();
    start(&vmm).refused(400, "mem_size_mib");
    machine(1, 16).ok();
    start(&vmm).refused(400, "mem_size_mib");
}

#[test]
fn malformed_requests_are_refused_and_change_nothing() {
    let vmm = Vmm::start();
    let before = vmm.get("/vm/config").ok();
    for (path, body) in [
        ("/machine-config", "{"),
        ("/machine-config", "[]"),
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128,"colour":"red"}"#),
        ("/machine-config", r#"{"vcpu_count":"one","mem_size_mib":128}"#),
        ("/drives/a", r#"{"drive_id":"b","path_on_host":"/etc/hosts","is_root_device":false}"#),
        ("/drives/..%2f", r#"{"drive_id":"../","path_on_host":"/etc/hosts","is_root_device":false}"#),
        ("/vsock", r#"{"guest_cid":2,"uds_path":"v"}"#),
        ("/actions", r#"{"action_type":"SelfDestruct"}"#),
        ("/no/such/thing", "{}"),
    ] {
        let response = vmm.try_request("PUT", path, body).unwrap();
        assert_eq!(response.status, 400, "{path} {body}: {response:?}");
        assert!(!response.fault().is_empty(), "{path} {body}");
    }
    let oversized = format!(r#"{{"boot_args":"{}"}}"#, "x".repeat(100_000));
    let response = vmm.try_request("PUT", "/boot-source", &oversized).unwrap();
    assert!([400, 413].contains(&response.status), "{response:?}");
    assert_eq!(vmm.get("/vm/config").ok(), before);
}

#[test]
fn requests_in_the_wrong_state_are_refused() {
    let vmm = Vmm::start();
    let refused_now = |method: &str, path: &str, body: serde_json::Value| {
        let response = vmm.try_request(method, path, &body.to_string()).unwrap();
        assert_eq!(response.status, 400, "{method} {path}: {response:?}");
    };
    refused_now("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    refused_now("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"}));
    refused_now("PATCH", "/vm", json!({"state": "Paused"}));
    refused_now("PATCH", "/drives/root", json!({"drive_id": "root", "path_on_host": "/etc/hosts"}));
    refused_now("PUT", "/snapshot/create", json!({"snapshot_path": "s", "mem_file_path": "m"}));
    vmm.configure(1, 128, "");
    vmm.boot();
    refused_now("PUT", "/actions", json!({"action_type": "InstanceStart"}));
    refused_now("PUT", "/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 256}));
    refused_now("PUT", "/boot-source", json!({"kernel_image_path": artifact("PULAU_TEST_KERNEL")}));
    refused_now("PUT", "/drives/x", drive("x", &artifact("PULAU_TEST_KERNEL"), false, true));
    refused_now("PUT", "/vsock", json!({"guest_cid": 4, "uds_path": vmm.path("other")}));
    assert_eq!(vmm.sh("echo up"), "up\n");
}

#[test]
fn a_socket_in_the_way_is_not_taken() {
    let first = Vmm::start();
    let socket = first.path("api.sock");
    let mut second = Vmm::launch(|_| vec!["--api-sock".into(), socket.to_string_lossy().into()]);
    let status = second.wait();
    assert!(!status.success());
    assert!(second.log().contains("api.sock"), "{}", second.log());
    first.get("/").ok();
}

#[test]
fn a_configuration_file_that_is_wrong_ends_the_process_with_a_clear_message() {
    for (text, expect) in [
        ("{", "line 1"),
        (
            r#"{"machine-config":{"vcpu_count":0,"mem_size_mib":128},"boot-source":{"kernel_image_path":"k"}}"#,
            "vcpu_count",
        ),
        (r#"{"boot-source":{"kernel_image_path":"/no/such/kernel"}}"#, "/no/such/kernel"),
        (r#"{"unknown":1}"#, "unknown"),
    ] {
        let mut vmm = Vmm::launch(|dir| {
            let path = dir.join("config.json");
            std::fs::write(&path, text).unwrap();
            vec!["--no-api".into(), "--config-file".into(), path.to_string_lossy().into()]
        });
        assert!(!vmm.wait().success(), "{text}");
        assert!(vmm.log().contains(expect), "{text}: {}", vmm.log());
    }
}

#[test]
fn a_guest_without_a_way_on_does_not_take_the_vmm_with_it() {
    // A kernel that faults at once: the process ends by itself, with a reason in its log.
    let mut vmm = Vmm::start();
    let kernel = vmm.path("kernel");
    std::fs::write(&kernel, triple_fault_kernel()).unwrap();
    vmm.put("/boot-source", json!({"kernel_image_path": kernel})).ok();
    vmm.boot();
    vmm.wait();
    assert!(vmm.log().to_lowercase().contains("triple fault"), "{}", vmm.log());
}
