//! `pulau-vmm`: one microVM per process.

use std::fs::File;
use std::os::fd::FromRawFd;

use pulau_vmm::config::{FullVmConfig, VmConfig};
use pulau_vmm::devices::serial::Sink;
use pulau_vmm::event_loop::{EventLoop, EventSet};
use pulau_vmm::machine::{Machine, Resources};
use pulau_vmm::stop::StopSink;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: pulau-vmm CONFIG")?;
    let full: FullVmConfig = serde_json::from_reader(File::open(path)?)?;
    let config = VmConfig::try_from(full)?;
    let kvm = kvm_ioctls::Kvm::new()?;
    let mut event_loop = EventLoop::new()?;
    let stop = StopSink::new()?;
    event_loop.own_events().add(stop.event(), 0, EventSet::IN)?;
    // SAFETY: the standard descriptors are open and nothing else here uses them.
    let (input, output) = unsafe { (File::from_raw_fd(0), File::from_raw_fd(1)) };
    let machine = Machine::build(
        &config,
        Resources {
            kvm: &kvm,
            event_loop: &mut event_loop,
            stop: stop.clone(),
            boot_timer: true,
            console: Sink::Files { output, input: Some(input) },
            prepare_vcpu: || Ok(()),
        },
    )?;
    machine.run();
    loop {
        event_loop.run_once(-1)?;
        if let Some(reason) = stop.reason() {
            drop(machine);
            eprintln!("{reason:?}; {:?}", ());
            return Ok(());
        }
    }
}
