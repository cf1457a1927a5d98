//! How fast a microVM is there, and what it costs beyond the guest's own memory: 1 vCPU, 128 MiB.

use anyhow::Result;
use pulau_tests::artifact;

use crate::measure;
use crate::report::Report;
use crate::vmm::{Contender, Vmm};

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let names: Vec<String> = contenders.iter().map(|c| c.name.clone()).collect();
    let mut report = Report::new(format!("boot, 1 vCPU, 128 MiB, {runs} runs"), &names);
    let kernel = artifact("PULAU_TEST_KERNEL");
    // One run of each that does not count, to fill the caches.
    for run in 0..=runs {
        for (index, contender) in contenders.iter().enumerate() {
            let vmm = Vmm::start(contender)?;
            vmm.configure(1, 128)?;
            let request = vmm.boot()?;
            let init = vmm.guest_init()?;
            vmm.agent()?;
            let memory = measure::memory(vmm.pid(), &kernel)?;
            let Some(run) = run.checked_sub(1) else { continue };
            let mut add = |name, unit, value| report.add(name, unit, run, index, value);
            add("process start to API", "ms", vmm.start_to_api.as_secs_f64() * 1e3);
            add("InstanceStart request", "ms", request.as_secs_f64() * 1e3);
            add("InstanceStart to guest init", "ms", init.as_secs_f64() * 1e3);
            add("memory beyond the guest's, PSS", "KiB", memory.overhead_pss as f64);
            add("memory beyond the guest's, dirty", "KiB", memory.overhead_dirty as f64);
        }
    }
    Ok(report)
}
