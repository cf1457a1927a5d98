//! KVM: the device, the extensions the VMM uses, and whether it is the real thing.

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kvm_ioctls::{Cap, Kvm};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::kvm_guest::Speed;
use super::{Context, Finding, read};

const DEVICE: &str = "/dev/kvm";
/// The only KVM interface version there has been since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// How long the guest may take in all before KVM is called stuck.
const PROBE_DEADLINE: Duration = Duration::from_secs(3);

/// Below this many loops a second KVM interprets instructions (seen: 1.5 million).
const SOFTWARE_BELOW: f64 = 15e6;
/// Real KVM on the slowest processor worth using does more than this.
const SLOW_BELOW: f64 = 100e6;

/// Is `/dev/kvm` there, may we open it, and does it speak KVM?
pub fn device() -> Finding {
    if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        let cpuinfo = read("/proc/cpuinfo").unwrap_or_default();
        return cannot_open(e.kind(), &e.to_string(), &cpuinfo);
    }
    match Kvm::new().map(|kvm| kvm.get_api_version()) {
        Ok(API_VERSION) => Finding::ok(format!("{DEVICE}, API version {API_VERSION}")),
        Ok(other) => Finding::missing(
            format!("{DEVICE} speaks API version {other}, not {API_VERSION}"),
            "Run a Linux kernel with KVM.",
        ),
        Err(e) => Finding::missing(format!("{DEVICE} does not answer: {e}"), "Run a Linux kernel with KVM."),
    }
}

fn cannot_open(kind: ErrorKind, error: &str, cpuinfo: &str) -> Finding {
    match (kind, vendor_module(cpuinfo)) {
        (ErrorKind::PermissionDenied, _) => Finding::missing(
            format!("no permission to open {DEVICE}"),
            "Join its group and log in again: `sudo usermod -aG kvm $USER`; or run as root. In a container, \
             pass the device in (`--device /dev/kvm`).",
        ),
        (ErrorKind::NotFound, Some(module)) => Finding::missing(
            format!("{DEVICE} does not exist, though the processor can virtualise"),
            format!(
                "Load the module: `sudo modprobe {module}`. If that fails, `sudo dmesg | grep -i kvm` says \
                 why; often virtualisation is switched off in the firmware (BIOS)."
            ),
        ),
        (ErrorKind::NotFound, None) => Finding::missing(
            format!("{DEVICE} does not exist and the processor shows neither vmx nor svm"),
            "On a physical machine, switch virtualisation on in the firmware (BIOS). On a virtual one, ask \
             for nested virtualisation. Without either, use the test host: `scripts/test-host shell`.",
        ),
        _ => Finding::missing(format!("cannot open {DEVICE}: {error}"), "Run a Linux kernel with KVM."),
    }
}

/// The kernel module for this processor's virtualisation, if it has any.
fn vendor_module(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'))?.1;
    flags.split_whitespace().find_map(|flag| match flag {
        "vmx" => Some("kvm_intel"),
        "svm" => Some("kvm_amd"),
        _ => None,
    })
}

/// Does KVM run guest code on the processor, at full speed?
pub fn real(context: &Context) -> Finding {
    match run_probe(context) {
        Ok(speed) => judge(speed),
        Err(ProbeFailure::Stuck) => Finding::missing(
            format!("a test guest did not come back within {} s", PROBE_DEADLINE.as_secs()),
            "KVM is stuck: look at `sudo dmesg`, restart the host, or use the test host: \
             `scripts/test-host shell`.",
        ),
        Err(ProbeFailure::Failed(message)) => Finding::missing(
            format!("a test guest did not run: {message}"),
            "See the KVM device check; if that is ok, `sudo dmesg | grep -i kvm` may say more.",
        ),
    }
}

fn judge(speed: Speed) -> Finding {
    let millions = speed.loops_per_second / 1e6;
    if !speed.complete || speed.loops_per_second < SOFTWARE_BELOW {
        let lacks = if speed.complete { "" } else { ", cmpxchg16b not emulated" };
        return Finding::missing(
            format!("software KVM: guest code is interpreted ({millions:.1} M loops/s{lacks})"),
            "Ordinary kernels do not boot on it. Use a machine with hardware virtualisation, or the test \
             host, which the scripts start by themselves: `scripts/test-host shell`.",
        );
    }
    if speed.loops_per_second < SLOW_BELOW {
        return Finding::degraded(
            format!("guest code runs on the processor, but slowly ({millions:.0} M loops/s)"),
            "Look for an overloaded host or, on a virtual machine, for costly nested virtualisation.",
        );
    }
    Finding::ok(format!("guest code runs on the processor ({millions:.0} M loops/s)"))
}

enum ProbeFailure {
    Stuck,
    Failed(String),
}

/// Runs the probe in a child, which is left behind if even `SIGKILL` does not end it in time.
fn run_probe(context: &Context) -> Result<Speed, ProbeFailure> {
    let fail = |what: &str, e: &dyn std::fmt::Display| ProbeFailure::Failed(format!("{what}: {e}"));
    let mut child = Command::new(&context.probe_binary)
        .args(["doctor", "--run-kvm-probe"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| fail("cannot start the probe", &e))?;
    let Some(mut stdout) = child.stdout.take() else {
        return Err(ProbeFailure::Failed("the probe has no output".into()));
    };
    let deadline = Instant::now() + PROBE_DEADLINE;
    let mut output = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => {
                // Killed but not waited for: a process stuck in KVM would make us stuck as well.
                let _ = child.kill();
                return Err(ProbeFailure::Stuck);
            }
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(fail("poll", &e)),
            Ok(_) => {}
        }
        let mut chunk = [0; 512];
        match stdout.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => output.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(fail("reading from the probe", &e)),
        }
    }
    let _ = child.wait();
    parse_probe(&output)
}

fn parse_probe(output: &[u8]) -> Result<Speed, ProbeFailure> {
    match serde_json::from_slice::<Result<Speed, String>>(output) {
        Ok(Ok(speed)) => Ok(speed),
        Ok(Err(message)) => Err(ProbeFailure::Failed(message)),
        Err(_) => Err(ProbeFailure::Failed("the probe ended without an answer".into())),
    }
}

/// What the VMM asks of KVM, and what it is for.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "user memory"),
    (Cap::Irqchip, "irqchip"),
    (Cap::Pit2, "pit2"),
    (Cap::PitState2, "pit state"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::IrqRouting, "irq routing"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "cpuid"),
    (Cap::MpState, "mp state"),
    (Cap::VcpuEvents, "vcpu events"),
    (Cap::Debugregs, "debug registers"),
    (Cap::Xsave, "xsave"),
    (Cap::Xcrs, "xcrs"),
    (Cap::SetTssAddr, "tss address"),
    (Cap::AdjustClock, "clock"),
    (Cap::GetTscKhz, "tsc frequency"),
];

/// What makes it better.
const WELCOME: &[(Cap, &str, &str)] = &[
    (
        Cap::TscControl,
        "tsc control",
        "a snapshot made on a processor with another clock rate keeps wrong time",
    ),
    (Cap::TscDeadlineTimer, "tsc deadline timer", "guests use a slower timer"),
    (Cap::KvmclockCtrl, "clock control", "a paused guest may report a soft lock-up"),
];

/// Does KVM have every extension the VMM uses?
pub fn extensions() -> Finding {
    match Kvm::new() {
        Ok(kvm) => judge_extensions(kvm.get_max_vcpus(), |cap| kvm.check_extension(cap)),
        Err(e) => Finding::missing(format!("cannot ask {DEVICE}: {e}"), "See the KVM device check."),
    }
}

fn judge_extensions(max_vcpus: usize, has: impl Fn(Cap) -> bool) -> Finding {
    let lacking: Vec<_> = NEEDED.iter().filter(|(cap, _)| !has(*cap)).map(|(_, name)| *name).collect();
    if !lacking.is_empty() {
        return Finding::missing(
            format!("KVM lacks: {}", lacking.join(", ")),
            "Run a newer kernel, or a host whose KVM is not a restricted one.",
        );
    }
    let lesser: Vec<_> = WELCOME.iter().filter(|(cap, _, _)| !has(*cap)).collect();
    if !lesser.is_empty() {
        let names: Vec<_> = lesser.iter().map(|(_, name, effect)| format!("{name} ({effect})")).collect();
        return Finding::degraded(
            format!("KVM lacks: {}", names.join(", ")),
            "Depends on the processor and, on a virtual machine, on its hypervisor; nothing to set here.",
        );
    }
    Finding::ok(format!("all {} present, up to {max_vcpus} vCPUs", NEEDED.len() + WELCOME.len()))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn speed(millions: f64, complete: bool) -> State {
        judge(Speed { loops_per_second: millions * 1e6, complete }).state
    }

    #[test]
    fn tells_real_from_software() {
        assert_eq!(speed(1500.0, true), State::Ok);
        assert_eq!(speed(40.0, true), State::Degraded);
        assert_eq!(speed(1.5, true), State::Missing);
        assert_eq!(speed(1.5, false), State::Missing);
        assert_eq!(speed(1500.0, false), State::Missing, "an instruction it cannot run is not real KVM");
    }

    #[test]
    fn understands_the_probe() {
        let good = br#"{"Ok":{"loops_per_second":2.5e8,"complete":true}}"#;
        assert!(matches!(parse_probe(good), Ok(s) if s.complete && s.loops_per_second == 2.5e8));
        assert!(
            matches!(parse_probe(br#"{"Err":"KVM_RUN: no"}"#), Err(ProbeFailure::Failed(m)) if m == "KVM_RUN: no")
        );
        assert!(matches!(parse_probe(b""), Err(ProbeFailure::Failed(m)) if m.contains("without an answer")));
    }

    #[test]
    fn a_missing_device_gets_the_remedy_of_its_cause() {
        let intel = "processor\t: 0\nflags\t\t: fpu vmx sse\n";
        let plain = "processor\t: 0\nflags\t\t: fpu hypervisor vmxnotquite\n";
        let remedy = |kind, cpuinfo| cannot_open(kind, "e", cpuinfo).remedy.unwrap();
        assert!(remedy(ErrorKind::NotFound, intel).contains("modprobe kvm_intel"));
        assert!(remedy(ErrorKind::NotFound, plain).contains("nested virtualisation"));
        assert!(remedy(ErrorKind::PermissionDenied, intel).contains("usermod -aG kvm"));
    }

    #[test]
    fn names_the_extensions_that_lack() {
        let all = judge_extensions(64, |_| true);
        assert_eq!(all.state, State::Ok);
        let some = judge_extensions(64, |cap| !matches!(cap, Cap::Irqfd | Cap::TscControl));
        assert_eq!((some.state, some.detail.as_str()), (State::Missing, "KVM lacks: irqfd"));
        let lesser = judge_extensions(64, |cap| !matches!(cap, Cap::TscControl));
        assert_eq!(lesser.state, State::Degraded);
    }

    #[test]
    fn a_probe_that_never_answers_is_stuck_and_one_that_cannot_start_fails() {
        let context = |binary: &str| Context { data_dir: "/".into(), probe_binary: binary.into() };
        let gone = run_probe(&context("/nonexistent/pulau"));
        assert!(matches!(gone, Err(ProbeFailure::Failed(m)) if m.starts_with("cannot start")));
        let silent = run_probe(&context("/bin/true"));
        assert!(matches!(silent, Err(ProbeFailure::Failed(m)) if m.contains("without an answer")));
    }
}
