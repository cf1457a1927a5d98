//! Setting up the guest's network interfaces, at boot and when a host asks.

mod netlink;

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::net::if_::if_nametoindex;
use pulau_agent_protocol::message::ErrorReply;
use pulau_agent_protocol::network::NetworkConfig;

use crate::refusal::{Context, bad_request};
use netlink::{Link, Netlink};

/// Brings the loopback interface up; the kernel gives it its addresses.
///
/// # Errors
/// The kernel's.
pub fn loopback_up() -> Result<(), ErrorReply> {
    let what = "bring lo up";
    let index = if_nametoindex("lo").context(what)?;
    let up = Link { up: Some(true), ..Link::default() };
    Netlink::open().and_then(|mut netlink| netlink.set_link(index, up)).context(what)
}

/// Sets an interface up as described, whatever it was before.
///
/// # Errors
/// `bad_request` for a configuration that makes no sense, `not_found` if there is no such interface, else
/// the kernel's refusal of a step; the steps before it have been taken.
pub fn configure(config: &NetworkConfig) -> Result<(), ErrorReply> {
    config.validate().map_err(|e| bad_request(e.to_string()))?;
    let device = config.device.as_str();
    let index = if_nametoindex(device).context(format_args!("interface {device}"))?;
    let mut netlink = Netlink::open().context("open rtnetlink")?;

    if config.mtu.is_some() || config.mac.is_some() {
        if config.mac.is_some() {
            // Not every driver changes its address while up.
            let down = Link { up: Some(false), ..Link::default() };
            netlink.set_link(index, down).context(format_args!("{device}: bring down"))?;
        }
        let link = Link { up: None, mtu: config.mtu, mac: config.mac };
        netlink.set_link(index, link).context(format_args!("{device}: set mtu and hardware address"))?;
    }

    let present = netlink.addresses(index).context(format_args!("{device}: list addresses"))?;
    for old in present.into_iter().filter(|old| !config.addresses.contains(old)) {
        match netlink.delete_address(index, old) {
            // Went with the address it was secondary to.
            Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
            other => other.context(format_args!("{device}: remove {old}"))?,
        }
    }
    for address in &config.addresses {
        netlink.add_address(index, *address).context(format_args!("{device}: add {address}"))?;
    }
    let up = Link { up: Some(true), ..Link::default() };
    netlink.set_link(index, up).context(format_args!("{device}: bring up"))?;

    for ipv4 in [true, false] {
        match config.gateways.iter().find(|gateway| gateway.is_ipv4() == ipv4) {
            Some(gateway) => netlink
                .set_default_route(index, *gateway)
                .context(format_args!("{device}: default route via {gateway}"))?,
            None => netlink
                .delete_default_route(index, ipv4)
                .context(format_args!("{device}: remove the default route"))?,
        }
    }
    if config.dns.is_empty() && config.search.is_empty() { Ok(()) } else { write_resolver(config) }
}

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where the file is kept when `/etc` cannot be written, to be bound over the one there.
const RUN_RESOLV_CONF: &str = "/run/resolv.conf";

fn write_resolver(config: &NetworkConfig) -> Result<(), ErrorReply> {
    let text = resolver_text(config);
    match replace(Path::new(RESOLV_CONF), &text) {
        Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {}
        other => return other.context(RESOLV_CONF),
    }
    // Written in place: a mount made earlier shows the new text too.
    fs::write(RUN_RESOLV_CONF, &text).context(RUN_RESOLV_CONF)?;
    if fs::read_to_string(RESOLV_CONF).is_ok_and(|now| now == text) {
        return Ok(());
    }
    mount(Some(RUN_RESOLV_CONF), RESOLV_CONF, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context(format_args!("bind {RUN_RESOLV_CONF} over {RESOLV_CONF}"))
}

/// Puts a new file in place of whatever is there, a dangling link among it.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let beside = path.with_extension("conf.pulau");
    fs::write(&beside, text)?;
    fs::rename(&beside, path).inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

/// resolv.conf(5).
fn resolver_text(config: &NetworkConfig) -> String {
    let mut text = String::new();
    if !config.search.is_empty() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "search {}", config.search.join(" "));
    }
    for server in &config.dns {
        let _ = writeln!(text, "nameserver {server}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolver_file() {
        let config: NetworkConfig =
            "dns=1.1.1.1,dns=fd00::53,search=a.example,search=b.example".parse().unwrap();
        assert_eq!(
            resolver_text(&config),
            "search a.example b.example\nnameserver 1.1.1.1\nnameserver fd00::53\n"
        );
    }
}
