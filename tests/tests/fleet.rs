//! Ports of the host that lead to real guests.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use pulau_tests::daemon::Daemon;
use pulau_tests::network::{in_empty_network, ip};
use pulau_tests::{PATIENCE, wait_for};

/// An address of the host's.
const HOST: &str = "203.0.113.1";

/// What a server says by HTTP; None if it does not answer.
fn get(port: u16) -> Option<String> {
    let at = format!("{HOST}:{port}").parse().ok()?;
    let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.0 200").then(|| answer.lines().last().unwrap_or_default().to_owned())
}

#[test]
fn a_published_port_leads_to_its_instance() {
    in_empty_network(|| {
        ip(&format!("addr add {HOST}/32 dev lo"));
        let mut daemon = Daemon::start();
        let id = daemon.run(&["--publish", "8080:80"]);
        daemon.sh(&id, "mkdir -p /www && echo guest > /www/index.html && httpd -p 80 -h /www");
        assert_eq!(wait_for("the guest by the host's port", PATIENCE, || get(8080)), "guest");
        // Another port, taken back again; the first one stays.
        daemon.pulau(&["instance", "publish", &id, &format!("{HOST}:8081:80")]);
        assert_eq!(wait_for("another port", PATIENCE, || get(8081)), "guest");
        daemon.pulau(&["instance", "unpublish", &id, &format!("{HOST}:8081:80")]);
        wait_for("its end", PATIENCE, || get(8081).is_none().then_some(()));
        let refused = daemon.try_pulau(&["instance", "run", "--image", "minimal", "--publish", "8080:80"]);
        assert!(String::from_utf8_lossy(&refused.stderr).contains("(PortInUse)"), "{refused:?}");
        // It does not depend on the daemon, and the next one takes it over.
        daemon.kill();
        assert_eq!(get(8080).as_deref(), Some("guest"));
        daemon.restart(&[]);
        assert_eq!(get(8080).as_deref(), Some("guest"));
        daemon.pulau(&["instance", "terminate", &id, "--wait"]);
        assert_eq!(get(8080), None);
        let elements =
            std::process::Command::new("nft").args(["list", "map", "inet", "pl", "published_anywhere"]);
        let elements = { elements }.output().unwrap();
        assert!(!String::from_utf8_lossy(&elements.stdout).contains("8080"), "{elements:?}");
    });
}
