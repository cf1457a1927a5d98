//! Block devices: throughput and latency at queue depth 1 and 32, by fio in the guest, over each engine.

use std::fs::File;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::report::Report;
use crate::vmm::{Contender, Vmm};

/// Size of the disk under test, in bytes.
const DISK: u64 = 256 << 20;

/// What fio does: name in the report for each engine, and fio's arguments.
const JOBS: [(&str, &str, &str); 4] = [
    ("randread 4k qd1, Sync", "randread 4k qd1, Async", "--rw=randread --bs=4k --iodepth=1"),
    ("randread 4k qd32, Sync", "randread 4k qd32, Async", "--rw=randread --bs=4k --iodepth=32"),
    ("randwrite 4k qd32, Sync", "randwrite 4k qd32, Async", "--rw=randwrite --bs=4k --iodepth=32"),
    ("read 128k qd32, Sync", "read 128k qd32, Async", "--rw=read --bs=128k --iodepth=32"),
];

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let names: Vec<String> = contenders.iter().map(|c| c.name.clone()).collect();
    let mut report = Report::new(format!("devices, 2 vCPUs, {runs} runs"), &names);
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    File::create(&disk)?.set_len(DISK)?;
    std::io::copy(
        &mut std::io::Read::take(File::open("/dev/urandom")?, DISK),
        &mut File::options().write(true).open(&disk)?,
    )?;
    for run in 0..runs {
        for (index, contender) in contenders.iter().enumerate() {
            for (engine, async_name) in [("Sync", false), ("Async", true)] {
                let vmm = Vmm::start(contender)?;
                vmm.configure(2, 256)?;
                vmm.drive("data", &disk, false, engine)?;
                vmm.boot()?;
                for (sync_job, async_job, arguments) in JOBS {
                    let name = if async_name { async_job } else { sync_job };
                    let iops = fio(&vmm, arguments).with_context(|| format!("{}: {name}", contender.name))?;
                    report.add(name, "IOPS", run, index, iops);
                }
            }
        }
    }
    Ok(report)
}

/// Runs fio on the second disk and returns operations per second.
fn fio(vmm: &Vmm, arguments: &str) -> Result<f64> {
    let output = vmm.sh(&format!(
        "fio --name=job --filename=/dev/vdb --direct=1 --ioengine=libaio --time_based --runtime=5 \
         --ramp_time=1 --randrepeat=0 --output-format=json {arguments}"
    ))?;
    let report: Value = serde_json::from_str(&output[output.find('{').context("fio said nothing")?..])?;
    let job = &report["jobs"][0];
    let iops = |kind: &str| job[kind]["iops"].as_f64().unwrap_or(0.0);
    Ok(iops("read") + iops("write"))
}
