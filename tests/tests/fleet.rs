//! Ports of the host behind which real guests are: published ones, and a load balancer over a group that is
//! rolled meanwhile.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pulau_tests::daemon::Daemon;
use pulau_tests::network::{in_empty_network, ip};
use pulau_tests::{PATIENCE, api, wait_for};
use serde_json::Value;

/// Between two looks at something.
const LOOK: Duration = Duration::from_millis(500);

/// An address of the host's.
const HOST: &str = "203.0.113.1";

/// What a server says by HTTP, its last line; None if it does not answer well.
fn get(at: &str) -> Option<String> {
    let at: SocketAddr = at.parse().ok()?;
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(10)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let well = answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200");
    well.then(|| answer.lines().last().unwrap_or_default().to_owned())
}

fn host(port: u16) -> Option<String> {
    get(&format!("{HOST}:{port}"))
}

/// Has a guest's server say this.
fn serve(daemon: &Daemon, id: &str, text: &str) {
    daemon.sh(id, &format!("mkdir -p /www && echo {text} > /www/index.html && httpd -p 80 -h /www"));
}

#[test]
fn a_published_port_leads_to_its_instance() {
    in_empty_network(|| {
        ip(&format!("addr add {HOST}/32 dev lo"));
        let mut daemon = Daemon::start();
        let id = daemon.run(&["--publish", "8080:80"]);
        serve(&daemon, &id, "guest");
        assert_eq!(wait_for("the guest by the host's port", PATIENCE, || host(8080)), "guest");
        // Another port, taken back again; the first one stays.
        daemon.pulau(&["instance", "publish", &id, &format!("{HOST}:8081:80")]);
        assert_eq!(wait_for("another port", PATIENCE, || host(8081)), "guest");
        daemon.pulau(&["instance", "unpublish", &id, &format!("{HOST}:8081:80")]);
        wait_for("its end", PATIENCE, || host(8081).is_none().then_some(()));
        let refused = daemon.try_pulau(&["instance", "run", "--image", "minimal", "--publish", "8080:80"]);
        assert!(String::from_utf8_lossy(&refused.stderr).contains("(PortInUse)"), "{refused:?}");
        // It does not depend on the daemon, and the next one takes it over.
        daemon.kill();
        assert_eq!(host(8080).as_deref(), Some("guest"));
        daemon.restart(&[]);
        assert_eq!(host(8080).as_deref(), Some("guest"));
        daemon.pulau(&["instance", "terminate", &id, "--wait"]);
        assert_eq!(host(8080), None);
        let list = ["list", "map", "inet", "pl", "published_anywhere"];
        let elements = std::process::Command::new("nft").args(list).output().unwrap();
        assert!(!String::from_utf8_lossy(&elements.stdout).contains("8080"), "{elements:?}");
    });
}

/// What the API says of something. Cheaper than a command, for those who ask again and again.
fn show(daemon: &Daemon, path: &str) -> Value {
    api::request(&daemon.path("api.sock"), "GET", path, "").expect("an answer").ok()
}

fn members(daemon: &Daemon) -> Vec<Value> {
    show(daemon, "/v1/groups/web")["members"].as_array().cloned().unwrap_or_default()
}

fn wait_until_active(daemon: &Daemon) {
    wait_for("the group", 3 * PATIENCE, || {
        std::thread::sleep(LOOK);
        (show(daemon, "/v1/groups/web")["state"] == "active").then_some(())
    });
}

/// Starts the server in every member that comes up, as what configures machines would. It says of which template
/// it is.
fn provision(daemon: &Daemon, ended: &AtomicBool) {
    let mut done = BTreeSet::new();
    while !ended.load(Ordering::Relaxed) {
        for member in members(daemon) {
            let Some(id) = member["instance_id"].as_str().map(str::to_owned) else { continue };
            if !done.contains(&id) && show(daemon, &format!("/v1/instances/{id}"))["status"]["agent"] == "ok"
            {
                serve(daemon, &id, &format!("v{}", member["template_version"]));
                done.insert(id);
            }
        }
        std::thread::sleep(LOOK);
    }
}

#[test]
fn a_group_behind_a_load_balancer_is_rolled_and_no_request_fails() {
    in_empty_network(|| {
        ip(&format!("addr add {HOST}/32 dev lo"));
        let mut daemon = Daemon::start();
        let (kernel, root) = ("PULAU_TEST_KERNEL", "PULAU_TEST_ROOTFS_MINIMAL");
        let [kernel, root] = [kernel, root].map(|name| std::env::var(name).unwrap());
        daemon.pulau(&["image", "import", "minimal-2", "--kernel", &kernel, "--root", &root]);
        let pulau = |command: &str| daemon.pulau(&command.split(' ').collect::<Vec<_>>());
        pulau(
            "group create web --image minimal --root-size 1 --desired 2 --health-check load-balancer --grace 900",
        );
        pulau(&format!(
            "load-balancer create web --listen {HOST}:80 --group web --health-path / --health-interval 1"
        ));
        let (ended, failed, served) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            // Also if something fails in here, those who are waited for come to an end.
            struct End<'a>(&'a AtomicBool);
            impl Drop for End<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let end = End(&ended);
            scope.spawn(|| provision(&daemon, &ended));
            wait_until_active(&daemon);
            assert_eq!(members(&daemon).len(), 2);
            assert_eq!(host(80).as_deref(), Some("v1"));
            measure(&daemon);

            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let stopping = End(&stop);
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        match host(80) {
                            Some(_) => served.fetch_add(1, Ordering::Relaxed),
                            None => failed.fetch_add(1, Ordering::Relaxed),
                        };
                    }
                });
                let output = daemon.try_pulau(&["group", "roll", "web", "--image", "minimal-2"]);
                eprintln!("{}", String::from_utf8_lossy(&output.stderr));
                assert!(output.status.success(), "{output:?}");
                wait_until_active(&daemon);
                drop(stopping);
            });
            drop(end);
        });
        let (failed, served) = (failed.into_inner(), served.into_inner());
        eprintln!("{served} requests during the roll, {failed} of them failed");
        assert!(failed == 0 && served > 10);
        assert_eq!(host(80).as_deref(), Some("v2"));

        // The next daemon takes it up, with what is known of the targets.
        daemon.kill();
        assert_eq!(host(80), None);
        daemon.restart(&[]);
        assert_eq!(wait_for("the load balancer", PATIENCE, || host(80)), "v2");
        let refused = daemon.try_pulau(&["group", "delete", "web"]);
        assert!(String::from_utf8_lossy(&refused.stderr).contains("(DependencyViolation)"), "{refused:?}");
        daemon.pulau(&["load-balancer", "delete", "web"]);
        daemon.pulau(&["group", "delete", "web"]);
        wait_for("the group to go", PATIENCE, || {
            std::thread::sleep(LOOK);
            (show(&daemon, "/v1/groups")["items"] == serde_json::json!([]) && daemon.machines().is_empty())
                .then_some(())
        });
    });
}

/// Prints what the load balancer costs: one client, a connection for each request, beside the guest itself.
fn measure(daemon: &Daemon) {
    const REQUESTS: u32 = 30;
    let id = members(daemon)[0]["instance_id"].as_str().unwrap().to_owned();
    let guest = format!("{}:80", daemon.show(&id)["interface"]["private_address"].as_str().unwrap());
    let time = |at: &str| {
        let begun = Instant::now();
        for _ in 0..REQUESTS {
            assert!(get(at).is_some());
        }
        begun.elapsed() / REQUESTS
    };
    let balancer = format!("{HOST}:80");
    // By turns, so that whatever else the machine does meets both.
    let (mut direct, mut balanced) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..3 {
        direct += time(&guest) / 3;
        balanced += time(&balancer) / 3;
    }
    eprintln!(
        "a request takes {direct:?} directly and {balanced:?} by the load balancer: {:.2} times as long",
        balanced.as_secs_f64() / direct.as_secs_f64()
    );
}
