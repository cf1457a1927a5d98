//! The options the agent takes from the kernel command line, shared so that the host composes exactly
//! what the guest parses. Every option's name begins with `pulau.`; words without it are the kernel's and
//! others' business and are passed over.

use std::fmt;

use crate::network::NetworkConfig;

/// What the kernel command line asks of the agent as PID 1. `Display` gives the command-line words, with
/// a single space between them; [`BootOptions::parse`] reads them back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootOptions {
    /// `pulau.boot_timer`: write 123 to physical address 0xC0000000 first of all, which the VMM's boot
    /// timer takes as "init has begun". Needs `/dev/mem` (`CONFIG_DEVMEM`).
    pub boot_timer: bool,
    /// `pulau.overlay=tmpfs` or `pulau.overlay=/dev/vdX`: a writable layer over the root file system.
    pub overlay: Option<Overlay>,
    /// `pulau.hostname=NAME`.
    pub hostname: Option<String>,
    /// `pulau.ip=…`, once per interface; the form is [`NetworkConfig`]'s.
    pub network: Vec<NetworkConfig>,
    /// `pulau.console=shell`: keep a shell running on the console, without a login.
    pub console_shell: bool,
    /// `pulau.init=auto` or `pulau.init=/path`: after mounts, overlay and network, become another program
    /// instead of serving as PID 1 (for systemd; the agent then runs as its service).
    pub init: Option<Init>,
    /// `pulau.instance=ID`: which instance this is, known by letters, digits and `-`. At its first boot the agent
    /// runs the root file system's `/usr/lib/pulau/first-boot`, if there is one, with the id as its argument.
    pub instance: Option<String>,
    /// `pulau.listen=…`: where the agent listens instead of vsock port 1024; `vsock:PORT` or `unix:/path`.
    pub listen: Option<String>,
}

/// Where writes to the root file system go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Overlay {
    /// Into memory; gone when the guest stops.
    Tmpfs,
    /// Onto this block device, which holds an ext4 file system.
    Device(String),
}

/// What becomes PID 1 after the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// systemd, if the root file system has it with the agent as its service; else the agent stays.
    Auto,
    /// This program.
    Program(String),
}

impl BootOptions {
    /// Reads a kernel command line. What cannot be understood is skipped and described in the second
    /// value, one sentence each: a guest that boots and can say what was wrong with its command line is
    /// worth more than one that does not.
    pub fn parse(cmdline: &str) -> (Self, Vec<String>) {
        let mut options = Self::default();
        let mut problems = Vec::new();
        for word in cmdline.split_ascii_whitespace() {
            let Some(option) = word.strip_prefix("pulau.") else { continue };
            if let Err(why) = options.apply(option) {
                problems.push(format!("kernel command line: {word}: {why}"));
            }
        }
        (options, problems)
    }

    fn apply(&mut self, option: &str) -> Result<(), String> {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        match (key, value) {
            ("boot_timer", "" | "1") => self.boot_timer = true,
            ("overlay", "tmpfs") => self.overlay = Some(Overlay::Tmpfs),
            ("overlay", device) if device.starts_with("/dev/") => {
                self.overlay = Some(Overlay::Device(device.to_owned()));
            }
            ("overlay", _) => return Err("must be tmpfs or a device under /dev".to_owned()),
            ("hostname", name) if (1..=64).contains(&name.len()) => self.hostname = Some(name.to_owned()),
            ("hostname", _) => return Err("must be 1 to 64 bytes".to_owned()),
            ("ip", text) => self.network.push(text.parse().map_err(|e| format!("{e}"))?),
            ("console", "shell") => self.console_shell = true,
            ("console", _) => return Err("must be shell".to_owned()),
            ("init", "auto") => self.init = Some(Init::Auto),
            ("init", path) if path.starts_with('/') => self.init = Some(Init::Program(path.to_owned())),
            ("init", _) => return Err("must be auto or an absolute path".to_owned()),
            ("instance", id) if is_instance(id) => self.instance = Some(id.to_owned()),
            ("instance", _) => return Err("must be 1 to 64 letters, digits or -".to_owned()),
            ("listen", address) if !address.is_empty() => self.listen = Some(address.to_owned()),
            _ => return Err("no such option".to_owned()),
        }
        Ok(())
    }
}

/// Whether this can be an instance's id.
fn is_instance(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

impl fmt::Display for BootOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if self.boot_timer {
            words.push("pulau.boot_timer".to_owned());
        }
        match &self.overlay {
            Some(Overlay::Tmpfs) => words.push("pulau.overlay=tmpfs".to_owned()),
            Some(Overlay::Device(device)) => words.push(format!("pulau.overlay={device}")),
            None => {}
        }
        words.extend(self.hostname.iter().map(|name| format!("pulau.hostname={name}")));
        words.extend(self.network.iter().map(|config| format!("pulau.ip={config}")));
        if self.console_shell {
            words.push("pulau.console=shell".to_owned());
        }
        words.extend(self.init.iter().map(|init| match init {
            Init::Auto => "pulau.init=auto".to_owned(),
            Init::Program(path) => format!("pulau.init={path}"),
        }));
        words.extend(self.instance.iter().map(|id| format!("pulau.instance={id}")));
        words.extend(self.listen.iter().map(|address| format!("pulau.listen={address}")));
        f.write_str(&words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let options = BootOptions {
            boot_timer: true,
            overlay: Some(Overlay::Device("/dev/vdb".into())),
            hostname: Some("web-1".into()),
            network: vec!["10.0.0.2/24,gw=10.0.0.1".parse().unwrap(), "dev=eth1,fd00::2/64".parse().unwrap()],
            console_shell: true,
            init: Some(Init::Program("/lib/systemd/systemd".into())),
            instance: Some("i-0123456789abcdef0".into()),
            listen: Some("vsock:2000".into()),
        };
        let line = format!("console=ttyS0 {options} quiet\n");
        assert_eq!(BootOptions::parse(&line), (options, vec![]));
        let auto = BootOptions { init: Some(Init::Auto), ..Default::default() };
        assert_eq!(BootOptions::parse(&auto.to_string()), (auto, vec![]));
    }

    #[test]
    fn what_is_wrong_is_reported_and_the_rest_still_counts() {
        let (options, problems) = BootOptions::parse(
            "pulau.overlay=/etc/passwd pulau.ip=10.0.0.2 pulau.wat pulau.overlay=tmpfs pulau.instance=../x",
        );
        assert_eq!(options, BootOptions { overlay: Some(Overlay::Tmpfs), ..Default::default() });
        assert_eq!(problems.len(), 4);
        assert!(problems[0].contains("pulau.overlay=/etc/passwd: must be tmpfs or a device"), "{problems:?}");
        assert!(problems[1].contains("10.0.0.2"), "{problems:?}");
        assert!(problems[2].contains("no such option"), "{problems:?}");
    }
}
