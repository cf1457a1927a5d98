//! Network interfaces: throughput of one TCP connection each way, and round trips, over a tap in a network
//! of the benchmark's own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::report::Report;
use crate::vmm::{Contender, Vmm};

const HOST: &str = "172.16.0.1";
const GUEST: &str = "172.16.0.2";
/// Bytes moved each way.
const BYTES: usize = 256 << 20;
/// Round trips.
const TRIPS: usize = 2000;

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let names: Vec<String> = contenders.iter().map(|c| c.name.clone()).collect();
    let mut report = Report::new(format!("network, 1 vCPU, {runs} runs"), &names);
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
    ip("link set lo up")?;
    for run in 0..runs {
        for (index, contender) in contenders.iter().enumerate() {
            ip("tuntap add tap0 mode tap")?;
            ip(&format!("addr add {HOST}/24 dev tap0"))?;
            ip("link set tap0 up")?;
            measure(contender, |name, unit, value| report.add(name, unit, run, index, value))
                .with_context(|| contender.name.clone())?;
            ip("link delete tap0")?;
        }
    }
    Ok(report)
}

fn ip(arguments: &str) -> Result<()> {
    let status = Command::new("ip").args(arguments.split(' ')).status().context("ip")?;
    ensure!(status.success(), "ip {arguments} failed");
    Ok(())
}

fn measure(contender: &Contender, mut add: impl FnMut(&'static str, &'static str, f64)) -> Result<()> {
    let vmm = Vmm::start(contender)?;
    vmm.configure(1, 256)?;
    let mac = "06:00:ac:10:00:02";
    let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": mac});
    vmm.put("/network-interfaces/eth0", interface)?;
    vmm.boot()?;
    vmm.sh(&format!("ip link set eth0 up && ip addr add {GUEST}/24 dev eth0"))?;
    vmm.sh(&format!("ping -c 3 {HOST}"))?;

    let mib_per_s = |start: Instant| BYTES as f64 / (1 << 20) as f64 / start.elapsed().as_secs_f64();
    let listener = TcpListener::bind((HOST, 5001))?;
    let vmm = &vmm;
    std::thread::scope(|scope| -> Result<()> {
        let guest = scope.spawn(move || vmm.sh(&format!("nc {HOST} 5001 > /dev/null < /dev/null")));
        let (mut stream, _) = listener.accept()?;
        let block = vec![0x5a; 1 << 20];
        let start = Instant::now();
        for _ in 0..BYTES / block.len() {
            stream.write_all(&block)?;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        // The guest closes when it has everything.
        stream.read_to_end(&mut Vec::new())?;
        add("TCP host to guest", "MiB/s", mib_per_s(start));
        guest.join().ok().context("the guest's side")??;

        let source = format!("dd if=/dev/zero bs=1M count={} 2>/dev/null", BYTES >> 20);
        let guest = scope.spawn(move || vmm.sh(&format!("{source} | nc {HOST} 5001")));
        let (mut stream, _) = listener.accept()?;
        let mut block = vec![0; 1 << 20];
        stream.read_exact(&mut block[..1])?;
        let start = Instant::now();
        let mut all = 1;
        while all < BYTES {
            let count = stream.read(&mut block)?;
            ensure!(count > 0, "the guest sent only {all} bytes");
            all += count;
        }
        add("TCP guest to host", "MiB/s", mib_per_s(start));
        drop(stream);
        guest.join().ok().context("the guest's side")??;

        let guest = scope.spawn(move || vmm.sh("nc -l -p 7 -e /bin/cat"));
        let mut stream = loop {
            if let Ok(stream) = TcpStream::connect((GUEST, 7)) {
                break stream;
            }
        };
        stream.set_nodelay(true)?;
        let start = Instant::now();
        for _ in 0..TRIPS {
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
        }
        add("TCP round trip", "µs", start.elapsed().as_secs_f64() * 1e6 / TRIPS as f64);
        drop(stream);
        let _ = guest.join();
        Ok(())
    })
}
