//! Instances with real guests: run by the command line through a daemon, which may die.

use std::net::TcpStream;
use std::process::Command;

use pulau_tests::daemon::Daemon;
use pulau_tests::network::{in_empty_network, ip};
use pulau_tests::{PATIENCE, api, wait_for};
use serde_json::{Value, json};

fn state(instance: &Value) -> &str {
    instance["state"].as_str().unwrap_or_default()
}

/// What the daemon's network has on the host.
fn taps() -> Vec<String> {
    let text = ip("-o link");
    let names = text.lines().filter_map(|line| line.split(": ").nth(1).map(str::to_owned));
    names.filter(|name| name.starts_with("pl-")).collect()
}

#[test]
fn an_instance_lives_as_on_ec2() {
    in_empty_network(|| {
        let daemon = Daemon::start();
        let id = daemon.run(&["--tag", "Name=web", "--user-data", "/etc/os-release"]);
        let shown = daemon.show(&id);
        assert_eq!((state(&shown), shown["status"]["agent"].as_str()), ("running", Some("ok")));
        assert!(shown["boot"]["guest_init_us"].as_u64().is_some_and(|us| us > 0), "{shown}");
        assert_eq!(daemon.sh(&id, "hostname"), "web\n");
        assert_eq!(daemon.sh(&id, "cat").as_str(), "");

        // Its network: the host reaches it, it reaches its gateway, and its name is known.
        let address = shown["interface"]["private_address"].as_str().unwrap().to_owned();
        let ping = Command::new("ping").args(["-c", "2", "-W", "20", &address]).output().unwrap();
        assert!(ping.status.success(), "{ping:?}\n{}", daemon.log());
        daemon.sh(&id, "ping -c 2 -W 20 10.77.0.1");
        assert!(daemon.sh(&id, "nslookup web.default.internal").contains(&address));

        // Its metadata, as EC2 gives it.
        let token = daemon.sh(
            &id,
            "printf 'PUT /latest/api/token HTTP/1.0\\r\\nX-aws-ec2-metadata-token-ttl-seconds: 60\\r\\n\\r\\n' \
             | nc 169.254.169.254 80 | tail -n 1",
        );
        let get = |path: &str| {
            daemon.sh(
                &id,
                &format!(
                    "printf 'GET {path} HTTP/1.0\\r\\nX-aws-ec2-metadata-token: {}\\r\\n\\r\\n' \
                     | nc 169.254.169.254 80",
                    token.trim()
                ),
            )
        };
        assert!(get("/latest/meta-data/instance-id").ends_with(&id));
        assert!(get("/latest/meta-data/local-ipv4").ends_with(&address));
        assert!(get("/latest/user-data").contains("debian"), "{}", get("/latest/user-data"));

        // What it writes stays, across a reboot and a stop.
        daemon.sh(&id, "echo kept > /root/file; sync");
        daemon.pulau(&["instance", "reboot", &id]);
        wait_for("the next boot", PATIENCE, || {
            let shown = daemon.show(&id);
            (shown["generation"] == 2 && daemon.machines() == [format!("{id}-2")]).then_some(())
        });
        daemon.pulau(&["instance", "wait", &id, "running", "--agent", "--timeout", "120"]);
        assert_eq!(daemon.sh(&id, "cat /root/file"), "kept\n");
        daemon.pulau(&["instance", "stop", &id, "--wait"]);
        assert_eq!((daemon.machines().len(), taps().len()), (0, 0));
        daemon.pulau(&["instance", "start", &id]);
        daemon.pulau(&["instance", "wait", &id, "running", "--agent", "--timeout", "120"]);
        assert_eq!(daemon.sh(&id, "cat /root/file"), "kept\n");
        assert_eq!(daemon.show(&id)["interface"]["private_address"], address.as_str());
        assert!(daemon.pulau(&["instance", "console", &id]).contains("reboot: Power down"));

        daemon.pulau(&["instance", "terminate", &id, "--wait"]);
        assert_eq!((daemon.machines().len(), taps().len()), (0, 0));
        wait_for("its disk to go", PATIENCE, || {
            let disks = std::fs::read_dir(daemon.path("data/volumes")).unwrap().flatten();
            let disks = disks.filter(|disk| disk.file_name().to_string_lossy().ends_with(".raw")).count();
            (disks == 0).then_some(())
        });
    });
}

#[test]
fn a_daemon_may_die_and_instances_do_not() {
    in_empty_network(|| {
        let mut daemon = Daemon::start();
        let (stays, stops) = (daemon.run(&[]), daemon.run(&[]));
        let (goes, reboots) = (daemon.run(&[]), daemon.run(&[]));
        let before = daemon.sh(&stays, "cat /proc/sys/kernel/random/boot_id");
        daemon.kill();
        // Its guests go on meanwhile, and do as they like.
        let address = |daemon: &Daemon, id: &str| {
            daemon.show(id)["interface"]["private_address"].as_str().unwrap().to_owned()
        };
        daemon.restart(&[]);
        assert_eq!(daemon.sh(&stays, "cat /proc/sys/kernel/random/boot_id"), before, "the same boot");
        let at = address(&daemon, &stays);
        let ping = Command::new("ping").args(["-c", "1", "-W", "20", &at]).status().unwrap();
        assert!(ping.success());

        // What is acknowledged is done, whoever does it.
        daemon.pulau(&["instance", "stop", &stops]);
        daemon.pulau(&["instance", "terminate", &goes]);
        daemon.pulau(&["instance", "reboot", &reboots]);
        daemon.kill();
        daemon.restart(&[]);
        daemon.pulau(&["instance", "wait", &stops, "stopped", "--timeout", "120"]);
        daemon.pulau(&["instance", "wait", &goes, "terminated", "--timeout", "120"]);
        wait_for("the reboot", PATIENCE, || {
            daemon.machines().contains(&format!("{reboots}-2")).then_some(())
        });
        daemon.pulau(&["instance", "wait", &reboots, "running", "--agent", "--timeout", "120"]);
        assert_eq!(daemon.sh(&stays, "cat /proc/sys/kernel/random/boot_id"), before, "still the same boot");
        assert_eq!((daemon.machines().len(), taps().len()), (2, 2));

        // One that ends in order lets go of them, too.
        daemon.stop();
        assert_eq!(daemon.machines().len(), 2);
        daemon.restart(&[]);
        assert_eq!(daemon.sh(&stays, "cat /proc/sys/kernel/random/boot_id"), before);
        for id in [&stays, &reboots, &stops] {
            daemon.pulau(&["instance", "terminate", id, "--wait"]);
        }
        assert_eq!((daemon.machines().len(), taps().len()), (0, 0));
    });
}

#[test]
fn what_a_guest_does_to_itself_is_seen() {
    in_empty_network(|| {
        let daemon = Daemon::start();
        let id = daemon.run(&[]);
        let exec = |count: u32| {
            let body = json!({"argv": ["head", "-c", count.to_string(), "/dev/zero"]}).to_string();
            let path = format!("/v1/instances/{id}/exec");
            api::request(&daemon.path("api.sock"), "POST", &path, &body).expect("an answer").ok()
        };
        let (all, too_much) = (exec(1000), exec(2_000_000));
        assert_eq!((all["stdout"].as_str().unwrap().len(), &all["truncated"]), (1000, &json!(false)));
        assert_eq!(
            (too_much["stdout"].as_str().unwrap().len(), &too_much["truncated"]),
            (1 << 20, &json!(true))
        );
        let _ = daemon.try_pulau(&["instance", "exec", &id, "--", "reboot", "-f"]);
        wait_for("the guest's reboot", PATIENCE, || {
            daemon.machines().contains(&format!("{id}-2")).then_some(())
        });
        daemon.pulau(&["instance", "wait", &id, "running", "--agent", "--timeout", "120"]);
        let _ = daemon.try_pulau(&["instance", "exec", &id, "--", "poweroff", "-f"]);
        daemon.pulau(&["instance", "wait", &id, "stopped", "--timeout", "120"]);
        assert_eq!(daemon.show(&id)["state_reason"]["code"], "Client.InstanceInitiatedShutdown");
    });
}

/// One whose agent is frozen is booted anew, and one that is to be left alone is only said to be impaired.
#[test]
fn a_guest_that_does_not_answer_any_more_is_booted_anew() {
    in_empty_network(|| {
        let mut daemon = Daemon::start();
        daemon.stop();
        daemon.restart(&[("PULAU_CHECK_INTERVAL", "1")]);
        let recovers = daemon.run(&[]);
        let stays = daemon.run(&["--no-auto-recovery"]);
        for id in [&recovers, &stays] {
            // The process that serves hosts is the parent of what it runs; it has answered when it is stopped.
            daemon.sh(id, "setsid sh -c \"sleep 1; kill -STOP $PPID\" </dev/null >/dev/null 2>&1 &");
        }
        let check = |id: &str| daemon.show(id)["status"]["agent"].as_str().unwrap().to_owned();
        wait_for("the frozen agent to be missed", PATIENCE, || (check(&stays) == "impaired").then_some(()));
        wait_for("the recovery", PATIENCE, || {
            daemon.machines().contains(&format!("{recovers}-2")).then_some(())
        });
        daemon.pulau(&["instance", "wait", &recovers, "running", "--agent", "--timeout", "120"]);
        assert_eq!(daemon.sh(&recovers, "hostname").trim(), recovers);
        assert!(daemon.machines().contains(&format!("{stays}-1")), "it is left as it is");
        let events = daemon.pulau(&["host", "events"]);
        let told = events.lines().find(|line| line.contains(&recovers) && line.contains("booted anew"));
        assert!(told.is_some(), "{events}");
        daemon.pulau(&["instance", "stop", &stays, "--force", "--wait"]);
    });
}

/// What a group allows counts at once, for guests that run.
#[test]
fn a_security_group_lets_in_whom_it_names() {
    in_empty_network(|| {
        let daemon = Daemon::start();
        let api = |method: &str, path: &str, body: Value| {
            api::request(&daemon.path("api.sock"), method, path, &body.to_string()).expect("an answer").ok()
        };
        let closed = api("POST", "/v1/security-groups", json!({"name": "closed"}));
        let client = daemon.run(&[]);
        let server = daemon.run(&["--security-group", "closed"]);
        let at = daemon.show(&server)["interface"]["private_address"].as_str().unwrap().to_owned();
        // What has a session of its own stays when the command has ended.
        let listen = "setsid nc -ll -p 80 -e /bin/echo hello </dev/null >/dev/null 2>&1 & sleep 1";
        daemon.sh(&server, listen);
        let hello = || daemon.sh(&client, &format!("nc -w 5 {at} 80 </dev/null || true"));
        assert_eq!(hello(), "", "nobody may connect to its members");

        let default = daemon.show(&client)["security_groups"][0].clone();
        let rule = json!({"protocol": "tcp", "from_port": 80, "to_port": 80, "peer": {"group_id": default}});
        let path = format!("/v1/security-groups/{}", closed["id"].as_str().unwrap());
        api("PATCH", &path, json!({"ingress": [rule]}));
        wait_for("the rule to count", PATIENCE, || (hello() == "hello\n").then_some(()));
        let in_use = api::request(&daemon.path("api.sock"), "DELETE", &path, "").expect("an answer");
        assert_eq!((in_use.status, &in_use.body["error"]["code"]), (409, &json!("InvalidGroup.InUse")));
        // The host itself is the operator's.
        assert!(TcpStream::connect((at.as_str(), 80)).is_ok());
    });
}
