//! How fast a microVM is there, by phase, and what it costs beyond the guest's own memory: 1 vCPU, 128 MiB.

use anyhow::{Context, Result};
use pulau_tests::artifact;

use crate::measure;
use crate::report::Report;
use crate::vmm::{Contender, Vmm, names};

const MEMORY_MIB: u32 = 128;

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let mut report = Report::new(format!("boot, 1 vCPU, {MEMORY_MIB} MiB, {runs} runs"), names(contenders));
    let root = artifact("PULAU_TEST_ROOTFS_MINIMAL");
    // One run of each that does not count, to fill the caches.
    for run in 0..=runs {
        for (index, contender) in contenders.iter().enumerate() {
            let vmm = Vmm::start(contender)?;
            vmm.configure(1, MEMORY_MIB, &root)?;
            let request = vmm.boot()?.as_secs_f64() * 1e3;
            let init = vmm.guest_init()?.as_secs_f64() * 1e3;
            let exits = measure::exits(vmm.pid());
            let phases = vmm.agent()?.health()?.boot;
            let memory = measure::memory(vmm.pid(), MEMORY_MIB.into())?;
            let Some(run) = run.checked_sub(1) else { continue };
            let at = |name| {
                let phase = phases.iter().find(|p| p.phase == name).context("a phase of the agent's")?;
                anyhow::Ok(phase.at_us as f64 / 1e3)
            };
            let (guest_init, ready) = (at("init")?, at("ready")?);
            let mut add = |name: &str, unit, value| report.add(name, unit, run, index, value);
            add("process start to API", "ms", vmm.start_to_api.as_secs_f64() * 1e3);
            add("InstanceStart to guest init", "ms", init);
            add("  the request, of it", "ms", request);
            add("  until the guest's clock starts", "ms", init - guest_init);
            add("  guest kernel from there to init", "ms", guest_init);
            add("init to ready", "ms", ready - guest_init);
            if let Some(exits) = exits {
                add("guest exits until init", "count", exits);
            }
            add("memory beyond the guest's, PSS", "KiB", memory.overhead_pss as f64);
            add("  without the program's file", "KiB", memory.overhead_anonymous as f64);
        }
    }
    Ok(report)
}
