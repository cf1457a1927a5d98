//! A network of a test's own, so that tests with taps of one name run side by side and leave nothing.

use std::process::Command;

/// The host's address on `tap0` in such a network; guests are in 172.16.0.0/24 too.
pub const HOST: &str = "172.16.0.1";

/// Runs `test` in a thread with a network of its own: with a tap `tap0` that has the address [`HOST`].
/// Programs the test starts are in it too.
pub fn in_own_network(test: impl FnOnce() + Send + 'static) {
    in_empty_network(move || {
        ip("tuntap add tap0 mode tap");
        ip(&format!("addr add {HOST}/24 dev tap0"));
        ip("link set tap0 up");
        test();
    });
}

/// The same, with nothing in it but loopback.
pub fn in_empty_network(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        ip("link set lo up");
        test();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip`, which must succeed, and returns what it prints.
#[track_caller]
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip runs");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
