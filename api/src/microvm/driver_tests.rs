//! Whole lives of microVMs against a VMM that is not one, see [`super::super::fake`].

use std::fs;
use std::time::Duration;

use crate::microvm::fake::{Bench, start_error};
use crate::microvm::{Reason, RequestError, StartError, State, Stop};

#[tokio::test]
async fn a_whole_life() {
    let bench = Bench::new();
    let vm = bench.create("a", "listens");
    vm.started().await.unwrap();
    assert!(matches!(vm.state(), State::Running));
    vm.pause().await.unwrap();
    assert!(matches!(vm.state(), State::Paused));
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    assert!(matches!(vm.state(), State::Running));
    let times = vm.times();
    assert!(times.api_ready.unwrap() <= times.configured.unwrap());
    assert!(times.configured.unwrap() <= times.started.unwrap());
    let console = fs::read_to_string(vm.console_log().unwrap()).unwrap();
    let order =
        ["/machine-config", "/boot-source", "/vsock", "/actions"].map(|path| console.find(path).unwrap());
    assert!(order.is_sorted(), "{console}");
    // No agent answers, so the guest gets Ctrl+Alt+Del, at which this one powers off.
    let ending = vm.stop(Stop::Orderly { grace: Duration::from_secs(10) }).await;
    assert!(matches!(ending.reason, Reason::PoweredOff), "{}", ending.reason);
    assert!(ending.left_behind.is_none());
    assert!(matches!(vm.pause().await, Err(RequestError::NotRunning)));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_guest_that_does_not_end_is_killed_when_its_grace_is_over() {
    let bench = Bench::new();
    let vm = bench.create("a", "stubborn");
    vm.started().await.unwrap();
    let ending = vm.stop(Stop::Orderly { grace: Duration::from_millis(200) }).await;
    assert!(matches!(ending.reason, Reason::Killed), "{}", ending.reason);
    assert!(bench.is_clean());
}

#[tokio::test]
async fn an_orderly_stop_can_be_forced() {
    let bench = Bench::new();
    let vm = bench.create("a", "stubborn");
    vm.started().await.unwrap();
    let other = vm.clone();
    let orderly =
        tokio::spawn(async move { other.stop(Stop::Orderly { grace: Duration::from_secs(60) }).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(matches!(vm.state(), State::Stopping));
    vm.stop(Stop::Force).await;
    assert!(matches!(orderly.await.unwrap().reason, Reason::Killed));
}

#[tokio::test]
async fn a_start_is_abandoned_when_stopped() {
    let bench = Bench::new();
    let vm = bench.create("a", "silent");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(matches!(vm.state(), State::Starting));
    assert!(matches!(vm.pause().await, Err(RequestError::NotRunning)));
    let ending = vm.stop(Stop::Orderly { grace: Duration::from_secs(60) }).await;
    assert!(matches!(ending.reason, Reason::NotStarted(StartError::Abandoned)));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn each_failed_start_says_why_and_leaves_nothing() {
    let bench = Bench::new();
    let ending = bench.create("dies-early", "").started().await.unwrap_err();
    assert_eq!(start_error(&ending), "the VMM ended as it started (exit code 9)");
    assert_eq!(ending.log, ["cannot open /dev/kvm"]);
    let ending = bench.create("a", "refused").started().await.unwrap_err();
    assert_eq!(start_error(&ending), "no such kernel");
    let ending = bench.create("a", "dies-at-boot").started().await.unwrap_err();
    assert_eq!(start_error(&ending), "the VMM ended as it started (exit code 7)");
    let ending = bench.create("not_a_name", "x").started().await;
    assert!(start_error(&ending.unwrap_err()).contains("not_a_name"));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_vmm_that_cannot_be_spawned_is_named() {
    let bench = Bench::new();
    fs::remove_file(bench.path("vmm")).unwrap();
    let ending = bench.create("a", "").started().await.unwrap_err();
    assert!(start_error(&ending).contains("/vmm: No such file"), "{}", ending.reason);
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_panic_is_told_with_the_consoles_last_lines() {
    let bench = Bench::new();
    let vm = bench.create("a", "panics");
    let ending = vm.ended().await;
    assert!(matches!(ending.reason, Reason::Panicked), "{}", ending.reason);
    assert_eq!(ending.console.last().unwrap(), "Kernel panic - not syncing: No working init found.");
    assert!(bench.is_clean());
}

#[tokio::test]
async fn a_refused_request_changes_nothing() {
    let bench = Bench::new();
    let vm = bench.create("a", "deaf");
    vm.started().await.unwrap();
    let error = vm.pause().await.unwrap_err();
    assert_eq!(error.to_string(), "no");
    assert!(matches!(vm.state(), State::Running));
    vm.stop(Stop::Force).await;
}

#[tokio::test]
async fn two_of_one_name_do_not_run_and_the_first_is_not_hurt() {
    let bench = Bench::new();
    let first = bench.create("a", "listens");
    first.started().await.unwrap();
    let second = bench.create("a", "listens").started().await.unwrap_err();
    assert!(start_error(&second).contains("already a microVM named a"));
    assert!(matches!(first.state(), State::Running));
    first.stop(Stop::Force).await;
    assert!(bench.is_clean());
}

#[tokio::test]
async fn dropping_the_last_handle_kills() {
    let bench = Bench::new();
    let vm = bench.create("a", "listens");
    vm.started().await.unwrap();
    let mut state = vm.watch();
    drop(vm);
    let state = state.wait_for(|state| matches!(state, State::Stopped(_))).await.unwrap().clone();
    assert!(matches!(state, State::Stopped(ending) if matches!(ending.reason, Reason::Killed)));
    assert!(bench.is_clean());
}

#[tokio::test]
async fn the_agent_of_a_dead_guest_is_not_waited_for() {
    let bench = Bench::new();
    let vm = bench.create("a", "panics");
    let error = vm.agent(Duration::from_secs(60)).await.unwrap_err();
    assert!(matches!(error, crate::microvm::GuestError::Ended(_)), "{error}");
}
