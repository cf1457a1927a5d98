//! How many microVMs a host takes, and how fast they come.

use std::time::{Duration, Instant};

use anyhow::Result;
use pulau_tests::artifact;

use crate::measure;
use crate::report::Report;
use crate::vmm::{Contender, Vmm, names};

const MEMORY_MIB: u32 = 128;
/// microVMs per batch.
const BATCH: usize = 8;
/// Memory in which idle microVMs are to fit, in KiB.
const GIVEN: f64 = 1024.0 * 1024.0;

fn boot(contender: &Contender) -> Result<Vmm> {
    let vmm = Vmm::start(contender)?;
    vmm.configure(1, MEMORY_MIB, &artifact("PULAU_TEST_ROOTFS_MINIMAL"))?;
    vmm.boot()?;
    vmm.guest_init()?;
    Ok(vmm)
}

pub fn run(contenders: &[Contender], runs: usize) -> Result<Report> {
    let title = format!("density, 1 vCPU, {MEMORY_MIB} MiB, {BATCH} microVMs, {runs} runs");
    let mut report = Report::new(title, names(contenders));
    for run in 0..runs {
        for (index, contender) in contenders.iter().enumerate() {
            let start = Instant::now();
            for _ in 0..BATCH {
                boot(contender)?;
            }
            let one_by_one = BATCH as f64 / start.elapsed().as_secs_f64();

            let start = Instant::now();
            let vmms = std::thread::scope(|scope| {
                let booting: Vec<_> = (0..BATCH).map(|_| scope.spawn(|| boot(contender))).collect();
                booting.into_iter().map(|b| b.join().expect("no panic")).collect::<Result<Vec<_>>>()
            })?;
            let side_by_side = BATCH as f64 / start.elapsed().as_secs_f64();

            // Idle: the agent waits and the kernel has settled.
            for vmm in &vmms {
                vmm.agent()?;
            }
            std::thread::sleep(Duration::from_secs(2));
            let mut total = 0.0;
            for vmm in &vmms {
                total += measure::memory(vmm.pid(), MEMORY_MIB.into())?.total_pss as f64;
            }
            let each = total / BATCH as f64;
            report.add("boots per second, one by one", "1/s", run, index, one_by_one);
            report.add("boots per second, side by side", "1/s", run, index, side_by_side);
            report.add("memory of an idle microVM, PSS", "KiB", run, index, each);
            report.add("idle microVMs in 1 GiB", "count", run, index, (GIVEN / each).floor());
        }
    }
    Ok(report)
}
