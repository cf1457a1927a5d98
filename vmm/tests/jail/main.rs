//! Tries to get out of the jail and past the system call filters.
//!
//! This program is both sides: without arguments of its own it is the warder, which makes jails and looks
//! at what became of the host; as `prisoner` it enters one as `pulau-vmm` does and attempts one thing.
//! It has no test harness around it, because that would run threads, which a process must not have when it
//! enters a jail. Needs root; the host is left as it was. `cost` measures instead of testing.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has failed")]

mod attempts;
mod cell;
mod cost;
mod failures;
mod prisoner;
mod walls;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// A test: its name, and what it does. It panics to fail, and may say why it cannot be run here.
type Test = (&'static str, fn() -> Result<(), Unable>);

/// Why a test cannot be run on this host.
struct Unable(&'static str);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("prisoner", rest)) = args.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        return prisoner::main(rest);
    }
    if args.first().is_some_and(|arg| arg == "cost") {
        cost::main(args.get(1).map_or(100, |runs| runs.parse().unwrap()));
        return ExitCode::SUCCESS;
    }
    let wanted = args.iter().find(|arg| !arg.starts_with('-'));
    let tests: Vec<Test> = [walls::TESTS, failures::TESTS].concat();
    let (mut failed, mut run, mut ignored) = (0, 0, 0);
    for (name, test) in tests.into_iter().filter(|(name, _)| wanted.is_none_or(|part| name.contains(part))) {
        if args.iter().any(|arg| arg == "--list") {
            println!("{name}: test");
            continue;
        }
        // SAFETY: has no preconditions.
        let outcome = if unsafe { libc::geteuid() } == 0 {
            catch_unwind(AssertUnwindSafe(test))
        } else {
            Ok(Err(Unable("needs root")))
        };
        match outcome {
            Ok(Ok(())) => {
                println!("test {name} ... ok");
                run += 1;
            }
            Ok(Err(Unable(why))) => {
                println!("test {name} ... ignored, {why}");
                ignored += 1;
            }
            Err(_) => {
                println!("test {name} ... FAILED");
                failed += 1;
            }
        }
    }
    println!("\ntest result: {run} passed; {failed} failed; {ignored} ignored");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
