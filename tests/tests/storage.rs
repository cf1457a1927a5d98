//! Disks and images as users have them, with real guests: through the daemon and its command line.

use std::time::Instant;

use pulau_tests::container::{ContainerImage, PROGRAM, Registry};
use pulau_tests::daemon::Daemon;
use pulau_tests::network::in_empty_network;
use pulau_tests::{PATIENCE, artifact, wait_for};
use serde_json::Value;

fn id(item: &Value) -> String {
    item["id"].as_str().expect("an id").to_owned()
}

/// The first of what a command lists or makes.
fn first(daemon: &Daemon, arguments: &[&str]) -> Value {
    daemon.json(arguments)["items"][0].clone()
}

/// Finds a disk in a guest as its users do, by its serial number, and mounts it.
fn mount(daemon: &Daemon, instance: &str, volume: &str) -> String {
    let serial = volume.replace('-', "");
    let find = format!("grep -lx {serial} /sys/block/*/serial | cut -d / -f 4");
    let device = daemon.sh(instance, &find).trim().to_owned();
    daemon.sh(instance, &format!("mkdir -p /mnt/{device}; mount /dev/{device} /mnt/{device}"));
    device
}

/// A command that is refused; what it said.
fn refused(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = daemon.try_pulau(arguments);
    assert!(!output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_volume_goes_from_one_guest_to_another_and_a_snapshot_stays_as_it_was() {
    in_empty_network(|| {
        let mut daemon = Daemon::start();
        let data = id(&first(&daemon, &["volume", "create", "--size", "1", "--tag", "Name=data"]));
        let a = daemon.run(&["--volume", &format!("id={data}")]);
        assert_eq!(daemon.sh(&a, "cat /sys/block/vdc/serial").trim(), data.replace('-', ""));
        daemon.sh(&a, "mke2fs -q /dev/vdc");
        assert_eq!(mount(&daemon, &a, &data), "vdc");
        daemon.sh(&a, "echo first > /mnt/vdc/file");

        // The guest is asked to write it out, and goes on afterwards.
        let boot = daemon.sh(&a, "cat /proc/sys/kernel/random/boot_id");
        let begun = Instant::now();
        let snapshot = id(&first(&daemon, &["snapshot", "create", &data]));
        eprintln!("snapshot of a running instance: {:?}", begun.elapsed());
        assert_eq!(daemon.sh(&a, "cat /proc/sys/kernel/random/boot_id"), boot);
        daemon.sh(&a, "echo later > /mnt/vdc/file; umount /mnt/vdc");

        // A daemon that dies while the guest is paused for a copy: the next one has it go on, and there is no copy.
        daemon.kill();
        daemon.restart(&[("PULAU_FAULT", "disk.held:1")]);
        let _ = daemon.try_pulau(&["snapshot", "create", &data]);
        wait_for("the daemon to die", PATIENCE, || daemon.has_died().then_some(()));
        daemon.restart(&[]);
        assert_eq!(daemon.sh(&a, "cat /proc/sys/kernel/random/boot_id"), boot);
        let cut_short = first(&daemon, &["snapshot", "list", "--filter", "state=error"]);
        assert_eq!(cut_short["state_reason"]["code"], "Server.Interrupted", "{cut_short}");
        let files = std::fs::read_dir(daemon.path("data/snapshots")).expect("snapshots").flatten();
        assert_eq!(files.filter(|file| file.path().is_file()).count(), 1);

        assert!(refused(&daemon, &["volume", "detach", &data]).contains("IncorrectInstanceState"));
        assert!(refused(&daemon, &["volume", "delete", &data]).contains("VolumeInUse"));
        daemon.pulau(&["instance", "stop", &a, "--wait"]);
        daemon.pulau(&["volume", "detach", &data]);
        daemon.pulau(&["volume", "resize", &data, "2"]);

        // In another guest, with what the snapshot has beside it.
        let b = daemon.run(&["--volume", &format!("snapshot={snapshot}")]);
        let attach = ["volume", "attach", &data, &b];
        assert!(
            refused(&daemon, &attach).contains("IncorrectInstanceState"),
            "a running guest has its disks"
        );
        daemon.pulau(&["instance", "stop", &b, "--wait"]);
        daemon.pulau(&attach);
        daemon.pulau(&["instance", "start", &b]);
        daemon.pulau(&["instance", "wait", &b, "running", "--agent", "--timeout", "120"]);
        let restored = id(&first(&daemon, &["volume", "list", "--filter", &format!("snapshot={snapshot}")]));
        let (restored, moved) = (mount(&daemon, &b, &restored), mount(&daemon, &b, &data));
        assert_eq!((restored.as_str(), moved.as_str()), ("vdc", "vdd"), "in the order in which they came");
        assert_eq!(daemon.sh(&b, "cat /mnt/vdc/file /mnt/vdd/file"), "first\nlater\n");
        assert_eq!(daemon.sh(&b, "cat /sys/block/vdd/size").trim(), (2 << 21).to_string(), "it has grown");

        // What was made for an instance goes with it, and what was attached stays.
        daemon.pulau(&["instance", "terminate", &b, "--wait"]);
        let left = || {
            let all = daemon.json(&["volume", "list", "--filter", "state=available|in-use|deleting"]);
            all["items"].as_array().expect("a list").clone()
        };
        // The root disk of `a`, and the volume.
        wait_for("the disks to go", PATIENCE, || (left().len() == 2).then_some(()));
        let kept = first(&daemon, &["volume", "list", "--filter", &format!("id={data}")]);
        assert_eq!(kept["state"], "available", "{kept}");
        daemon.pulau(&["volume", "delete", &data]);
        daemon.pulau(&["snapshot", "delete", &snapshot]);
    });
}

#[test]
fn a_container_image_from_a_registry_runs_and_so_does_an_image_of_its_instance() {
    in_empty_network(|| {
        let daemon = Daemon::start();
        let registry = Registry::start();
        let reference = registry.push("app", &ContainerImage::new());
        let kernel = artifact("PULAU_TEST_KERNEL").to_string_lossy().into_owned();
        let import = ["image", "import", "app", "--kernel", &kernel, "--reference", &reference];
        let image = daemon.json(&import);
        assert_eq!(
            (&image["state"], &image["source"]["reference"]),
            (&"available".into(), &reference.as_str().into())
        );
        let wrong = format!("{}/none:1", registry.address);
        let none = refused(&daemon, &["image", "import", "none", "--kernel", &kernel, "--reference", &wrong]);
        assert!(none.contains("Client.InvalidImageReference.NotFound"), "{none}");

        let run = ["instance", "run", "--image", "app", "--wait", "--root-size", "1"];
        let a = id(&first(&daemon, &run));
        let version = daemon.pulau(&["instance", "exec", &a, "--", PROGRAM, "--version"]);
        assert!(version.starts_with("pulau-vmm"), "{version}");
        assert!(refused(&daemon, &["image", "delete", "app"]).contains("InvalidImage.InUse"));

        // There is no shell in it, but the agent. It is paused while its disk is copied, and goes on.
        let (file, copied) = (daemon.path("kept"), daemon.path("copied"));
        std::fs::write(&file, "kept").expect("a file");
        let inside = |instance: &str| format!("{instance}:/etc/kept");
        daemon.pulau(&["instance", "cp", &file.to_string_lossy(), &inside(&a)]);
        daemon.pulau(&["instance", "stop", &a, "--wait"]);
        let begun = Instant::now();
        daemon.pulau(&["image", "create", "golden", &a]);
        eprintln!("image of a stopped instance with a disk of 1 GiB: {:?}", begun.elapsed());
        daemon.pulau(&["instance", "terminate", &a, "--wait"]);
        let run = ["instance", "run", "--image", "golden", "--wait", "--root-size", "1"];
        let b = id(&first(&daemon, &run));
        daemon.pulau(&["instance", "cp", &inside(&b), &copied.to_string_lossy()]);
        assert_eq!(std::fs::read_to_string(&copied).expect("a file"), "kept");
    });
}
