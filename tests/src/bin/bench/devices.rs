//! Block devices: throughput and latency at queue depth 1 and 32, by fio in the guest over each engine, and
//! by fio on the host over the same file.
//!
//! The file is in the host's page cache, so that what is measured is the way there.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pulau_tests::artifact;
use serde_json::Value;

use crate::report::Report;
use crate::vmm::{Contender, Vmm, counted, names};

/// Size of the disk under test, in bytes.
const DISK: u64 = 256 << 20;

/// What fio does: name in the report, kind of transfer, and fio's arguments.
const JOBS: [(&str, &str, &str); 6] = [
    ("read 4k qd1", "read", "--rw=randread --bs=4k --iodepth=1"),
    ("write 4k qd1", "write", "--rw=randwrite --bs=4k --iodepth=1"),
    ("read 4k qd32", "read", "--rw=randread --bs=4k --iodepth=32"),
    ("write 4k qd32", "write", "--rw=randwrite --bs=4k --iodepth=32"),
    ("read 128k qd32", "read", "--rw=read --bs=128k --iodepth=32"),
    ("write 128k qd32", "write", "--rw=write --bs=128k --iodepth=32"),
];
/// fio aligns its memory to what the kernel says is a cache line, and aborts where that is no power of two. A
/// VMM that gives its guests the emulated processor's CPUID leaf 0x8000001d as it is has it say just that; without
/// it, fio takes 64 bytes.
const HIDE_CACHES: &str = "mount -t tmpfs none /sys/devices/system/cpu/cpu0/cache";
const ENGINES: [&str; 2] = ["Sync", "Async"];

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let mut columns = names(contenders);
    columns.push("host".into());
    let mut report = Report::new(format!("block, 1 vCPU, {runs} runs"), columns);
    // Not on tmpfs, where the kernel hands requests of io_uring to threads.
    let dir = tempfile::tempdir_in("/var/tmp")?;
    let disk = dir.path().join("disk");
    std::io::copy(&mut std::io::repeat(0x5a).take(DISK), &mut File::create(&disk)?)?;
    for run in 0..runs {
        for (index, contender) in contenders.iter().enumerate() {
            for engine in ENGINES {
                measure(contender, &disk, engine, &mut |name, unit, value| {
                    report.add(name, unit, run, index, value)
                })
                .with_context(|| contender.name.clone())?;
            }
        }
        for (name, kind, arguments) in JOBS {
            settle()?;
            let command = fio(&disk.to_string_lossy(), 0, arguments);
            let output = Command::new("sh").args(["-c", &command]).output().context("fio")?;
            ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            let figures = figures(&String::from_utf8_lossy(&output.stdout), kind)?;
            for engine in ENGINES {
                for (what, unit, value) in &figures {
                    report.add(&format!("{name} {engine}{what}"), unit, run, contenders.len(), *value);
                }
            }
        }
    }
    Ok(report)
}

fn measure(
    contender: &Contender,
    disk: &Path,
    engine: &str,
    add: &mut dyn FnMut(&str, &'static str, f64),
) -> Result<()> {
    let vmm = Vmm::start(contender)?;
    vmm.configure(1, 256, &artifact("PULAU_TEST_ROOTFS_BENCH"))?;
    vmm.drive("data", disk, false, engine)?;
    vmm.boot()?;
    vmm.sh(HIDE_CACHES)?;
    for (name, kind, arguments) in JOBS {
        settle()?;
        let output = vmm.sh(&fio("/dev/vdb", 1, arguments)).with_context(|| format!("{name} {engine}"))?;
        for (what, unit, value) in figures(&output, kind)? {
            add(&format!("{name} {engine}{what}"), unit, value);
        }
    }
    Ok(())
}

/// Writes back what the job before left in the host's page cache, or whoever comes next is made to wait for it.
fn settle() -> Result<()> {
    ensure!(Command::new("sync").status().context("sync")?.success(), "sync failed");
    Ok(())
}

/// `direct`: past the guest's page cache. On the host it is the page cache that is read, as by the VMMs.
fn fio(file: &str, direct: u8, arguments: &str) -> String {
    let length = if counted() { "--number_ios=2000" } else { "--time_based --runtime=2 --ramp_time=0.5" };
    format!(
        "fio --name=job --filename={file} --direct={direct} --invalidate=0 --ioengine=libaio {length} --norandommap \
         --output-format=json {arguments}"
    )
}

/// Throughput and latency of a report by fio.
fn figures(output: &str, kind: &str) -> Result<[(&'static str, &'static str, f64); 2]> {
    let report: Value = serde_json::from_str(&output[output.find('{').context("fio said nothing")?..])?;
    let job = &report["jobs"][0][kind];
    let number = |value: &Value| value.as_f64().filter(|v| *v > 0.0).context("fio did nothing");
    let bytes = number(&job["bw_bytes"])?;
    Ok([
        ("", "MiB/s", bytes / f64::from(1 << 20)),
        (", latency", "µs", number(&job["lat_ns"]["mean"])? / 1e3),
    ])
}
