//! Rules of security groups as words: `tcp:22:0.0.0.0/0`, `icmp:10.0.0.0/8`, `all:sg-…`.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::model::{Peer, Protocol, Rule};

/// Understands a rule.
pub fn parse(text: &str) -> Result<Rule, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (protocol, ports, peer) = match parts[..] {
        [protocol, peer] => (protocol, None, peer),
        [protocol, ports, peer] => (protocol, Some(ports), peer),
        _ => return Err("expected PROTOCOL:PORTS:PEER or PROTOCOL:PEER, such as tcp:22:0.0.0.0/0".into()),
    };
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "icmp" => Protocol::Icmp,
        "all" => Protocol::All,
        other => return Err(format!("{other:?} is no protocol: tcp, udp, icmp or all")),
    };
    let port = |text: &str| text.parse::<u16>().map_err(|_| format!("{text:?} is no port"));
    let (from_port, to_port) = match ports.map(|ports| ports.split_once('-').unwrap_or((ports, ports))) {
        None => (None, None),
        Some((from, to)) => (Some(port(from)?), Some(port(to)?)),
    };
    let rule = Rule { protocol, from_port, to_port, peer: parse_peer(peer)? };
    match rule.problem() {
        None => Ok(rule),
        Some(_) if ports.is_some() && matches!(protocol, Protocol::Icmp | Protocol::All) => {
            Err("ports are for tcp and udp only".into())
        }
        Some(problem) => Err(problem),
    }
}

fn parse_peer(text: &str) -> Result<Peer, String> {
    if text.starts_with("sg-") {
        return Ok(Peer::GroupId(text.to_owned()));
    }
    let net = text.parse::<Ipv4Net>().or_else(|_| text.parse::<Ipv4Addr>().map(Ipv4Net::from));
    net.map(Peer::Cidr).map_err(|_| format!("{text:?} is no subnet, address, or id of a security group"))
}

/// The words for a rule.
pub fn format(rule: &Rule) -> String {
    let protocol = match rule.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Icmp => "icmp",
        Protocol::All => "all",
    };
    let ports = match (rule.from_port, rule.to_port) {
        (Some(from), Some(to)) if from == to => format!("{from}:"),
        (Some(from), Some(to)) => format!("{from}-{to}:"),
        _ => String::new(),
    };
    let peer = match &rule.peer {
        Peer::Cidr(net) => net.to_string(),
        Peer::GroupId(id) => id.clone(),
    };
    format!("{protocol}:{ports}{peer}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        for text in
            ["tcp:22:0.0.0.0/0", "udp:8000-8100:10.0.0.0/8", "tcp:10.0.0.0/8", "icmp:0.0.0.0/0", "all:sg-1"]
        {
            assert_eq!(format(&parse(text).unwrap()), text);
        }
        assert_eq!(format(&parse("tcp:22:10.1.2.3").unwrap()), "tcp:22:10.1.2.3/32");
    }

    #[test]
    fn what_is_none_is_refused_and_said_why() {
        for (text, why) in [
            ("22", "PROTOCOL:PORTS:PEER"),
            ("tcp:22:0.0.0.0/0:x", "PROTOCOL:PORTS:PEER"),
            ("sctp:0.0.0.0/0", "no protocol"),
            ("tcp:ssh:0.0.0.0/0", "no port"),
            ("tcp:99999:0.0.0.0/0", "no port"),
            ("tcp:9-1:0.0.0.0/0", "above"),
            ("icmp:8:0.0.0.0/0", "tcp and udp only"),
            ("tcp:22:home", "no subnet"),
            ("tcp:22:10.0.0.0/33", "no subnet"),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.contains(why), "{text}: {problem}");
        }
    }
}
