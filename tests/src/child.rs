//! Child processes of tests, which get only so much time.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use crate::{PATIENCE, give_up_on};

/// More than the bounds that `pulau` is given, so that it is the one to say what took too long.
const BOUND: Duration = PATIENCE.saturating_mul(2);

/// Has `command` run on the terminal `slave`, in a session of its own, with all its streams.
pub fn on_terminal(command: &mut Command, slave: &OwnedFd) {
    let stream = || Stdio::from(slave.try_clone().expect("a descriptor"));
    command.stdin(stream()).stdout(stream()).stderr(stream());
    // SAFETY: only system calls, between fork and exec.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            // SAFETY: standard input is the terminal; the request takes an integer.
            match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
}

/// Waits for a child to end by itself, and returns all that it wrote to its pipes. A child that does not end in
/// time is killed, and the test fails.
#[track_caller]
pub fn output(mut child: Child) -> Output {
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    drop(child.stdin.take());
    let status = poll_end(&mut child);
    if status.is_none() {
        let _ = child.kill();
    }
    // Pipes end with the last process that has them.
    let rest = |pipe: Receiver<Vec<u8>>| pipe.recv_timeout(PATIENCE).unwrap_or_default();
    let (stdout, stderr) = (rest(stdout), rest(stderr));
    match status {
        Some(status) => Output { status, stdout, stderr },
        None => panic!(
            "gave up waiting for the end of process {} after {BOUND:?}; it wrote {:?} and {:?}",
            child.id(),
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        ),
    }
}

/// Waits for a child to end by itself; one that does not is killed, and the test fails.
#[track_caller]
pub fn end(child: &mut Child) -> ExitStatus {
    poll_end(child).unwrap_or_else(|| {
        let _ = child.kill();
        panic!("gave up waiting for the end of process {} after {BOUND:?}", child.id())
    })
}

fn poll_end(child: &mut Child) -> Option<ExitStatus> {
    give_up_on(BOUND, || child.try_wait().expect("to wait for a child"))
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}
