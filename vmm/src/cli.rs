//! The command line of `pulau-vmm`: Firecracker's options, and those of the jail.
//!
//! [`parse`] only reads arguments. It looks at no file and changes nothing.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use lexopt::Arg;

use crate::config::{DEFAULT_INSTANCE_ID, LogLevel, LoggerConfig, check_instance_id};
use crate::jail::{Cgroup, CgroupLimit, JailConfig, Network, ResourceLimit};

/// Where the API's socket is unless the command line says otherwise.
pub const DEFAULT_API_SOCKET: &str = "/run/pulau-vmm.socket";
/// The largest body of a request, and the largest metadata, unless the command line says otherwise.
pub const DEFAULT_PAYLOAD_LIMIT: usize = 51_200;

/// What the command line asks for.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// Be a VMM.
    Run(Box<Options>),
    /// Write [`HELP`].
    Help,
    /// Write the version.
    Version,
}

/// What the command line says about one microVM. Paths are those inside the jail, if there is one.
#[derive(Debug, PartialEq)]
pub struct Options {
    /// `--id`
    pub id: String,
    /// `--api-sock`; `None` with `--no-api`.
    pub api_socket: Option<PathBuf>,
    /// `--config-file`
    pub config_file: Option<PathBuf>,
    /// `--metadata`
    pub metadata: Option<PathBuf>,
    /// `--log-path`, `--level`, `--show-level`, `--show-log-origin`, `--module`, if any was given.
    pub logger: Option<LoggerConfig>,
    /// `--metrics-path`
    pub metrics_path: Option<PathBuf>,
    /// `--boot-timer`
    pub boot_timer: bool,
    /// Not with `--no-seccomp`.
    pub seccomp: bool,
    /// `--enable-pci`, which is taken so that Firecracker's users need not change their scripts.
    pub pci_asked_for: bool,
    /// `--http-api-max-payload-size`, in bytes.
    pub payload_limit: usize,
    /// `--mmds-size-limit`, in bytes.
    pub mmds_limit: usize,
    /// `--start-time-us`: monotonic time at which the process was started.
    pub start_time_us: Option<u64>,
    /// `--start-time-cpu-us`: CPU time of the process at its start.
    pub start_time_cpu_us: Option<u64>,
    /// `--parent-cpu-time-us`: CPU time its parent used for it.
    pub parent_cpu_time_us: Option<u64>,
    /// `--jail` and what belongs to it, the two files below too.
    pub jail: Option<JailConfig>,
    /// `--pid-file` without a jail.
    pub pid_file: Option<PathBuf>,
    /// `--exit-file` without a jail.
    pub exit_file: Option<PathBuf>,
}

/// What is wrong with the command line.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Syntax(#[from] lexopt::Error),
    #[error("{option} was given more than once")]
    Repeated { option: &'static str },
    #[error("{option}: {problem}")]
    Value { option: &'static str, problem: String },
    #[error("{option} needs {needed}")]
    Needs { option: &'static str, needed: &'static str },
    #[error("{option} is not supported")]
    Unsupported { option: &'static str },
}

impl CliError {
    /// Whether it is about what an option says rather than about the command line as such. Firecracker
    /// ends with another code then.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Value { option: "--level", .. })
    }
}

/// The options as they are read.
#[derive(Default)]
struct Raw {
    id: Option<String>,
    api_socket: Option<PathBuf>,
    no_api: Option<()>,
    config_file: Option<PathBuf>,
    metadata: Option<PathBuf>,
    log_path: Option<PathBuf>,
    level: Option<LogLevel>,
    show_level: Option<()>,
    show_log_origin: Option<()>,
    module: Option<String>,
    metrics_path: Option<PathBuf>,
    boot_timer: Option<()>,
    no_seccomp: Option<()>,
    enable_pci: Option<()>,
    payload_limit: Option<usize>,
    mmds_limit: Option<usize>,
    start_time_us: Option<u64>,
    start_time_cpu_us: Option<u64>,
    parent_cpu_time_us: Option<u64>,
    jail: Option<PathBuf>,
    uid: Option<u32>,
    gid: Option<u32>,
    cgroup: Option<PathBuf>,
    cgroup_limits: Vec<CgroupLimit>,
    resource_limits: Vec<ResourceLimit>,
    netns: Option<PathBuf>,
    new_netns: Option<()>,
    taps: Vec<String>,
    pid_file: Option<PathBuf>,
    exit_file: Option<PathBuf>,
}

/// Reads the arguments, without the program's name.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Command, CliError> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut raw = Raw::default();
    while let Some(argument) = parser.next()? {
        let name = match argument {
            Arg::Short('h') => "help".to_owned(),
            Arg::Short('V') => "version".to_owned(),
            Arg::Long(name) => name.to_owned(),
            other => return Err(other.unexpected().into()),
        };
        match name.as_str() {
            "help" => return Ok(Command::Help),
            "version" => return Ok(Command::Version),
            name => raw.take(name, &mut parser)?,
        }
    }
    raw.finish().map(|options| Command::Run(Box::new(options)))
}

impl Raw {
    fn take(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<(), CliError> {
        match name {
            "id" => text(&mut self.id, "--id", parser),
            "api-sock" => path(&mut self.api_socket, "--api-sock", parser),
            "no-api" => once(&mut self.no_api, "--no-api", ()),
            "config-file" => path(&mut self.config_file, "--config-file", parser),
            "metadata" => path(&mut self.metadata, "--metadata", parser),
            "log-path" => path(&mut self.log_path, "--log-path", parser),
            "level" => value(&mut self.level, "--level", parser),
            "show-level" => once(&mut self.show_level, "--show-level", ()),
            "show-log-origin" => once(&mut self.show_log_origin, "--show-log-origin", ()),
            "module" => text(&mut self.module, "--module", parser),
            "metrics-path" => path(&mut self.metrics_path, "--metrics-path", parser),
            "boot-timer" => once(&mut self.boot_timer, "--boot-timer", ()),
            "no-seccomp" => once(&mut self.no_seccomp, "--no-seccomp", ()),
            "http-api-max-payload-size" => {
                value(&mut self.payload_limit, "--http-api-max-payload-size", parser)
            }
            "mmds-size-limit" => value(&mut self.mmds_limit, "--mmds-size-limit", parser),
            "start-time-us" => value(&mut self.start_time_us, "--start-time-us", parser),
            "start-time-cpu-us" => value(&mut self.start_time_cpu_us, "--start-time-cpu-us", parser),
            "parent-cpu-time-us" => value(&mut self.parent_cpu_time_us, "--parent-cpu-time-us", parser),
            "jail" => path(&mut self.jail, "--jail", parser),
            "uid" => value(&mut self.uid, "--uid", parser),
            "gid" => value(&mut self.gid, "--gid", parser),
            "cgroup" => path(&mut self.cgroup, "--cgroup", parser),
            "cgroup-limit" => many(&mut self.cgroup_limits, "--cgroup-limit", parser),
            "resource-limit" => many(&mut self.resource_limits, "--resource-limit", parser),
            "netns" => path(&mut self.netns, "--netns", parser),
            "new-net-ns" => once(&mut self.new_netns, "--new-net-ns", ()),
            "tap" => many(&mut self.taps, "--tap", parser),
            "pid-file" => path(&mut self.pid_file, "--pid-file", parser),
            "exit-file" => path(&mut self.exit_file, "--exit-file", parser),
            "enable-pci" => once(&mut self.enable_pci, "--enable-pci", ()),
            "seccomp-filter" => Err(CliError::Unsupported { option: "--seccomp-filter" }),
            "snapshot-version" => Err(CliError::Unsupported { option: "--snapshot-version" }),
            "describe-snapshot" => Err(CliError::Unsupported { option: "--describe-snapshot" }),
            name => Err(Arg::Long(name).unexpected().into()),
        }
    }

    fn finish(mut self) -> Result<Options, CliError> {
        let id = self.id.take().unwrap_or_else(|| DEFAULT_INSTANCE_ID.to_owned());
        check_instance_id(&id)
            .map_err(|error| CliError::Value { option: "--id", problem: error.to_string() })?;
        if self.no_api.is_some() && self.config_file.is_none() {
            return Err(CliError::Needs { option: "--no-api", needed: "--config-file" });
        }
        if self.no_api.is_some() && self.api_socket.is_some() {
            return Err(CliError::Value {
                option: "--no-api",
                problem: "there is no --api-sock then".to_owned(),
            });
        }
        let api_socket = match self.no_api {
            Some(()) => None,
            None => Some(self.api_socket.take().unwrap_or_else(|| DEFAULT_API_SOCKET.into())),
        };
        let logger = LoggerConfig {
            log_path: self.log_path.take(),
            level: self.level,
            show_level: self.show_level.map(|()| true),
            show_log_origin: self.show_log_origin.map(|()| true),
            module: self.module.take(),
        };
        let payload_limit = self.payload_limit.unwrap_or(DEFAULT_PAYLOAD_LIMIT);
        let (pid_file, exit_file) = match self.jail {
            Some(_) => (None, None),
            None => (self.pid_file.take(), self.exit_file.take()),
        };
        Ok(Options {
            id,
            api_socket,
            config_file: self.config_file.take(),
            metadata: self.metadata.take(),
            logger: (logger != LoggerConfig::default()).then_some(logger),
            metrics_path: self.metrics_path.take(),
            boot_timer: self.boot_timer.is_some(),
            seccomp: self.no_seccomp.is_none(),
            pci_asked_for: self.enable_pci.is_some(),
            payload_limit,
            mmds_limit: self.mmds_limit.unwrap_or(payload_limit),
            start_time_us: self.start_time_us,
            start_time_cpu_us: self.start_time_cpu_us,
            parent_cpu_time_us: self.parent_cpu_time_us,
            jail: self.jail()?,
            pid_file,
            exit_file,
        })
    }

    fn jail(self) -> Result<Option<JailConfig>, CliError> {
        let Some(root) = self.jail else {
            let options = [
                ("--uid", self.uid.is_some()),
                ("--gid", self.gid.is_some()),
                ("--cgroup", self.cgroup.is_some()),
                ("--cgroup-limit", !self.cgroup_limits.is_empty()),
                ("--resource-limit", !self.resource_limits.is_empty()),
                ("--netns", self.netns.is_some()),
                ("--new-net-ns", self.new_netns.is_some()),
                ("--tap", !self.taps.is_empty()),
            ];
            return match options.into_iter().find(|(_, given)| *given) {
                Some((option, _)) => Err(CliError::Needs { option, needed: "--jail" }),
                None => Ok(None),
            };
        };
        let (Some(uid), Some(gid)) = (self.uid, self.gid) else {
            return Err(CliError::Needs { option: "--jail", needed: "--uid and --gid" });
        };
        let cgroup = match self.cgroup {
            Some(path) => Some(Cgroup { path, limits: self.cgroup_limits }),
            None if self.cgroup_limits.is_empty() => None,
            None => return Err(CliError::Needs { option: "--cgroup-limit", needed: "--cgroup" }),
        };
        let network = match (self.netns, self.new_netns) {
            (None, None) => Network::Host,
            (None, Some(())) => Network::New,
            (Some(path), None) => Network::Namespace(path),
            (Some(_), Some(())) => {
                return Err(CliError::Value {
                    option: "--new-net-ns",
                    problem: "--netns names one already".to_owned(),
                });
            }
        };
        let resource_limits = self.resource_limits;
        Ok(Some(JailConfig {
            cgroup,
            network,
            taps: self.taps,
            resource_limits,
            pid_file: self.pid_file,
            exit_file: self.exit_file,
            ..JailConfig::new(root, uid, gid)
        }))
    }
}

fn once<T>(slot: &mut Option<T>, option: &'static str, value: T) -> Result<(), CliError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(CliError::Repeated { option }),
    }
}

fn path(
    slot: &mut Option<PathBuf>,
    option: &'static str,
    parser: &mut lexopt::Parser,
) -> Result<(), CliError> {
    once(slot, option, parser.value()?.into())
}

fn text(
    slot: &mut Option<String>,
    option: &'static str,
    parser: &mut lexopt::Parser,
) -> Result<(), CliError> {
    let problem = |value: OsString| CliError::Value { option, problem: format!("{value:?} is not UTF-8") };
    once(slot, option, parser.value()?.into_string().map_err(problem)?)
}

fn read<T: FromStr<Err: std::fmt::Display>>(
    option: &'static str,
    parser: &mut lexopt::Parser,
) -> Result<T, CliError> {
    let mut given = None;
    text(&mut given, option, parser)?;
    let given = given.unwrap_or_default();
    given.parse().map_err(|error: T::Err| CliError::Value { option, problem: format!("{given:?}: {error}") })
}

fn value<T: FromStr<Err: std::fmt::Display>>(
    slot: &mut Option<T>,
    option: &'static str,
    parser: &mut lexopt::Parser,
) -> Result<(), CliError> {
    once(slot, option, read(option, parser)?)
}

fn many<T: FromStr<Err: std::fmt::Display>>(
    list: &mut Vec<T>,
    option: &'static str,
    parser: &mut lexopt::Parser,
) -> Result<(), CliError> {
    list.push(read(option, parser)?);
    Ok(())
}

/// What `--help` writes.
pub const HELP: &str = "\
Runs one microVM.

Usage: pulau-vmm [OPTIONS]

The microVM is configured and controlled over HTTP on a Unix socket, in the same way as Firecracker's, or
described by a file and started at once. docs/api.md describes the requests and the exit codes.

API:
  --api-sock PATH                 Unix socket to listen on [default: /run/pulau-vmm.socket]
  --id ID                         name of the microVM: letters, digits and '-' [default: anonymous-instance]
  --config-file PATH              JSON file with the whole configuration; the microVM is started at once
  --no-api                        no socket; needs --config-file
  --metadata PATH                 JSON file with metadata for the guest
  --http-api-max-payload-size N   largest body of a request, in bytes [default: 51200]
  --mmds-size-limit N             largest metadata, in bytes [default: that of a body]

Log and metrics:
  --log-path PATH                 file or named pipe for the log [default: standard error]
  --level LEVEL                   Off, Error, Warning, Info, Debug or Trace [default: Info]
  --show-level                    each line tells its level
  --show-log-origin               each line tells the source file and line it comes from
  --module PREFIX                 only messages of modules that begin with this
  --metrics-path PATH             file or named pipe for metrics, a line of JSON each minute
  --boot-timer                    log the time until the guest writes 123 to address 0xc0000000
  --enable-pci                    ignored: there is no PCI, devices are found without it
  --start-time-us N               monotonic time when the process was started, for the metrics
  --start-time-cpu-us N           its CPU time then
  --parent-cpu-time-us N          CPU time its parent used to start it

Process:
  --pid-file PATH                 write the process id to this file, with a jail that of the jailed process;
                                  end if that cannot be done
  --exit-file PATH                write the exit code to this file at the end, for whoever is not the parent

Isolation:
  --jail DIR                      make DIR the root directory, in new namespaces; the other paths given
                                  here are then inside, save those of this group and the one above
  --uid N, --gid N                user and group to run as in the jail
  --cgroup PATH                   cgroup v2 to run in, made if it does not exist
  --cgroup-limit FILE=VALUE       a limit of that cgroup, as memory.max=256M; may be repeated
  --resource-limit NAME=VALUE     fsize=BYTES or no-file=COUNT; may be repeated
  --netns PATH                    network namespace to run in
  --new-net-ns                    a new network namespace with nothing in it
  --tap NAME                      attach this tap before leaving the namespace it is in; may be repeated, and
                                  is then the only way to have one
  --no-seccomp                    no filters of system calls; not for use with guests that are not trusted

  -h, --help                      this text
  -V, --version                   the version

Examples:
  # Listen for requests, then boot with curl.
  pulau-vmm --api-sock /tmp/vm.sock --id demo
  curl --unix-socket /tmp/vm.sock -X PUT http://localhost/boot-source \\
      -d '{\"kernel_image_path\": \"vmlinux\", \"boot_args\": \"console=ttyS0 reboot=k panic=1\"}'
  curl --unix-socket /tmp/vm.sock -X PUT http://localhost/drives/root \\
      -d '{\"drive_id\": \"root\", \"path_on_host\": \"root.ext4\", \"is_root_device\": true}'
  curl --unix-socket /tmp/vm.sock -X PUT http://localhost/actions -d '{\"action_type\": \"InstanceStart\"}'

  # Boot from a file, console on this terminal.
  pulau-vmm --no-api --config-file vm.json

  # In a jail prepared in /srv/jail/demo, unprivileged, with at most 256 MiB.
  pulau-vmm --jail /srv/jail/demo --uid 1000 --gid 1000 --cgroup /sys/fs/cgroup/demo \\
      --cgroup-limit memory.max=256M --api-sock /run/api.sock
";

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
