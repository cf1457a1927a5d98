//! After many microVMs a host has what it had before.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pulau_tests::footprint::{Footprint, descriptors};
use pulau_tests::vmm::{Vmm, triple_fault_kernel};
use pulau_tests::{PATIENCE, wait_for};
use serde_json::json;

/// One test at a time: they look at what this process and the host have.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A microVM that ends at its first instruction, with every device there is.
fn boot_and_end() {
    let mut vmm = Vmm::start();
    let (kernel, disk) = (vmm.path("kernel"), vmm.path("disk"));
    std::fs::write(&kernel, triple_fault_kernel()).unwrap();
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    vmm.put("/boot-source", json!({"kernel_image_path": kernel})).ok();
    vmm.put("/drives/d", pulau_tests::vmm::drive("d", &disk, false, false)).ok();
    vmm.put("/vsock", json!({"guest_cid": 3, "uds_path": vmm.path("vsock")})).ok();
    vmm.put("/entropy", json!({})).ok();
    vmm.put("/balloon", json!({"amount_mib": 0, "deflate_on_oom": true})).ok();
    vmm.boot();
    vmm.wait();
    assert!(!vmm.path("api.sock").exists() && !vmm.path("vsock").exists());
}

#[test]
fn two_hundred_microvms_leave_nothing_behind() {
    let _turn = alone();
    // The first one is not counted: it may fill caches.
    boot_and_end();
    let temporary = std::env::temp_dir();
    let dirs: [&Path; 2] = [&temporary, Path::new("/dev/shm")];
    let before = Footprint::take(&dirs);
    let descriptors_before = descriptors(std::process::id());
    for _ in 0..200 {
        boot_and_end();
    }
    assert_eq!(Footprint::take(&dirs).left_since(&before), Vec::<String>::new());
    assert_eq!(descriptors(std::process::id()), descriptors_before);
}

#[test]
fn a_microvm_that_cannot_start_leaves_nothing_behind() {
    let _turn = alone();
    let mut vmm = Vmm::start();
    let count = || descriptors(vmm.pid());
    vmm.put("/vsock", json!({"guest_cid": 3, "uds_path": vmm.path("vsock")})).ok();
    let kernel = vmm.path("kernel");
    std::fs::write(&kernel, triple_fault_kernel()).unwrap();
    vmm.put("/boot-source", json!({"kernel_image_path": kernel})).ok();
    let missing = json!({"iface_id": "eth0", "host_dev_name": "no_such_tap0"});
    vmm.put("/network-interfaces/eth0", missing).ok();
    let before = count();
    for _ in 0..20 {
        vmm.put("/actions", json!({"action_type": "InstanceStart"})).refused(400, "no_such_tap0");
        assert!(!vmm.path("vsock").exists(), "the vsock socket of a failed start is gone");
    }
    // The last connection may still be closing.
    wait_for("the descriptors to be those from before", PATIENCE, || (count() <= before).then_some(()));
    assert!(vmm.is_running());
}
