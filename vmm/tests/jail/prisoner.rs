//! The process inside: enters the jail as told by its arguments, then attempts one thing.
//!
//! Arguments are `key=value`; see [`main`]. It ends with [`THROUGH`] if the attempt succeeded and with
//! [`REFUSED`] and the error on standard output if not.

use std::process::ExitCode;

use pulau_vmm::jail::{self, Cgroup, JailConfig, Network};
use pulau_vmm::seccomp::{self, Thread};
use pulau_vmm::signals;

/// Exit status: the attempt succeeded.
pub const THROUGH: i32 = 0;
/// Exit status: the kernel refused.
pub const REFUSED: i32 = 42;
/// Exit status: there is no jail to attempt anything from.
pub const NO_JAIL: i32 = 43;

pub fn main(args: &[String]) -> ExitCode {
    let mut config = JailConfig::new("", 0, 0);
    let mut cgroup = Cgroup { path: "".into(), limits: Vec::new() };
    let (mut filter, mut attempt) = (None, Vec::new());
    for arg in args {
        let (key, value) = arg.split_once('=').expect("key=value");
        match key {
            "root" => config.root = value.into(),
            "uid" => config.uid = value.parse().unwrap(),
            "gid" => config.gid = value.parse().unwrap(),
            "net" if value == "new" => config.network = Network::New,
            "net" => config.network = Network::Namespace(value.into()),
            "tap" => config.taps.push(value.into()),
            "cgroup" => cgroup.path = value.into(),
            "cgroup-limit" => cgroup.limits.push(value.parse().unwrap()),
            "resource-limit" => config.resource_limits.push(value.parse().unwrap()),
            "pid-file" => config.pid_file = Some(value.into()),
            "filter" => filter = Some(filter_named(value)),
            "attempt" => attempt.push(value),
            _ => panic!("unknown argument {arg}"),
        }
    }
    if !cgroup.path.as_os_str().is_empty() {
        config.cgroup = Some(cgroup);
    }
    if !config.root.as_os_str().is_empty()
        && let Err(error) = jail::enter(&config)
    {
        eprintln!("{error}");
        return ExitCode::from(NO_JAIL as u8);
    }
    if let Some(filter) = filter {
        signals::install().unwrap();
        seccomp::apply(filter).unwrap();
    }
    match crate::attempts::make(&attempt) {
        Ok(()) => ExitCode::from(THROUGH as u8),
        Err(error) => {
            println!("{error}");
            ExitCode::from(REFUSED as u8)
        }
    }
}

fn filter_named(name: &str) -> Thread {
    match name {
        "setup" => Thread::Setup,
        "vmm" => Thread::Vmm,
        "vcpu" => Thread::Vcpu,
        _ => panic!("no filter is called {name}"),
    }
}
