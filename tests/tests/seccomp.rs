//! System call filters, in a VMM that runs a guest: a thread that makes a call it never has to ends the
//! process, which says what it was; and nothing else ends it.

use pulau_tests::intruder::{make_system_call, thread_named};
use pulau_tests::vmm::Vmm;
use pulau_vmm::exit::ExitCode;
use serde_json::json;

const AF_INET: u64 = libc::AF_INET as u64;
const AF_UNIX: u64 = libc::AF_UNIX as u64;
const STREAM: u64 = libc::SOCK_STREAM as u64;
/// Fails with EFAULT where it is allowed: nothing is at the address.
const NOWHERE: u64 = 8;

/// Has a thread of a VMM with a running guest make a system call.
fn intrude(vmm: &Vmm, thread: &str, number: i64, arguments: [u64; 3]) {
    assert_eq!(vmm.sh("echo up"), "up\n");
    make_system_call(thread_named(vmm.pid(), thread), number, arguments, || {
        // Anything to do will wake the main thread, and the guest's own timer its vCPU.
        drop(std::os::unix::net::UnixStream::connect(vmm.path("api.sock")));
    });
}

#[track_caller]
fn kills(thread: &str, number: i64, arguments: [u64; 3]) {
    let mut vmm = Vmm::start();
    vmm.configure(1, 128, "");
    vmm.put("/serial", json!({"socket_path": vmm.path("console.sock")})).ok();
    vmm.boot();
    assert!(vmm.path("console.sock").exists() && vmm.path("vsock").exists());
    intrude(&vmm, thread, number, arguments);
    vmm.exits_with(ExitCode::BadSyscall as i32);
    let [a, b, c] = arguments;
    let message =
        format!("pulau-vmm: made the forbidden system call {number}({a:#x},{b:#x},{c:#x}) in thread ");
    assert!(vmm.log().contains(&message), "{message:?} is not in the log: {}", vmm.log());
    for socket in ["api.sock", "vsock", "console.sock"] {
        assert!(!vmm.path(socket).exists(), "{socket} is left");
    }
}

#[test]
fn every_thread_is_under_its_filter() {
    let vmm = Vmm::booted();
    vmm.sh("true");
    for task in std::fs::read_dir(format!("/proc/{}/task", vmm.pid())).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim().to_owned();
        // That of the start, and that of its own kind.
        assert_eq!((field("Seccomp:").as_str(), field("Seccomp_filters:").as_str()), ("2", "2"), "{status}");
    }
}

#[test]
fn the_main_thread_cannot_run_another_program() {
    kills("pulau-vmm", libc::SYS_execve, [NOWHERE; 3]);
}

#[test]
fn the_main_thread_cannot_reach_the_network() {
    kills("pulau-vmm", libc::SYS_socket, [AF_INET, STREAM, 0]);
}

#[test]
fn the_main_thread_cannot_make_memory_executable() {
    kills("pulau-vmm", libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC as u64]);
}

/// Both of these the main thread may do.
#[test]
fn a_vcpu_cannot_open_files_or_sockets() {
    kills("vcpu 0", libc::SYS_openat, [libc::AT_FDCWD as u64, NOWHERE, 0]);
    kills("vcpu 0", libc::SYS_socket, [AF_UNIX, STREAM, 0]);
}

/// It is the filter that ends the process: what is allowed does not, nor does anything without filters.
#[test]
fn what_is_allowed_is_let_through() {
    let mut vmm = Vmm::booted();
    intrude(&vmm, "pulau-vmm", libc::SYS_sched_yield, [0; 3]);
    assert_eq!(vmm.sh("echo still up"), "still up\n");
    assert!(vmm.is_running());

    let mut vmm = Vmm::start_with(&["--no-seccomp"]);
    vmm.configure(1, 128, "");
    vmm.boot();
    // Not in any filter; returns zero, as the call in whose place it is does at times.
    let process = libc::PRIO_PROCESS as u64;
    intrude(&vmm, "pulau-vmm", libc::SYS_setpriority, [process, 0, 0]);
    assert_eq!(vmm.sh("echo still up"), "still up\n");
    assert!(vmm.is_running());
}
