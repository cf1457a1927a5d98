//! Instances of the Debian image: they take their key and user data, let their user in by ssh, and update themselves.

use std::path::Path;
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

const CLOUD_CONFIG: &str = "#cloud-config
write_files:
- path: /etc/made
  content: by cloud-config
runcmd:
- echo once >>/root/ran
";

const SCRIPT: &str = "#!/bin/sh
echo once >>/root/ran
whoami
";

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
        let configured =
            start(&daemon, &["--user-data", &file("config", CLOUD_CONFIG), "--tag", "Name=conf"]);
        let scripted = start(&daemon, &["--user-data", &file("script", SCRIPT)]);
        for id in [&configured, &scripted] {
            agent(&daemon, id, 1);
        }

        // By ssh, as the user whose key it is; with host keys that no other has.
        assert_eq!(ssh(&daemon, &configured, &key, "whoami; hostname; sudo whoami"), "debian\nconf\nroot\n");
        assert_eq!(ssh(&daemon, &scripted, &key, "whoami"), "debian\n");
        let (ours, theirs) = (host_keys(&daemon, &configured), host_keys(&daemon, &scripted));
        assert!(!ours.is_empty() && ours.iter().all(|key| !theirs.contains(key)), "{ours:?} {theirs:?}");
        let stranger = daemon.path("stranger");
        daemon.pulau(&["key-pair", "create", "other", "--output", stranger.to_str().unwrap()]);
        let refused = ["instance", "ssh", &scripted, "-i", stranger.to_str().unwrap(), "--", "true"];
        assert_eq!(daemon.try_pulau(&refused).status.code(), Some(255));

        // User data has run, both kinds of it.
        for id in [&configured, &scripted] {
            booted(&daemon, id, "done");
            assert_eq!(ssh(&daemon, id, &key, "sudo cat /root/ran"), "once\n");
        }
        assert_eq!(daemon.sh(&configured, "cat /etc/made"), "by cloud-config");
        assert!(daemon.sh(&scripted, "cat /var/log/cloud-init-output.log").contains("root\n"));

        // Updates, one of which needs a reboot; at the next boot nothing is done again.
        let without = daemon.run(&[]);
        daemon.sh(&scripted, REPOSITORY);
        let report = daemon.try_pulau(&["instance", "patch", "--json", "--reboot", &scripted, &without]);
        let report: Value = serde_json::from_slice(&report.stdout).expect("JSON");
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
        booted(&daemon, &scripted, "done");
        assert_eq!(ssh(&daemon, &scripted, &key, "sudo cat /root/ran"), "once\n");
        assert_eq!(host_keys(&daemon, &scripted), theirs);
        // One that fails says why.
        daemon.sh(&scripted, "echo 'deb [trusted=yes] file:/srv/nothing ./' >/etc/apt/sources.list");
        let failed = daemon.try_pulau(&["instance", "patch", &scripted]);
        let text = String::from_utf8_lossy(&failed.stdout);
        assert!(failed.status.code() == Some(1) && text.contains("/srv/nothing"), "{failed:?}");
    });
}
