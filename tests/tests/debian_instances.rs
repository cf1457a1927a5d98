//! Instances of the Debian image: they take their key and user data, let their user in by ssh, and update themselves.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pulau_tests::daemon::Daemon;
use pulau_tests::network::in_empty_network;
use pulau_tests::{PATIENCE, artifact, wait_for};
use serde_json::Value;

/// systemd and cloud-init do much, in guests that may be emulated twice.
const LONG: Duration = PATIENCE.saturating_mul(6);

/// Starts an instance without waiting for it; its id.
fn start(daemon: &Daemon, arguments: &[&str]) -> String {
    let all = [&["instance", "run", "--image", "debian", "--type", "small", "--key-name", "me"], arguments]
        .concat();
    daemon.json(&all)["items"][0]["id"].as_str().expect("an id").to_owned()
}

/// Waits for the agent of an instance's boot number `generation`.
fn agent(daemon: &Daemon, id: &str, generation: u64) {
    wait_for("the agent", LONG, || {
        let shown = daemon.show(id);
        let there = shown["generation"] == generation && shown["status"]["agent"] == "ok";
        there.then_some(()).or_else(|| {
            std::thread::sleep(Duration::from_millis(500));
            None
        })
    });
}

/// Waits until a guest's systemd and cloud-init have done all they do at a boot.
fn booted(daemon: &Daemon, id: &str, status: &str) {
    wait_for("the guest's boot", LONG, || {
        let state = daemon.sh(id, "systemctl is-system-running || :; cloud-init status || :");
        assert!(
            !state.contains("degraded") && !state.contains("error"),
            "{state}\n{}",
            daemon.sh(id, "systemctl --failed")
        );
        if state == format!("running\nstatus: {status}\n") {
            return Some(());
        }
        std::thread::sleep(Duration::from_secs(1));
        None
    });
}

fn ssh(daemon: &Daemon, id: &str, key: &Path, command: &str) -> String {
    let key = key.to_str().unwrap();
    daemon.pulau(&["instance", "ssh", id, "--identity", key, "--", command])
}

fn host_keys(daemon: &Daemon, id: &str) -> Vec<Value> {
    daemon.json(&["instance", "ssh", id])["host_keys"].as_array().expect("keys").clone()
}

/// Updates instances; what came of it.
fn patched(daemon: &Daemon, arguments: &[&str]) -> Value {
    let begun = daemon.json(&[&["instance", "patch", "--no-wait"], arguments].concat());
    let id = begun["id"].as_str().expect("an id");
    wait_for("the update", LONG, || {
        let patch = daemon.json(&["instance", "patches", id]);
        std::thread::sleep(Duration::from_millis(500));
        patch["finished"].is_string().then_some(patch)
    })
}

/// A cloud-config and a script, as MIME parts.
const USER_DATA: &str = r#"MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="part"

--part
Content-Type: text/cloud-config

#cloud-config
write_files:
- path: /etc/made
  content: by cloud-config
runcmd:
- echo once >>/root/ran
--part
Content-Type: text/x-shellscript

#!/bin/sh
echo script >>/root/ran
whoami
--part--
"#;

/// A repository in the guest with a package of two versions, of which the first is installed: tests need no network.
const REPOSITORY: &str = r#"set -e
    mkdir -p /srv/repo
    cd /srv/repo
    for version in 1 2; do
        rm -rf p && mkdir -p p/DEBIAN
        printf '#!/bin/sh\n[ "$2" != 1 ] || touch /run/reboot-required\n' >p/DEBIAN/postinst
        chmod +x p/DEBIAN/postinst
        printf 'Package: greet\nVersion: %s\nArchitecture: all\nMaintainer: t <t@example.org>\nDescription: t\n' $version >p/DEBIAN/control
        dpkg-deb --build --root-owner-group p greet_$version.deb >/dev/null
    done
    { cat p/DEBIAN/control; echo Filename: ./greet_2.deb; echo Size: $(stat -c %s greet_2.deb); echo SHA256: $(sha256sum <greet_2.deb | cut -d' ' -f1); } >Packages
    echo 'deb [trusted=yes] file:/srv/repo ./' >/etc/apt/sources.list
    dpkg -i greet_1.deb >/dev/null"#;

/// Pulau's own package, installed in a guest that has systemd, and no KVM: the daemon only pretends there. That real VMMs
/// outlive it is for the tests of adoption.
fn packaged(daemon: &Daemon, id: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/package");
    let made = Command::new(script).arg(daemon.path("package")).output().expect("it runs");
    assert!(made.status.success(), "{made:?}");
    let package = String::from_utf8(made.stdout).unwrap();
    daemon.pulau(&["instance", "cp", package.trim(), &format!("{id}:/root/pulau.deb")]);
    let serve = |options: &str| {
        daemon.sh(id, &format!("echo 'PULAU_SERVE_OPTIONS=\"{options}\"' >/etc/default/pulau"))
    };
    serve("--simulate");
    daemon.sh(id, "dpkg --force-confold -i /root/pulau.deb 2>&1 && rm /root/pulau.deb");
    assert_eq!(daemon.sh(id, "systemd-analyze verify --man=no pulau.service 2>&1"), "");
    assert_eq!(
        daemon.sh(id, "systemctl show -p KillMode,SubState pulau"),
        "KillMode=process\nSubState=running\n"
    );
    let list = "pulau instance list; pulau doctor --check vmm >/dev/null; ls /usr/share/bash-completion/completions/pulau";
    assert!(
        daemon
            .sh(id, list)
            .ends_with("STATE  TYPE  ADDRESS  IMAGE\n/usr/share/bash-completion/completions/pulau\n")
    );
    daemon.sh(id, "pulau key-pair create kept >/dev/null");
    serve("--simulate --vcpus 7");
    daemon.sh(id, "systemctl restart pulau");
    let host: Value = serde_json::from_str(&daemon.sh(id, "pulau host show --json")).expect("JSON");
    assert_eq!(host["capacity"]["vcpus"], 7, "{host}");
    assert!(daemon.sh(id, "pulau key-pair list").contains("kept"));
    daemon.sh(id, "pkill -9 -x pulau; for i in $(seq 300); do pulau instance list 2>/dev/null && exit; sleep 0.1; done; exit 1");
    daemon.sh(id, "dpkg -r pulau 2>&1");
    assert_eq!(
        daemon.sh(id, "systemctl is-active pulau || :; ls /var/lib/pulau/store.redb"),
        "inactive\n/var/lib/pulau/store.redb\n"
    );
}

#[test]
fn debian_takes_keys_and_user_data_once_and_is_updated() {
    in_empty_network(|| {
        let daemon = Daemon::start();
        let image = |name: &str| artifact(name).to_string_lossy().into_owned();
        let (kernel, root) = (image("PULAU_TEST_KERNEL"), image("PULAU_TEST_ROOTFS_DEBIAN"));
        daemon.pulau(&["image", "import", "debian", "--kernel", &kernel, "--root", &root]);
        let key = daemon.path("key");
        daemon.pulau(&["key-pair", "create", "me", "--output", key.to_str().unwrap()]);
        let file = |name: &str, text: &str| {
            let path = daemon.path(name);
            std::fs::write(&path, text).unwrap();
            path.to_string_lossy().into_owned()
        };
        let configured = start(&daemon, &["--user-data", &file("data", USER_DATA), "--tag", "Name=conf"]);
        let plain = start(&daemon, &[]);
        for id in [&configured, &plain] {
            agent(&daemon, id, 1);
        }

        // By ssh, as the user whose key it is; with host keys that no other has.
        assert_eq!(ssh(&daemon, &configured, &key, "whoami; hostname; sudo whoami"), "debian\nconf\nroot\n");
        assert_eq!(ssh(&daemon, &plain, &key, "whoami"), "debian\n");
        let (ours, theirs) = (host_keys(&daemon, &configured), host_keys(&daemon, &plain));
        assert!(!ours.is_empty() && ours.iter().all(|key| !theirs.contains(key)), "{ours:?} {theirs:?}");
        let stranger = daemon.path("stranger");
        daemon.pulau(&["key-pair", "create", "other", "--output", stranger.to_str().unwrap()]);
        let refused = ["instance", "ssh", &plain, "-i", stranger.to_str().unwrap(), "--", "true"];
        assert_eq!(daemon.try_pulau(&refused).status.code(), Some(255));

        // User data has run, both kinds of it; cloud-init is off where there is none.
        booted(&daemon, &configured, "done");
        assert_eq!(
            ssh(&daemon, &configured, &key, "sudo cat /root/ran /etc/made"),
            "script\nonce\nby cloud-config"
        );
        assert!(daemon.sh(&configured, "cat /var/log/cloud-init-output.log").contains("root\n"));
        booted(&daemon, &plain, "disabled");
        packaged(&daemon, &plain);

        // Updates, one of which needs a reboot; at the next boot nothing is done again.
        let without = daemon.run(&[]);
        daemon.sh(&configured, REPOSITORY);
        let report = patched(&daemon, &["--reboot", &configured, &without]);
        let [updated, minimal] = &report["instances"].as_array().unwrap()[..] else { panic!("{report}") };
        assert_eq!(
            (&updated["state"], &updated["rebooted"]),
            (&"succeeded".into(), &true.into()),
            "{report}"
        );
        let greet = serde_json::json!({"name": "greet", "old_version": "1", "new_version": "2"});
        assert_eq!(updated["packages"], serde_json::json!([greet]), "{report}");
        assert!(updated["output"].as_str().unwrap().contains("Setting up greet (2)"), "{report}");
        assert_eq!(minimal["state"], "failed");
        assert!(minimal["message"].as_str().unwrap().contains("no package manager"), "{report}");
        booted(&daemon, &configured, "done");
        assert_eq!(ssh(&daemon, &configured, &key, "sudo cat /root/ran"), "script\nonce\n");
        assert_eq!(host_keys(&daemon, &configured), ours);
        // One that fails says why.
        daemon.sh(&configured, "echo 'deb [trusted=yes] file:/srv/nothing ./' >/etc/apt/sources.list");
        let report = patched(&daemon, &[&configured]);
        let failed = &report["instances"][0];
        assert!(
            failed["state"] == "failed" && failed["output"].as_str().unwrap().contains("/srv/nothing"),
            "{report}"
        );
    });
}
