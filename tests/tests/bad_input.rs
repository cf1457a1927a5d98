//! Every kind of bad input, as whoever starts a VMM with a configuration file meets it: the process ends with a
//! code that is not 0 and a message that names the field or the file, and leaves nothing behind. What the control
//! API answers to the same is in `refusals`, `block` and `network`.

use std::path::Path;
use std::process::{Command, Stdio};

use pulau_tests::footprint::Footprint;
use pulau_tests::network::{in_own_network, ip};
use pulau_tests::vmm::{Vmm, drive};
use pulau_tests::{artifact, program};
use pulau_vmm::exit::ExitCode;
use serde_json::{Value, json};

/// A configuration that boots, with a socket of each kind that a start makes, in `dir`.
fn good(dir: &Path) -> Value {
    json!({
        "boot-source": {"kernel_image_path": artifact("PULAU_TEST_KERNEL"), "boot_args": "panic=1 reboot=k quiet"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [
            drive("root", &artifact("PULAU_TEST_ROOTFS_MINIMAL"), true, true),
            drive("data", &dir.join("data.img"), false, false),
        ],
        "vsock": {"guest_cid": 3, "uds_path": dir.join("vsock")},
        "serial": {"socket_path": dir.join("console")},
        "entropy": {},
        "balloon": {"amount_mib": 0, "deflate_on_oom": true},
    })
}

/// What is wrong, where in [`good`] it goes, what is there then (a text of `@name` is that file in the
/// directory), and what the message must say.
type Case = (&'static str, &'static str, Value, &'static [&'static str]);

fn cases() -> Vec<Case> {
    let kernel = "/boot-source/kernel_image_path";
    let disk = "/drives/1/path_on_host";
    vec![
        ("an empty kernel", kernel, json!("@empty"), &["kernel_image_path"]),
        ("a kernel of the wrong format", kernel, json!("@text"), &["kernel_image_path"]),
        ("a truncated kernel", kernel, json!("@half"), &["kernel_image_path", "truncated"]),
        ("no kernel", kernel, json!("@none"), &["kernel_image_path", "none\"", "No such file"]),
        ("a directory for a kernel", kernel, json!("@"), &["kernel_image_path"]),
        ("no initrd", "/boot-source/initrd_path", json!("@none"), &["initrd_path", "none\"", "No such file"]),
        ("no disk", disk, json!("@none"), &["path_on_host", "none\"", "No such file"]),
        ("a disk of half a sector", disk, json!("@odd.img"), &["drive data", "odd.img", "512"]),
        ("an empty disk", disk, json!("@empty"), &["drive data", "empty"]),
        ("a disk in use", disk, json!("@busy.img"), &["drive data", "busy.img"]),
        ("two roots", "/drives/1/is_root_device", json!(true), &["data", "root"]),
        ("no memory", "/machine-config/mem_size_mib", json!(0), &["mem_size_mib"]),
        ("too little memory", "/machine-config/mem_size_mib", json!(4), &["mem_size_mib"]),
        (
            "more memory than the host has",
            "/machine-config/mem_size_mib",
            json!(1 << 19),
            &["mem_size_mib 524288", "host"],
        ),
        ("more memory than there is", "/machine-config/mem_size_mib", json!(1u64 << 50), &["mem_size_mib"]),
        ("no vCPUs", "/machine-config/vcpu_count", json!(0), &["vcpu_count"]),
        ("too many vCPUs", "/machine-config/vcpu_count", json!(33), &["vcpu_count"]),
        ("more vCPUs than a number holds", "/machine-config/vcpu_count", json!(1000), &["1000"]),
        ("a field of the wrong type", "/machine-config/vcpu_count", json!("two"), &["two"]),
        ("an unknown field", "/machine-config/colour", json!("red"), &["colour"]),
        ("an unknown section", "/colours", json!({}), &["colours"]),
        (
            "an oversized command line",
            "/boot-source/boot_args",
            json!("x".repeat(3000)),
            &["boot_args", "3000"],
        ),
        (
            "a place no socket can be in",
            "/vsock/uds_path",
            json!("/no/such/place"),
            &["uds_path", "/no/such/place"],
        ),
        (
            "an absent tap",
            "/network-interfaces",
            json!([{"iface_id": "n", "host_dev_name": "tap7"}]),
            &["host_dev_name", "tap7"],
        ),
        (
            "a busy tap",
            "/network-interfaces",
            json!([{"iface_id": "n", "host_dev_name": "tap0"}]),
            &["host_dev_name", "tap0"],
        ),
        (
            "an interface that is no tap",
            "/network-interfaces",
            json!([{"iface_id": "n", "host_dev_name": "lo"}]),
            &["host_dev_name", "lo"],
        ),
        ("a balloon larger than memory", "/balloon/amount_mib", json!(500), &["balloon", "amount_mib"]),
    ]
}

fn set(config: &mut Value, pointer: &str, value: Value) {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match config.pointer_mut(pointer) {
        Some(place) => *place = value,
        None => config.pointer_mut(parent).unwrap()[name] = value,
    }
}

/// Runs the VMM on a configuration file and returns its exit code and its messages.
fn run(dir: &Path, config: &str) -> (Option<i32>, String) {
    let file = dir.join("config.json");
    std::fs::write(&file, config).unwrap();
    let output = Command::new("timeout")
        .arg("60")
        .arg(program("pulau-vmm"))
        .arg("--api-sock")
        .arg(dir.join("api.sock"))
        .arg("--config-file")
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn bad_input_ends_the_process_with_a_clear_message_and_leaves_nothing() {
    in_own_network(|| {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let kernel = std::fs::read(artifact("PULAU_TEST_KERNEL")).unwrap();
        let (half, disk) = (&kernel[..kernel.len() / 2], &[0; 4096][..]);
        for (name, bytes) in [
            ("empty", &b""[..]),
            ("text", b"this is not a kernel\n"),
            ("half", half),
            ("data.img", disk),
            ("busy.img", disk),
            ("odd.img", &disk[..700]),
        ] {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
        std::fs::write(dir.join("config.json"), "").unwrap();
        // Another microVM has the busy disk and the tap.
        let other = Vmm::start();
        other.configure(1, 128, "");
        other.put("/drives/data", drive("data", &dir.join("busy.img"), false, false)).ok();
        other.put("/network-interfaces/n", json!({"iface_id": "n", "host_dev_name": "tap0"})).ok();
        other.boot();
        other.sh("true");

        let before = Footprint::take(&[dir]);
        let taps = ip("-br link");
        let mut wrong = Vec::new();
        let mut check = |what: &str, config: &str, messages: &[&str]| {
            let (code, log) = run(dir, config);
            if ![ExitCode::Error as i32, ExitCode::BadConfiguration as i32].map(Some).contains(&code) {
                wrong.push(format!("{what}: exit code {code:?}: {log}"));
            }
            for message in messages.iter().filter(|message| !log.contains(**message)) {
                wrong.push(format!("{what}: the message does not say {message:?}: {log}"));
            }
            let left = Footprint::take(&[dir]).left_since(&before);
            if !left.is_empty() || ip("-br link") != taps {
                wrong.push(format!("{what}: left behind: {left:?}"));
            }
        };
        check("malformed JSON", "{\"boot-source\": {", &["config.json", "line 1"]);
        check("no JSON", "colour = red", &["config.json", "line 1"]);
        check("an empty file", "", &["config.json"]);
        for (what, pointer, value, messages) in cases() {
            let mut config = good(dir);
            let value = match value.as_str().and_then(|text| text.strip_prefix('@')) {
                Some(name) => json!(dir.join(name)),
                None => value,
            };
            set(&mut config, pointer, value);
            check(what, &config.to_string(), messages);
        }
        assert_eq!(wrong, Vec::<String>::new());

        // What all of them were made of is good.
        let mut config = good(dir);
        set(&mut config, "/boot-source/boot_args", json!("panic=-1 reboot=k quiet init=/bin/true"));
        let (code, log) = run(dir, &config.to_string());
        assert_eq!(code, Some(ExitCode::GuestPanic as i32), "{log}");
        assert_eq!(Footprint::take(&[dir]).left_since(&before), Vec::<String>::new());
    });
}
