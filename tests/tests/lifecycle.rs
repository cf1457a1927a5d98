//! How a microVM pauses, resumes and ends.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pulau_tests::vmm::{Vmm, triple_fault_kernel};
use pulau_tests::{PATIENCE, wait_for};
use serde_json::json;

/// Exit codes of pulau-vmm, as documented in vmm/docs/api.md.
use pulau_vmm::exit::ExitCode;

fn start_counting(vmm: &Vmm) {
    vmm.sh("(i=0; while :; do i=$((i + 1)); echo $i > /tmp/count; done) >/dev/null 2>&1 </dev/null & echo started");
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    let vmm = Vmm::start();
    vmm.configure(2, 128, "");
    vmm.boot();
    start_counting(&vmm);
    let count = || vmm.sh("cat /tmp/count").trim().parse::<u64>().unwrap_or(0);
    let before = count();
    wait_for("the counter to move", PATIENCE, || (count() > before).then_some(()));

    vmm.patch("/vm", json!({"state": "Paused"})).ok();
    assert_eq!(vmm.get("/").ok()["state"], "Paused");
    let ticks = cpu_ticks(vmm.pid());
    std::thread::sleep(Duration::from_secs(1));
    assert!(cpu_ticks(vmm.pid()) <= ticks + 5, "a paused VM takes no CPU time");
    vmm.patch("/vm", json!({"state": "Resumed"})).ok();
    let after = count();
    wait_for("the counter to move again", PATIENCE, || (count() > after).then_some(()));
}

/// CPU time of a process in clock ticks (proc(5), fields utime and stime).
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn pausing_many_times_under_load_loses_nothing() {
    let vmm = Vmm::start();
    vmm.configure(2, 256, "");
    vmm.boot();
    vmm.sh("true");
    let (result, pauses) = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            vmm.sh("dd if=/dev/urandom of=/tmp/a bs=64k count=200 2>/dev/null; cp /tmp/a /tmp/b; cmp /tmp/a /tmp/b && echo same")
        });
        let deadline = Instant::now() + PATIENCE;
        let mut pauses = 0;
        while !work.is_finished() && Instant::now() < deadline {
            vmm.patch("/vm", json!({"state": "Paused"})).ok();
            vmm.patch("/vm", json!({"state": "Resumed"})).ok();
            pauses += 1;
        }
        (work.join().unwrap(), pauses)
    });
    assert_eq!(result, "same\n");
    assert!(pauses >= 10, "the guest was done after {pauses} pauses");
}

#[test]
fn power_off_ends_the_process_with_success() {
    let mut vmm = Vmm::booted();
    vmm.sh_and_end("poweroff -f");
    vmm.exits_with(ExitCode::Ok as i32);
    assert!(!vmm.path("api.sock").exists(), "the control socket is gone");
    assert!(!vmm.path("vsock").exists(), "the vsock socket is gone");
}

#[test]
fn reboot_ends_the_process_with_its_own_code() {
    let mut vmm = Vmm::booted();
    vmm.sh_and_end("reboot -f");
    vmm.exits_with(ExitCode::GuestReboot as i32);
}

#[test]
fn a_guest_panic_ends_the_process_with_its_own_code_and_is_logged() {
    // The kernel panics when its init ends.
    let mut vmm = Vmm::start();
    vmm.configure(1, 128, "init=/bin/true");
    vmm.boot();
    vmm.exits_with(ExitCode::GuestPanic as i32);
    assert!(vmm.log().contains("panic"), "{}", vmm.log());
    assert!(vmm.console().contains("Attempted to kill init"), "{}", vmm.console());
}

#[test]
fn sysrq_panics_and_resets_on_demand() {
    for (key, code) in [('c', ExitCode::GuestPanic), ('b', ExitCode::GuestReboot)] {
        let mut vmm = Vmm::booted();
        vmm.sh_and_end(&format!("echo {key} > /proc/sysrq-trigger"));
        vmm.exits_with(code as i32);
    }
}

#[test]
fn ctrl_alt_del_shuts_the_guest_down_in_order() {
    let mut vmm = Vmm::booted();
    vmm.sh("true");
    vmm.put("/actions", json!({"action_type": "SendCtrlAltDel"})).ok();
    vmm.exits_with(ExitCode::Ok as i32);
}

#[test]
fn a_triple_fault_ends_the_process_with_its_own_code() {
    let vmm = Vmm::start();
    let kernel = vmm.path("triple");
    std::fs::write(&kernel, triple_fault_kernel()).unwrap();
    vmm.put("/boot-source", json!({"kernel_image_path": kernel})).ok();
    let mut vmm = vmm;
    vmm.boot();
    vmm.exits_with(ExitCode::TripleFault as i32);
}

#[test]
fn signals_end_the_process_in_order() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut vmm = Vmm::booted();
        vmm.sh("true");
        vmm.signal(signal);
        vmm.exits_with(ExitCode::Ok as i32);
        assert!(!vmm.path("api.sock").exists());
    }
}
