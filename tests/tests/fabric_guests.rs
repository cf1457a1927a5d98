//! Real guests in the guests' network: jailed, with taps that were attached before, and an address by DHCP.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use pulau::network::{
    Attachment, Config, Fabric, GroupDef, NetworkDef, Peer, Plan, Ports, Published, Rule, Traffic, Transport,
};
use pulau_agent_protocol::client::connect;
use pulau_agent_protocol::message::{ExecRequest, ExitStatus};
use pulau_tests::stand_in::Namespace;
use pulau_tests::vmm::{BOOT_ARGS, drive};
use pulau_tests::{PATIENCE, api, artifact, program, wait_for};
use serde_json::{Value, json};

const HOST: &str = "198.51.100.1";
const OUTSIDE: &str = "198.51.100.2";

/// A guest in a jail, whose own network is empty.
struct Jailed {
    dir: tempfile::TempDir,
    pid: i32,
}

impl Jailed {
    /// Boots one with an interface at the attachment's tap, and has it ask for its address.
    fn boot(attachment: &Attachment, user: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let jail = path("jail");
        for inside in [&jail, &jail.join("run")] {
            fs::create_dir(inside).unwrap();
        }
        chown(jail.join("run"), Some(user), Some(user)).unwrap();
        // Who is in the jail must be able to come by.
        Command::new("chmod").args(["a+rx"]).arg(dir.path()).status().unwrap();
        for (name, source) in [("kernel", "PULAU_TEST_KERNEL"), ("root", "PULAU_TEST_ROOTFS_MINIMAL")] {
            fs::copy(artifact(source), jail.join(name)).unwrap();
            Command::new("chmod").arg("a+r").arg(jail.join(name)).status().unwrap();
        }
        let log = || Stdio::from(fs::File::options().create(true).append(true).open(path("log")).unwrap());
        let user = user.to_string();
        let status = Command::new(program("pulau-vmm"))
            .args(["--jail".as_ref(), jail.as_os_str(), "--pid-file".as_ref(), path("pid").as_os_str()])
            .args(["--uid", &user, "--gid", &user, "--new-net-ns", "--tap", &attachment.tap])
            .args(["--api-sock", "/run/api.sock", "--id", "guest"])
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .status()
            .unwrap();
        assert!(status.success(), "{}", fs::read_to_string(path("log")).unwrap());
        let pid = fs::read_to_string(path("pid")).unwrap().trim().parse().unwrap();
        let guest = Self { dir, pid };
        let socket = guest.inside("run/api.sock");
        wait_for("the control API", PATIENCE, || api::request(&socket, "GET", "/", "").ok());
        guest.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128}));
        let args = format!("{BOOT_ARGS} pulau.overlay=tmpfs");
        guest.put("/boot-source", json!({"kernel_image_path": "/kernel", "boot_args": args}));
        guest.put("/drives/root", drive("root", "/root".as_ref(), true, true));
        guest.put("/vsock", json!({"guest_cid": 3, "uds_path": "/run/vsock"}));
        let interface = json!({
            "iface_id": "eth0", "host_dev_name": attachment.tap, "guest_mac": attachment.mac, "mtu": 1500,
        });
        guest.put("/network-interfaces/eth0", interface);
        guest.put("/actions", json!({"action_type": "InstanceStart"}));
        guest.sh("ip link set eth0 up && printf '%s\\n' '#!/bin/sh' '[ \"$1\" = bound ] || exit 0' \
             'ip addr add $ip/$mask dev eth0; ip route add default via $router' \
             'echo search $domain > /etc/resolv.conf; echo nameserver $dns >> /etc/resolv.conf' \
             > /tmp/bound && chmod +x /tmp/bound && udhcpc -i eth0 -n -q -f -t 10 -s /tmp/bound");
        guest
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.dir.path().join("jail").join(name)
    }

    #[track_caller]
    fn put(&self, path: &str, body: Value) {
        api::request(&self.inside("run/api.sock"), "PUT", path, &body.to_string()).expect("an answer").ok();
    }

    fn try_sh(&self, command: &str) -> (ExitStatus, String) {
        let agent = connect(&self.inside("run/vsock"), Instant::now() + PATIENCE)
            .unwrap_or_else(|e| panic!("{e}; {}", fs::read_to_string(self.dir.path().join("log")).unwrap()));
        let argv = ["/bin/sh", "-c", command].map(str::to_owned).to_vec();
        let output = agent.output(&ExecRequest { argv, ..Default::default() }, b"").unwrap();
        (output.status, String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    #[track_caller]
    fn sh(&self, command: &str) -> String {
        let (status, output) = self.try_sh(command);
        assert_eq!(status, ExitStatus::Code(0), "{command}: {output}");
        output
    }

    fn can(&self, command: &str) -> bool {
        self.try_sh(command).0 == ExitStatus::Code(0)
    }

    fn pings(&self, address: &str) -> bool {
        self.can(&format!("ping -c 2 -W 3 {address}"))
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(pid, None);
    }
}

fn attachment(name: &str, address: &str, network: &str, group: &str) -> Attachment {
    let address: Ipv4Addr = address.parse().unwrap();
    let [a, b, c, d] = address.octets();
    Attachment {
        tap: format!("pl-{name}"),
        mac: format!("06:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}").parse().unwrap(),
        address,
        network: network.into(),
        groups: vec![group.into()],
        names: vec![name.into()],
        owner: 0,
    }
}

fn network(id: &str, subnet: &str) -> NetworkDef {
    let domain = format!("{id}.internal");
    NetworkDef { id: id.into(), subnet: subnet.parse().unwrap(), nat: true, domain, mtu: 1500 }
}

#[test]
fn guests_meet_as_their_networks_and_groups_say() {
    let (host, outside) = (Namespace::new("host"), Namespace::new("outside"));
    host.sh(&format!("ip link add up0 type veth peer name up0 netns {}", outside.name));
    host.sh(&format!("ip addr add {HOST}/24 dev up0 && ip link set up0 up"));
    outside.sh(&format!("ip addr add {OUTSIDE}/24 dev up0 && ip link set up0 up"));
    host.enter();
    let anybody = || vec![Peer::Cidr("0.0.0.0/0".parse().unwrap())];
    let everything = || vec![Rule { traffic: Traffic::All, peers: anybody() }];
    let web = Rule { traffic: Traffic::Tcp(Ports::one(80)), peers: vec![Peer::Group("clients".into())] };
    let ping = Rule { traffic: Traffic::Icmp(Some(8)), peers: anybody() };
    let plan = Plan {
        networks: vec![network("red", "10.77.1.0/24"), network("blue", "10.77.2.0/24")],
        groups: vec![
            GroupDef { id: "servers".into(), ingress: vec![web, ping], egress: everything() },
            GroupDef { id: "clients".into(), ingress: vec![], egress: everything() },
        ],
        attachments: vec![
            attachment("web", "10.77.1.4", "red", "servers"),
            attachment("client", "10.77.1.5", "red", "clients"),
            attachment("other", "10.77.2.4", "blue", "clients"),
        ],
        published: vec![],
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let fabric = runtime.block_on(Fabric::start(Config::default(), plan.clone())).unwrap();
    let [web, client, other] = [0, 1, 2].map(|i| Jailed::boot(&plan.attachments[i], 64_400 + i as u32));

    // By DHCP each has the address that its tap was given, and the name server that knows the others.
    assert!(web.sh("ip -4 addr show dev eth0").contains("inet 10.77.1.4/24"));
    assert!(client.sh("cat /etc/resolv.conf").contains("search red.internal\nnameserver 10.77.1.1"));
    assert!(client.sh("nslookup web.red.internal").contains("10.77.1.4"));
    assert!(!other.can("nslookup web.red.internal") && !client.can("nslookup other.red.internal"));
    web.sh("printf '#!/bin/sh\\necho hello' > /tmp/hello && chmod +x /tmp/hello; \
        (nc -lk -p 80 -e /tmp/hello; nc -ll -p 80 -e /tmp/hello) >/dev/null 2>&1 </dev/null & \
        (nc -lk -p 81 -e /tmp/hello; nc -ll -p 81 -e /tmp/hello) >/dev/null 2>&1 </dev/null & sleep 1");

    // In one network, as the groups say.
    assert!(client.pings("10.77.1.4") && !web.pings("10.77.1.5"));
    let hello = |port: u16| format!("nc -w 5 10.77.1.4 {port} </dev/null | grep hello");
    assert!(client.can(&hello(80)) && !client.can(&hello(81)));
    // Across networks, not at all; to the outside, as somebody else.
    assert!(!other.pings("10.77.1.4") && !other.can(&hello(80)));
    assert!(other.pings(OUTSIDE) && client.pings(OUTSIDE));
    // Of the host there is the gateway, and nothing is told of other taps.
    assert!(client.pings("10.77.1.1") && !client.pings("10.77.2.1") && !client.pings(HOST));
    // An address it takes by itself is nobody's.
    client.sh("ip addr add 10.77.1.99/24 dev eth0");
    assert!(client.pings("10.77.1.4") && !client.can("ping -c 1 -W 3 -I 10.77.1.99 10.77.1.4"));

    let published = Published {
        protocol: Transport::Tcp,
        host_address: None,
        host_port: 8080,
        address: plan.attachments[0].address,
        port: 80,
    };
    let asked = || outside.sh(&format!("timeout 20 busybox nc {HOST} 8080 </dev/null || true"));
    assert_eq!(asked(), "");
    runtime.block_on(fabric.publish(published.address, vec![published])).unwrap();
    assert_eq!(asked().trim(), "hello");

    // Much data both ways, in frames as large as the devices make them.
    let sum =
        client.sh("dd if=/dev/urandom of=/tmp/data bs=64k count=130 2>/dev/null; sha256sum < /tmp/data");
    web.sh("nc -l -p 5000 -e /bin/sha256sum >/dev/null 2>&1 </dev/null & sleep 1");
    let mut open = plan.groups.clone();
    open[0].ingress = everything();
    runtime.block_on(fabric.set_groups(open)).unwrap();
    assert_eq!(client.sh("nc 10.77.1.4 5000 < /tmp/data"), sum);

    // The daemon goes and comes back: guests notice nothing.
    let counters = runtime.block_on(fabric.counters()).unwrap();
    assert!(
        counters["pl-client"].tx_bytes > 8 << 20 && counters["pl-web"].rx_bytes > 8 << 20,
        "{counters:?}"
    );
    drop(fabric);
    assert!(client.pings("10.77.1.4"));
    let fabric = runtime.block_on(Fabric::start(Config::default(), plan.clone())).unwrap();
    assert!(client.can(&hello(80)) && client.can("nslookup web.red.internal"));

    // A tap that is taken away takes down the guest's link, and the guest lives on.
    runtime.block_on(fabric.detach("pl-other")).unwrap();
    wait_for("the carrier to go", PATIENCE, || {
        other.can("[ $(cat /sys/class/net/eth0/carrier) = 0 ]").then_some(())
    });
    drop((web, client, other));
    runtime.block_on(fabric.clear()).unwrap();
    assert_eq!(host.sh("ip -o link | grep -c pl || true; nft list ruleset").trim(), "0");
}
