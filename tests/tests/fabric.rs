//! The guests' network, on a host of its own: a network namespace with an uplink to an outside, and namespaces
//! behind taps that stand in for guests. Needs root, nft, ip, ping, socat, and busybox.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pulau::network::{
    Attachment, Config, Fabric, GroupDef, NetworkDef, Peer, Plan, Ports, Published, Rule, Traffic, Transport,
};
use pulau_tests::stand_in::{Guest, Namespace};
use pulau_tests::wait_for;

const HOST: &str = "198.51.100.1";
const OUTSIDE: &str = "198.51.100.2";
const SOON: Duration = Duration::from_secs(20);

/// A host, what is outside of it, and a runtime whose threads are the host's, as is the test's own.
struct Site {
    runtime: tokio::runtime::Runtime,
    host: Namespace,
    outside: Namespace,
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Self {
        let (host, outside) = (Namespace::new("host"), Namespace::new("outside"));
        host.sh(&format!("ip link add up0 type veth peer name up0 netns {}", outside.name));
        host.sh(&format!("ip addr add {HOST}/24 dev up0 && ip link set up0 up"));
        outside.sh(&format!("ip addr add {OUTSIDE}/24 dev up0 && ip link set up0 up"));
        host.sh(&format!("ip route add default via {OUTSIDE}"));
        host.enter();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("resolv.conf"), format!("nameserver {OUTSIDE}\n")).unwrap();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build().unwrap();
        Self { runtime, host, outside, dir }
    }

    fn config(&self) -> Config {
        Config { prefix: "pl".into(), resolv_conf: self.resolv_conf() }
    }

    fn resolv_conf(&self) -> PathBuf {
        self.dir.path().join("resolv.conf")
    }

    #[track_caller]
    fn start(&self, plan: &Plan) -> Fabric {
        self.run(Fabric::start(self.config(), plan.clone())).unwrap()
    }

    fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// The stand-in of an attachment, with its address set by hand.
    fn guest(&self, attachment: &Attachment) -> Guest {
        let [a, b, c, _] = attachment.address.octets();
        let mac = attachment.mac.to_string();
        Guest::with_address(&self.host, &attachment.tap, &mac, attachment.address, [a, b, c, 1].into())
    }

    /// Everything of the host that the network is made of, without counters and numbers that the kernel gives.
    fn state(&self) -> BTreeSet<String> {
        let script = "nft -s list ruleset | sed 's/^[\t ]*//'; echo table: none; \
            ip -o link | sed 's/^[0-9]*: //; s/ qdisc.*link/ link/; s/@.*//; s/NO-CARRIER,//; s/,LOWER_UP//'; \
            ip -4 -o addr | sed 's/^[0-9]*: //; s/\\\\.*//'; ip -4 route show table all | sed 's/ linkdown//'; \
            ip -4 neigh show nud permanent";
        let text = self.host.sh(script);
        // Elements come in any order, and some have a line and others share one.
        let (mut all, mut place) = (BTreeSet::new(), String::new());
        for line in text.lines() {
            if ["table", "set", "map", "chain"].iter().any(|start| line.starts_with(start)) {
                place = format!("{line} ");
            }
            if line.starts_with("table") || !line.contains('{') && !line.contains('}') && !line.contains(',')
            {
                all.insert(format!("{place}{line}"));
            } else {
                let parts = line.split([',', '{', '}']).map(|part| part.trim().replace("elements =", ""));
                all.extend(parts.map(|part| format!("{place}{part}")));
            }
        }
        all
    }
}

/// Fails with what is in only one of two states of a host.
#[track_caller]
fn assert_same(now: &BTreeSet<String>, before: &BTreeSet<String>) {
    let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).cloned().collect::<Vec<_>>();
    let (more, less) = (only(now, before), only(before, now));
    assert!(more.is_empty() && less.is_empty(), "more: {more:#?}, less: {less:#?}");
}

fn network(id: &str, subnet: &str, nat: bool) -> NetworkDef {
    let domain = format!("{id}.internal");
    NetworkDef { id: id.into(), subnet: subnet.parse().unwrap(), nat, domain, mtu: 1500 }
}

fn attachment(tap: &str, address: &str, network: &str, groups: &[&str]) -> Attachment {
    let address: Ipv4Addr = address.parse().unwrap();
    let [a, b, c, d] = address.octets();
    Attachment {
        tap: format!("pl-{tap}"),
        mac: format!("06:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}").parse().unwrap(),
        address,
        network: network.into(),
        groups: groups.iter().map(|&group| group.into()).collect(),
        names: vec![tap.into()],
        owner: 0,
    }
}

fn allow(traffic: Traffic, peers: &[&str]) -> Rule {
    let peer = |text: &&str| match text.parse() {
        Ok(cidr) => Peer::Cidr(cidr),
        Err(_) => Peer::Group(text.to_string()),
    };
    Rule { traffic, peers: peers.iter().map(peer).collect() }
}

fn group(id: &str, ingress: Vec<Rule>) -> GroupDef {
    GroupDef { id: id.into(), ingress, egress: vec![allow(Traffic::All, &["0.0.0.0/0"])] }
}

fn open_group() -> GroupDef {
    group("open", vec![allow(Traffic::All, &["0.0.0.0/0"])])
}

/// Two networks, one of which leads outside, with three guests that may do all a guest can.
fn plan() -> Plan {
    Plan {
        networks: vec![network("red", "10.77.1.0/24", true), network("blue", "10.77.2.0/24", false)],
        groups: vec![open_group()],
        attachments: vec![
            attachment("red1", "10.77.1.4", "red", &["open"]),
            attachment("red2", "10.77.1.5", "red", &["open"]),
            attachment("blue1", "10.77.2.4", "blue", &["open"]),
        ],
        published: vec![],
    }
}

#[test]
fn guests_reach_their_own_network_and_no_other() {
    let site = Site::new();
    let plan = plan();
    let _fabric = site.start(&plan);
    let [red1, red2, blue1] = [0, 1, 2].map(|index| site.guest(&plan.attachments[index]));
    let _servers = [red2.serve(80), blue1.serve(80), site.host.serve(8000), site.outside.serve(80)];
    assert!(red1.pings("10.77.1.5") && red1.connects("10.77.1.5", 80));
    assert!(red2.pings("10.77.1.4"));
    // Full-size packets and many of them.
    red1.sh("ping -q -c 50 -i 0.002 -s 1472 -M do -W 2 10.77.1.5");
    // Another network is not there, nor are addresses that are nobody's.
    assert!(!red1.pings("10.77.2.4") && !red1.connects("10.77.2.4", 80) && !blue1.pings("10.77.1.4"));
    assert!(!red1.pings("10.77.1.99"));
    // The host answers ping on its address in the guest's network, and nothing else.
    assert!(red1.pings("10.77.1.1") && blue1.pings("10.77.2.1"));
    assert!(!red1.pings("10.77.2.1") && !red1.pings(HOST));
    assert!(!red1.connects("10.77.1.1", 8000) && !red1.connects(HOST, 8000));
    // Outside is reached under the host's address, from where that is meant to be.
    assert_eq!(red1.sh(&format!("busybox nc {OUTSIDE} 80 </dev/null")).trim(), HOST);
    assert!(red1.pings(OUTSIDE) && !blue1.pings(OUTSIDE) && !blue1.connects(OUTSIDE, 80));
    // What is outside reaches a guest only where the network leads outside, even if it knows the way.
    site.outside.sh(&format!("ip route add 10.77.0.0/16 via {HOST}"));
    assert!(site.outside.connects("10.77.1.5", 80) && !site.outside.connects("10.77.2.4", 80));
    // The host's metadata service, if it had one, is not the guests'.
    site.outside.sh("ip addr add 169.254.169.254/32 dev lo");
    assert!(!red1.pings("169.254.169.254"));
    // The host itself reaches them all.
    assert!(site.host.pings("10.77.1.4") && site.host.connects("10.77.2.4", 80));
}

#[test]
fn groups_allow_by_address_and_by_group_and_nothing_else() {
    let site = Site::new();
    let ssh = || allow(Traffic::Tcp(Ports::one(22)), &["10.77.1.6/32", "198.51.100.0/24"]);
    let web = || allow(Traffic::Tcp(Ports { from: 80, to: 81 }), &["clients"]);
    let mut plan = Plan {
        networks: vec![network("red", "10.77.1.0/24", true)],
        groups: vec![
            group("servers", vec![web(), allow(Traffic::Icmp(Some(8)), &["clients"])]),
            group("admins", vec![ssh()]),
            group("clients", vec![]),
            GroupDef {
                egress: vec![allow(Traffic::Tcp(Ports::one(80)), &["servers"])],
                ..group("tight", vec![])
            },
        ],
        attachments: vec![
            attachment("server", "10.77.1.4", "red", &["servers", "admins"]),
            attachment("client", "10.77.1.5", "red", &["clients"]),
            attachment("admin", "10.77.1.6", "red", &["clients"]),
            attachment("tight", "10.77.1.7", "red", &["tight", "admins"]),
        ],
        published: vec![],
    };
    plan.attachments[3].groups = vec!["tight".into()];
    plan.groups[0].ingress[0].peers.push(Peer::Group("tight".into()));
    plan.groups[0].ingress[1].peers.push(Peer::Group("tight".into()));
    let fabric = site.start(&plan);
    let guests: BTreeMap<String, _> =
        plan.attachments.iter().map(|a| (a.names[0].clone(), site.guest(a))).collect();
    let (server, client) = (&guests["server"], &guests["client"]);
    let _servers = [22, 80, 81, 82].map(|port| server.serve(port));
    let _server = client.serve(80);
    let open = |guest: &Namespace| [22, 80, 81, 82].map(|port| guest.connects("10.77.1.4", port));
    assert_eq!(open(client), [false, true, true, false]);
    assert_eq!(open(&guests["admin"]), [true, true, true, false]);
    assert!(client.pings("10.77.1.4"));
    // Nothing was allowed to come to clients; answers do.
    assert!(!server.pings("10.77.1.5") && !server.connects("10.77.1.5", 80));
    // What may leave is as limited.
    assert_eq!(open(&guests["tight"]), [false, true, false, false]);
    assert!(!guests["tight"].pings("10.77.1.4") && !guests["tight"].connects(OUTSIDE, 80));
    // From outside, only what was allowed by address.
    site.outside.sh(&format!("ip route add 10.77.0.0/16 via {HOST}"));
    assert_eq!(open(&site.outside), [true, false, false, false]);

    // Rules change under guests that run, and a guest its groups.
    plan.groups[0].ingress = vec![allow(Traffic::Tcp(Ports::one(82)), &["0.0.0.0/0"])];
    site.run(fabric.set_groups(plan.groups.clone())).unwrap();
    assert_eq!(open(client), [false, false, false, true]);
    plan.attachments[0].groups = vec!["admins".into()];
    site.run(fabric.attach(plan.attachments[0].clone())).unwrap();
    assert_eq!(open(client), [false; 4]);
    assert_eq!(open(&guests["admin"]), [true, false, false, false]);
    // A group in use stays, and the rules with it.
    let error = site.run(fabric.set_groups(vec![])).unwrap_err().to_string();
    assert!(error.contains("is still used by"), "{error}");
    assert_eq!(open(&guests["admin"]), [true, false, false, false]);
}

#[test]
fn nobody_sends_under_another_address() {
    let site = Site::new();
    let plan = plan();
    let _fabric = site.start(&plan);
    let (red1, red2) = (site.guest(&plan.attachments[0]), site.guest(&plan.attachments[1]));
    red1.sh("ip addr add 10.77.1.77/32 dev eth0");
    let from = |source: &str, to: &str| red1.can(&format!("ping -c 1 -W 1 -I {source} {to}"));
    assert!(from("10.77.1.4", "10.77.1.5"));
    assert!(
        !from("10.77.1.77", "10.77.1.5") && !from("10.77.1.77", OUTSIDE) && !from("10.77.1.77", "10.77.1.1")
    );
    // Nor does it take over an address by ARP, its neighbour's or the gateway's.
    red1.sh("ip addr add 10.77.1.5/32 dev eth0; ip addr add 10.77.1.1/32 dev lo; busybox arping -q -U -c 3 -I eth0 -s 10.77.1.5 10.77.1.5; \
        busybox arping -q -A -c 3 -I eth0 -s 10.77.1.1 10.77.1.1; true");
    assert!(site.host.pings("10.77.1.5") && red2.pings("10.77.1.1"));
    // However many addresses it claims, the host's table of neighbours does not grow.
    red1.sh("for i in $(seq 100 150); do ip addr add 10.77.1.$i/32 dev eth0; \
        busybox arping -q -c 1 -w 1 -I eth0 -s 10.77.1.$i 10.77.1.1 & done; wait; true");
    let neighbours = site.host.sh("ip neigh | grep -v PERMANENT | grep 'dev pl' || true");
    assert_eq!(neighbours, "");
    // The host speaks no IPv6 on taps.
    assert_eq!(site.host.sh("ip -6 addr show dev pl-red1"), "");
    red1.sh("ip -6 addr add fd77::4/64 dev eth0 nodad");
    assert!(!red1.can("ping -6 -c 1 -W 1 fd77::1"));
    // Outside cannot pass for a guest either.
    site.outside.sh(&format!("ip addr add 10.77.1.4/32 dev lo && ip route add 10.77.1.5 via {HOST}"));
    assert!(!site.outside.can("ping -c 1 -W 1 -I 10.77.1.4 10.77.1.5"));
}

#[test]
fn published_ports_lead_to_guests() {
    let site = Site::new();
    let mut plan = plan();
    plan.groups = vec![group("open", vec![])];
    plan.networks.push(network("green", "10.77.3.0/24", true));
    plan.attachments.push(attachment("green1", "10.77.3.4", "green", &["open"]));
    let fabric = site.start(&plan);
    let [red1, red2, blue1, green1] = [0, 1, 2, 3].map(|index| site.guest(&plan.attachments[index]));
    let _servers = [red1.serve(80), blue1.serve(80)];
    let port = |host_address: Option<&str>, host_port, address: &str| Published {
        protocol: Transport::Tcp,
        host_address: host_address.map(|address| address.parse().unwrap()),
        host_port,
        address: address.parse().unwrap(),
        port: 80,
    };
    let (one, any) = (port(Some(HOST), 8080, "10.77.1.4"), port(None, 8081, "10.77.2.4"));
    assert!(!site.outside.connects(HOST, 8080));
    for published in [one, any] {
        site.run(fabric.publish(published.address, vec![published])).unwrap();
        site.run(fabric.publish(published.address, vec![published])).unwrap();
    }
    let ask = |from: &Namespace, address: &str, port: u16| {
        from.sh(&format!("timeout 5 busybox nc {address} {port} </dev/null")).trim().to_owned()
    };
    // The guest sees who asks; a network that leads nowhere can be published as well.
    assert_eq!(ask(&site.outside, HOST, 8080), OUTSIDE);
    assert_eq!(ask(&site.outside, HOST, 8081), OUTSIDE);
    assert_eq!(ask(&site.host, HOST, 8080), HOST);
    // Guests reach it as the outside does, also from its own network; an isolated network's do not.
    assert_eq!(ask(&red2, HOST, 8080), "10.77.1.5");
    assert_eq!(ask(&green1, HOST, 8081), "10.77.3.4");
    assert!(!blue1.connects(HOST, 8080));
    // Another address of the host's is only meant where any is; one beyond is never.
    site.host.sh("ip addr add 203.0.113.1/32 dev lo");
    site.outside.sh(&format!("ip route add 203.0.113.1 via {HOST}"));
    assert!(!site.outside.connects("203.0.113.1", 8080) && site.outside.connects("203.0.113.1", 8081));
    assert!(!site.outside.connects("10.77.1.4", 80));
    let taken = port(Some(HOST), 8080, "10.77.1.5");
    let error = site.run(fabric.publish(taken.address, vec![taken])).unwrap_err().to_string();
    assert!(error.contains("8080 of the host leads somewhere else"), "{error}");
    // It ends by request, or when the guest goes.
    site.run(fabric.publish(one.address, vec![])).unwrap();
    site.run(fabric.publish(one.address, vec![])).unwrap();
    site.run(fabric.detach("pl-blue1")).unwrap();
    assert!(!site.outside.connects(HOST, 8080) && !site.outside.connects(HOST, 8081));
}

/// What busybox' client has a script told.
fn udhcpc(guest: &Namespace, arguments: &str) -> Option<BTreeMap<String, String>> {
    let script = "#!/bin/sh\n[ \"$1\" != bound ] || env > \"$OUT\"\n";
    let dir = tempfile::tempdir().unwrap();
    let (path, out) = (dir.path().join("script"), dir.path().join("out"));
    std::fs::write(&path, script).unwrap();
    guest.sh(&format!("chmod +x {}", path.display()));
    let run = format!(
        "OUT={} busybox udhcpc -i eth0 -n -q -f -t 3 -T 2 -s {} {arguments}",
        out.display(),
        path.display()
    );
    let told = guest.can(&run).then(|| std::fs::read_to_string(out).unwrap())?;
    let pair = |line: &str| line.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    Some(told.lines().filter_map(pair).collect())
}

#[test]
fn dhcp_tells_each_guest_its_own_address() {
    let site = Site::new();
    let mut plan = plan();
    plan.networks[0].mtu = 1400;
    let fabric = site.start(&plan);
    let behind = |a: &Attachment| Guest::behind(&site.host, &a.tap, &a.mac.to_string());
    let (red1, blue1) = (behind(&plan.attachments[0]), behind(&plan.attachments[2]));
    for arguments in ["", "-B", "-r 10.77.1.5", "-O mtu"] {
        let told = udhcpc(&red1, arguments).unwrap_or_else(|| panic!("no answer to udhcpc {arguments}"));
        let got = |key: &str| told.get(key).map(String::as_str);
        assert_eq!(got("ip"), Some("10.77.1.4"), "{told:?}");
        assert_eq!((got("mask"), got("subnet")), (Some("24"), Some("255.255.255.0")));
        assert_eq!(
            (got("router"), got("dns"), got("serverid")),
            (Some("10.77.1.1"), Some("10.77.1.1"), Some("10.77.1.1"))
        );
        assert_eq!(
            (got("domain"), got("hostname"), got("mtu")),
            (Some("red.internal"), Some("red1"), Some("1400"))
        );
        assert_eq!(got("lease"), Some("4294967295"));
    }
    // The address is the tap's, whatever the guest's hardware address.
    blue1.sh("ip link set eth0 down && ip link set eth0 address 06:00:00:00:00:99 && ip link set eth0 up");
    assert_eq!(udhcpc(&blue1, "").unwrap()["ip"], "10.77.2.4");
    // The host's own network is not served.
    site.outside.sh("ip link set up0 name eth0 2>/dev/null || { ip link set up0 down; ip link set up0 name eth0; ip link set eth0 up; }");
    assert!(udhcpc(&site.outside, "").is_none());
    // Noise and floods leave it alive; what else comes of them is the limit's matter.
    red1.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:68").unwrap();
        socket.set_broadcast(true).unwrap();
        let device = std::ffi::CString::new("eth0").unwrap();
        use std::os::fd::AsRawFd;
        // SAFETY: the name is a C string of the length given.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_BINDTODEVICE,
                device.as_ptr().cast(),
                5,
            )
        };
        let mut noise = vec![0_u8; 600];
        for round in 0..5000_usize {
            noise.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 31 + round * 17 + (round >> 3)) as u8);
            noise[0] = 1;
            noise[2] = round as u8;
            let _ = socket.send_to(&noise[..round % 600], "255.255.255.255:67");
        }
    });
    wait_for("DHCP after a flood", SOON, || udhcpc(&red1, ""));
    assert_eq!(udhcpc(&blue1, "").unwrap()["ip"], "10.77.2.4");
    // Another guest's flood does not matter, and a guest that is detached gets nothing.
    site.run(fabric.detach("pl-red1")).unwrap();
    assert!(udhcpc(&red1, "").is_none());
}

/// A name server outside: whatever it is asked, it answers 203.0.113.7, once to each protocol.
fn name_server(site: &Site) {
    use std::io::{Read, Write};
    let (udp, tcp) = site.outside.run(|| {
        (UdpSocket::bind((OUTSIDE, 53)).unwrap(), std::net::TcpListener::bind((OUTSIDE, 53)).unwrap())
    });
    fn answer(query: &[u8]) -> Vec<u8> {
        let mut answer = query.to_vec();
        answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1]);
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 7]);
        answer
    }
    std::thread::spawn(move || {
        let mut buffer = [0; 512];
        let (length, from) = udp.recv_from(&mut buffer).unwrap();
        // Whoever asks elsewhere, or about something else, is not believed.
        let mut forged = answer(&buffer[..length]);
        forged[0] ^= 1;
        udp.send_to(&forged, from).unwrap();
        forged[0] ^= 1;
        forged[14] ^= 1;
        udp.send_to(&forged, from).unwrap();
        udp.send_to(&answer(&buffer[..length]), from).unwrap();
    });
    std::thread::spawn(move || {
        let (mut stream, _) = tcp.accept().unwrap();
        let mut buffer = [0; 512];
        let length = stream.read(&mut buffer).unwrap();
        let answer = answer(&buffer[2..length]);
        stream.write_all(&(answer.len() as u16).to_be_bytes()).unwrap();
        stream.write_all(&answer).unwrap();
    });
}

/// The addresses and names in the answer, or the code of the failure.
fn ask(guest: &Namespace, server: &str, tcp: bool, kind: u16, name: &str) -> Result<Vec<String>, u8> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend_from_slice(label.as_bytes());
    }
    query.push(0);
    query.extend_from_slice(&kind.to_be_bytes());
    query.extend_from_slice(&[0, 1]);
    let asked = query.len();
    let answer = guest.run(|| exchange(server, tcp, &query)).ok_or(255)?;
    assert_eq!((&answer[..2], &answer[4..6], &answer[12..asked]), (&query[..2], &query[4..6], &query[12..]));
    if answer[3] & 0xf != 0 {
        return Err(answer[3] & 0xf);
    }
    let mut found = Vec::new();
    let mut at = asked;
    for _ in 0..answer[7] {
        let length = usize::from(answer[at + 11]);
        let data = &answer[at + 12..at + 12 + length];
        found.push(match data {
            [a, b, c, d] => Ipv4Addr::new(*a, *b, *c, *d).to_string(),
            name => String::from_utf8_lossy(&name[1..]).replace(|c: char| c.is_control(), "."),
        });
        at += 12 + length;
    }
    found.sort();
    Ok(found)
}

fn exchange(server: &str, tcp: bool, query: &[u8]) -> Option<Vec<u8>> {
    use std::io::{Read, Write};
    let mut buffer = vec![0; 4096];
    if tcp {
        let address = (server, 53);
        let mut stream = std::net::TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut framed = (query.len() as u16).to_be_bytes().to_vec();
        framed.extend_from_slice(query);
        stream.write_all(&framed).ok()?;
        stream.read_exact(&mut buffer[..2]).ok()?;
        let length = usize::from(u16::from_be_bytes([buffer[0], buffer[1]]));
        stream.read_exact(&mut buffer[..length]).ok()?;
        buffer.truncate(length);
        return Some(buffer);
    }
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(6))).unwrap();
    socket.send_to(query, (server, 53)).ok()?;
    let length = socket.recv(&mut buffer).ok()?;
    buffer.truncate(length);
    Some(buffer)
}

#[test]
fn dns_answers_for_the_guests_own_network_and_passes_on_the_rest() {
    const A: u16 = 1;
    const PTR: u16 = 12;
    const AAAA: u16 = 28;
    let (no_such_name, refused, failure) = (Err(3), Err(5), Err(2));
    let found = |texts: &[&str]| Ok(texts.iter().map(|text| text.to_string()).collect::<Vec<_>>());
    let site = Site::new();
    let mut plan = plan();
    plan.attachments[0].names = vec!["red1".into(), "web".into()];
    plan.attachments[1].names = vec!["red2".into(), "web".into()];
    let fabric = site.start(&plan);
    let (red1, blue1) = (site.guest(&plan.attachments[0]), site.guest(&plan.attachments[2]));
    for tcp in [false, true] {
        let red = |kind, name: &str| ask(&red1, "10.77.1.1", tcp, kind, name);
        assert_eq!(red(A, "red2.red.internal"), found(&["10.77.1.5"]));
        assert_eq!(red(A, "RED2"), found(&["10.77.1.5"]));
        assert_eq!(red(A, "web"), found(&["10.77.1.4", "10.77.1.5"]));
        assert_eq!(red(AAAA, "red2"), found(&[]));
        assert_eq!(red(PTR, "5.1.77.10.in-addr.arpa"), found(&["red2.red.internal."]));
        assert_eq!(red(PTR, "9.1.77.10.in-addr.arpa"), no_such_name);
        assert_eq!(red(A, "nobody.red.internal"), no_such_name);
        // Who is in another network is nobody's business here, and it cannot be asked there either.
        assert_eq!(red(A, "blue1"), no_such_name);
        assert_eq!(ask(&blue1, "10.77.2.1", tcp, A, "blue1.blue.internal"), found(&["10.77.2.4"]));
        // Nobody is there to pass on to yet; and an isolated network has no way out here either.
        assert_eq!(red(A, "example.test"), failure);
        assert_eq!(ask(&blue1, "10.77.2.1", tcp, A, "example.test"), refused);
    }
    assert_eq!(ask(&red1, "10.77.2.1", false, A, "blue1.blue.internal"), Err(255));
    name_server(&site);
    for tcp in [false, true] {
        assert_eq!(ask(&red1, "10.77.1.1", tcp, A, "example.test"), found(&["203.0.113.7"]));
    }
    // Queries that wait for an answer that does not come do not keep others from theirs.
    red1.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x04slow\x04test\0\0\x01\0\x01".to_vec();
        for id in 0..2000_u16 {
            query[..2].copy_from_slice(&id.to_be_bytes());
            let _ = socket.send_to(&query, "10.77.1.1:53");
            // And what is none.
            let _ = socket.send_to(&query[..usize::from(id % 27)], "10.77.1.1:53");
        }
    });
    wait_for("names after a flood", SOON, || ask(&red1, "10.77.1.1", false, A, "web").ok());
    assert_eq!(ask(&blue1, "10.77.2.1", false, A, "blue1"), found(&["10.77.2.4"]));
    // A name server that is published everywhere does not become everybody's.
    let published = Published {
        protocol: Transport::Udp,
        host_address: None,
        host_port: 53,
        address: "10.77.1.5".parse().unwrap(),
        port: 53,
    };
    site.run(fabric.publish(published.address, vec![published])).unwrap();
    assert_eq!(ask(&red1, "10.77.1.1", false, A, "red2"), found(&["10.77.1.5"]));
    // Names go with their guests, and networks with their servers.
    site.run(fabric.detach("pl-red2")).unwrap();
    assert_eq!(ask(&red1, "10.77.1.1", false, A, "red2"), no_such_name);
    assert_eq!(ask(&red1, "10.77.1.1", false, A, "web"), found(&["10.77.1.4"]));
    site.run(fabric.detach("pl-blue1")).unwrap();
    site.run(fabric.remove_network("blue")).unwrap();
    assert_eq!(site.host.sh("ss -Hltun 'sport = :53' | grep -c 10.77.2.1 || true").trim(), "0");
    site.run(fabric.set_network(network("blue", "10.77.2.0/24", true))).unwrap();
    assert_eq!(site.host.sh("ss -Hltun 'sport = :53' | grep -c 10.77.2.1").trim(), "2");
}

#[test]
fn what_is_detached_leaves_nothing() {
    let site = Site::new();
    let bare = site.state();
    let empty = site.start(&Plan::default());
    let before = site.state();
    let plan = plan();
    site.run(async {
        for network in &plan.networks {
            empty.set_network(network.clone()).await.unwrap();
            empty.set_network(network.clone()).await.unwrap();
        }
        empty.set_groups(plan.groups.clone()).await.unwrap();
        for attachment in &plan.attachments {
            empty.attach(attachment.clone()).await.unwrap();
            empty.attach(attachment.clone()).await.unwrap();
        }
    });
    let by_steps = site.state();
    let counters = site.run(empty.counters()).unwrap();
    assert_eq!(counters.keys().collect::<Vec<_>>(), ["pl-blue1", "pl-red1", "pl-red2"]);
    // Whether step by step or at once, it is the same.
    let at_once = std::thread::scope(|scope| {
        // A thread that has been in another host's network has to stay there.
        let other = scope.spawn(|| {
            let other = Site::new();
            let _fabric = other.start(&plan);
            other.state()
        });
        other.join().unwrap()
    });
    assert_same(&by_steps, &at_once);
    site.run(async {
        let error = empty.remove_network("red").await.unwrap_err().to_string();
        assert!(error.contains("still used by pl-red1"), "{error}");
        for attachment in &plan.attachments {
            empty.detach(&attachment.tap).await.unwrap();
            empty.detach(&attachment.tap).await.unwrap();
        }
        empty.set_groups(vec![]).await.unwrap();
        for id in ["red", "blue", "red"] {
            empty.remove_network(id).await.unwrap();
        }
    });
    assert_same(&site.state(), &before);
    site.run(empty.clear()).unwrap();
    assert_same(&site.state(), &bare);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let site = Site::new();
    let plan = plan();
    let fabric = site.start(&plan);
    let before = site.state();
    let refused = |attachment: Attachment| site.run(fabric.attach(attachment)).unwrap_err().to_string();
    let new = |address: &str| attachment("new", address, "red", &["open"]);
    assert!(refused(new("10.77.1.4")).contains("10.77.1.4 is in use"));
    assert!(refused(new("10.77.1.3")).contains("10.77.1.3 is reserved"));
    assert!(refused(new("10.77.2.9")).contains("10.77.2.9 is not in 10.77.1.0/24"));
    assert!(
        refused(Attachment { groups: vec!["none".into()], ..new("10.77.1.9") }).contains("no group none")
    );
    assert!(refused(Attachment { tap: "eth0".into(), ..new("10.77.1.9") }).contains("tap \"eth0\": must be"));
    let network = |subnet: &str| site.run(fabric.set_network(network("new", subnet, true)));
    assert!(network("10.77.1.0/25").unwrap_err().to_string().contains("overlaps 10.77.1.0/24"));
    assert!(network("198.51.100.0/24").unwrap_err().to_string().contains("not for guests"));
    site.host.sh("ip addr add 172.20.3.1/16 dev up0");
    let error = network("172.20.7.0/24").unwrap_err().to_string();
    assert!(error.contains("in use on this host: it has a route to 172.20.0.0/16"), "{error}");
    site.host.sh("ip addr del 172.20.3.1/16 dev up0");
    // Somebody of the host's own answers DNS everywhere.
    let _other = site.host.run(|| UdpSocket::bind("0.0.0.0:53")).err();
    assert_same(&site.state(), &before);
    // A tap that another program holds is not taken over, but it is removed when it is to be ours.
    site.host.sh("ip tuntap add pl-new mode tap user 5");
    site.run(fabric.attach(new("10.77.1.9"))).unwrap();
    assert!(site.host.sh("ip -d tuntap show dev pl-new 2>&1 || true").contains("user 0"));
}

#[test]
fn a_new_daemon_makes_good_what_the_last_one_left() {
    let site = Site::new();
    let mut plan = plan();
    plan.published = vec![Published {
        protocol: Transport::Udp,
        host_address: None,
        host_port: 5353,
        address: "10.77.1.4".parse().unwrap(),
        port: 53,
    }];
    let fabric = site.start(&plan);
    let right = site.state();
    let (red1, red2) = (site.guest(&plan.attachments[0]), site.guest(&plan.attachments[1]));
    // A connection that is under way throughout.
    let _server = red2.serve(80);
    let mut held = red1.run(|| std::net::TcpStream::connect("10.77.1.5:80")).unwrap();
    drop(fabric);
    site.host.sh(
        "ip tuntap add pl-left mode tap && ip link set pl-left up && ip route add 10.77.1.44/32 dev pl-left; \
         ip route add unreachable 10.99.0.0/24 proto 112 metric $(ip route | sed -n 's/^unreachable.*metric //p' | head -1); \
         ip addr add 10.99.0.1/32 dev plgw; ip addr del 10.77.2.1/32 dev plgw; ip neigh del 10.77.1.5 dev pl-red2; \
         ip link del pl-blue1; ip route add 10.77.1.45/32 dev pl-red1; \
         ip neigh add 10.77.1.45 lladdr 02:00:00:00:00:01 dev pl-red1 nud permanent; \
         nft add element inet pl guests '{ \"pl-left\" . 10.77.1.44 }'; nft delete element inet pl egress0 '{ 10.77.1.4 }'; \
         nft add rule inet pl leave accept; nft add table inet mine",
    );
    assert!(site.state() != right);
    let fabric = site.start(&plan);
    assert!(site.host.can("nft list table inet mine"), "what is not ours stays");
    site.host.sh("nft delete table inet mine");
    assert_same(&site.state(), &right);
    use std::io::Read;
    let mut text = String::new();
    held.set_read_timeout(Some(SOON)).unwrap();
    held.read_to_string(&mut text).unwrap();
    assert_eq!(text.trim(), "10.77.1.4");
    assert!(red1.connects("10.77.1.5", 80));
    // Nothing to do is nothing done: the taps are the same ones.
    let links = site.host.sh("ip -o link | grep pl-");
    site.run(fabric.reconcile(plan.clone())).unwrap();
    assert_eq!(site.host.sh("ip -o link | grep pl-"), links);
    // Restarting the host's firewall flushes all rules; ours come back by themselves.
    site.host.sh("nft flush ruleset");
    wait_for("the rules", SOON, || (site.state() == right).then_some(()));
}

/// Not a test by itself: attaches and detaches in the network namespace it is run in until it is killed.
#[test]
#[ignore = "run by another test"]
fn attach_and_detach_without_end() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let config = Config { resolv_conf: "/dev/null".into(), ..Config::default() };
    runtime.block_on(async {
        let fabric = Fabric::start(config, plan()).await.unwrap();
        for round in 0_u32.. {
            let (third, fourth) = (1 + round % 2, 10 + round % 200);
            let network = ["red", "blue"][round as usize % 2];
            let tap = format!("x{}", round % 7);
            let address = format!("10.77.{third}.{fourth}");
            fabric.attach(attachment(&tap, &address, network, &["open"])).await.unwrap();
            match round % 5 {
                0 => fabric.detach(&format!("pl-x{}", round % 3)).await.unwrap(),
                1 => {
                    let subnet = format!("10.88.{}.0/24", round % 256);
                    fabric.set_network(self::network("churn", &subnet, true)).await.unwrap();
                    fabric.remove_network("churn").await.unwrap();
                }
                _ => {}
            }
        }
    });
}

#[test]
fn killed_at_any_moment_the_next_daemon_leaves_exactly_the_plan() {
    let site = Site::new();
    let plan = plan();
    drop(site.start(&plan));
    let right = site.state();
    for round in 0..12_u64 {
        let program = std::env::current_exe().unwrap();
        let mut churn = site.host.command(&format!(
            "exec {} --exact attach_and_detach_without_end --ignored >/dev/null 2>&1",
            program.display()
        ));
        let mut churn = churn.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(200 + round * 137 % 700));
        churn.kill().unwrap();
        churn.wait().unwrap();
        let fabric = site.start(&plan);
        assert_same(&site.state(), &right);
        drop(fabric);
    }
}

#[test]
fn who_gets_an_address_does_not_inherit_its_connections() {
    let site = Site::new();
    let mut plan = plan();
    plan.groups.push(group("closed", vec![]));
    let fabric = site.start(&plan);
    let (red1, red2) = (site.guest(&plan.attachments[0]), site.guest(&plan.attachments[1]));
    // UDP both ways under one pair of ports: known from now on.
    let open = |guest: &Namespace| guest.run(|| UdpSocket::bind("0.0.0.0:7000").unwrap());
    let (one, two) = (open(&red1), open(&red2));
    for socket in [&one, &two] {
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    }
    let heard = |from: &UdpSocket, to: &UdpSocket, address: &str| {
        from.send_to(b"hello", (address, 7000)).is_ok() && to.recv(&mut [0; 9]).is_ok()
    };
    assert!(heard(&one, &two, "10.77.1.5") && heard(&two, &one, "10.77.1.4"));
    // The address goes to somebody whom nothing may reach.
    site.run(fabric.detach("pl-red2")).unwrap();
    drop((two, red2));
    let heir = attachment("heir", "10.77.1.5", "red", &["closed"]);
    site.run(fabric.attach(heir.clone())).unwrap();
    let heir = site.guest(&heir);
    let three = open(&heir);
    three.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(!heard(&one, &three, "10.77.1.5"));
    // It may speak first.
    assert!(heard(&three, &one, "10.77.1.4") && heard(&one, &three, "10.77.1.5"));
    drop((three, heir));

    // The same if the daemon dies in between, and a new one attaches the heir.
    site.run(fabric.detach("pl-heir")).unwrap();
    let red2 = attachment("again", "10.77.1.5", "red", &["open"]);
    site.run(fabric.attach(red2.clone())).unwrap();
    let red2 = site.guest(&red2);
    let two = open(&red2);
    two.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(heard(&one, &two, "10.77.1.5") && heard(&two, &one, "10.77.1.4"));
    drop((two, red2, fabric));
    site.host.sh("ip link del pl-again");
    plan.attachments[1] = attachment("heir", "10.77.1.5", "red", &["closed"]);
    let fabric = site.start(&plan);
    let heir = site.guest(&plan.attachments[1]);
    let three = open(&heir);
    three.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    assert!(!heard(&one, &three, "10.77.1.5"));
    drop(fabric);
}

#[test]
fn two_daemons_share_a_host() {
    let site = Site::new();
    let first = plan();
    let mut second = Plan {
        networks: vec![network("other", "10.78.0.0/24", true)],
        groups: vec![open_group()],
        attachments: vec![attachment("one", "10.78.0.4", "other", &["open"])],
        published: vec![],
    };
    second.attachments[0].tap = "pm-one".into();
    let one = site.start(&first);
    let config = Config { prefix: "pm".into(), ..site.config() };
    let two = site.run(Fabric::start(config, second.clone())).unwrap();
    let (red1, guest) = (site.guest(&first.attachments[0]), site.guest(&second.attachments[0]));
    assert!(red1.pings(OUTSIDE) && guest.pings(OUTSIDE) && guest.pings("10.78.0.1"));
    let behind = |a: &Attachment| Guest::behind(&site.host, &a.tap, &a.mac.to_string());
    drop(red1);
    drop(guest);
    let (red1, guest) = (behind(&first.attachments[0]), behind(&second.attachments[0]));
    assert_eq!(udhcpc(&red1, "").unwrap()["ip"], "10.77.1.4");
    assert_eq!(udhcpc(&guest, "").unwrap()["ip"], "10.78.0.4");
    // Each mends its own and leaves the other's.
    site.run(one.reconcile(first)).unwrap();
    assert_eq!(udhcpc(&guest, "").unwrap()["ip"], "10.78.0.4");
    site.run(two.clear()).unwrap();
    assert_eq!(udhcpc(&red1, "").unwrap()["ip"], "10.77.1.4");
    let left: Vec<_> = site.state().into_iter().filter(|line| line.contains("pm")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Prints what attaching and detaching takes; the bound is far above, for machines that are emulated.
#[test]
fn attaching_takes_little_time() {
    let site = Site::new();
    let plan = plan();
    let fabric = site.start(&plan);
    let (mut attach, mut detach) = (Vec::new(), Vec::new());
    for round in 0..60 {
        let new = attachment(&format!("t{round}"), &format!("10.77.1.{}", 100 + round), "red", &["open"]);
        let start = Instant::now();
        site.run(fabric.attach(new.clone())).unwrap();
        attach.push(start.elapsed());
        let start = Instant::now();
        site.run(fabric.detach(&new.tap)).unwrap();
        detach.push(start.elapsed());
    }
    for (what, times) in [("attach", &mut attach), ("detach", &mut detach)] {
        times.sort();
        println!("{what}: median {:?}, 90 of 100 {:?}, longest {:?}", times[30], times[53], times[59]);
    }
    assert!(attach[30] < Duration::from_secs(2), "{attach:?}");
}
