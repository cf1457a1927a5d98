//! Network interfaces: throughput of one TCP connection each way by iperf3, and round trips by ping, over a
//! tap in a network of the benchmark's own; and the same over the host's loopback device.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use pulau_tests::artifact;
use serde_json::{Value, json};

use crate::report::Report;
use crate::vmm::{Contender, Vmm, counted, names};

const HOST: &str = "172.16.0.1";
const GUEST: &str = "172.16.0.2";
/// A round trip each two milliseconds: the ends are idle in between.
const PING: &str = "ping -q -c 300 -i 0.002";

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let mut columns = names(contenders);
    columns.push("host".into());
    let mut report = Report::new(format!("network, 1 vCPU, {runs} runs"), columns);
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
    host("ip link set lo up")?;
    for run in 0..runs {
        for (index, contender) in contenders.iter().enumerate() {
            host("ip tuntap add tap0 mode tap")?;
            host(&format!("ip addr add {HOST}/24 dev tap0"))?;
            host("ip link set tap0 up")?;
            let mut add = |name: &str, unit, value| report.add(name, unit, run, index, value);
            measure(contender, &mut add).with_context(|| contender.name.clone())?;
            host("ip link delete tap0")?;
        }
        let _server = server()?;
        let mut add = |name: &str, unit, value| report.add(name, unit, run, contenders.len(), value);
        throughput("127.0.0.1", &mut add, &mut host)?;
        round_trip("127.0.0.1", &mut add)?;
    }
    Ok(report)
}

fn measure(contender: &Contender, add: &mut dyn FnMut(&str, &'static str, f64)) -> Result<()> {
    let vmm = Vmm::start(contender)?;
    vmm.configure(1, 256, &artifact("PULAU_TEST_ROOTFS_BENCH"))?;
    let mac = "06:00:ac:10:00:02";
    let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": mac});
    vmm.put("/network-interfaces/eth0", interface)?;
    vmm.boot()?;
    vmm.sh(&format!("ip link set eth0 up && ip addr add {GUEST}/24 dev eth0"))?;
    vmm.sh(&format!("ping -c 3 {HOST}"))?;
    let _server = server()?;
    throughput(HOST, add, &mut |command| vmm.sh(command))?;
    round_trip(GUEST, add)
}

/// A command on the host.
fn host(command: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", command]).output()?;
    ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// iperf3's server on the host, until it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn server() -> Result<Server> {
    let mut command = Command::new("iperf3");
    command.arg("--server").stdin(Stdio::null()).stdout(Stdio::null());
    let server = Server(command.spawn().context("iperf3 on the host")?);
    // Not by connecting: the server takes that for a client, and serves one at a time.
    while !listens(5201) {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    Ok(server)
}

/// Whether somebody listens on TCP `port` in this network namespace (proc_net_tcp(5): state 0A).
fn listens(port: u16) -> bool {
    let port = format!(":{port:04X}");
    ["tcp", "tcp6"].into_iter().any(|family| {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{family}")).unwrap_or_default();
        text.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some("0A")
        })
    })
}

/// Runs iperf3's client with `client`, which is where the other end is.
fn throughput(
    address: &str,
    add: &mut dyn FnMut(&str, &'static str, f64),
    client: &mut dyn FnMut(&str) -> Result<String>,
) -> Result<()> {
    let length = if counted() { "--bytes 256M" } else { "--time 3 --omit 1" };
    for (name, arguments) in [("TCP guest to host", ""), ("TCP host to guest", "--reverse")] {
        // The server may still be busy with the test before.
        let command = format!(
            "for i in 1 2 3 4 5; do iperf3 --json {length} {arguments} --client {address} && exit; sleep 1; \
             done; exit 1"
        );
        let output = client(&command)?;
        // Each try prints a report; the last is the one that counts.
        let last = output.rfind("\n{").map_or(0, |at| at + 1);
        let report: Value = serde_json::from_str(&output[last..]).context("iperf3's report")?;
        let bits =
            report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3 moved nothing")?;
        add(name, "MiB/s", bits / 8.0 / f64::from(1 << 20));
    }
    Ok(())
}

fn round_trip(address: &str, add: &mut dyn FnMut(&str, &'static str, f64)) -> Result<()> {
    // The last line is: rtt min/avg/max/mdev = 0.030/0.045/0.102/0.008 ms
    let output = host(&format!("{PING} {address}"))?;
    let times = output.lines().last().and_then(|line| line.split_once(" = ")).context("ping said nothing")?.1;
    let average = times.split('/').nth(1).context("ping gave no average")?;
    add("round trip", "µs", average.parse::<f64>()? * 1e3);
    Ok(())
}
