//! The whole rule set as text for nft(8).
//!
//! Whatever a guest sends is first held against the address of its tap; then it is forwarded by the rules of
//! the sender's groups, and then by those of the receiver's, or it is for the host, which answers to DHCP, DNS
//! and ping and nothing else. Everything is chosen by look-ups in sets and maps, so the number of guests does
//! not matter to a packet, and a guest's coming is nothing but new elements.
//!
//! The rules look only at packets from and to taps of ours, and leave everything else to the host's own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use super::element::{self, Element, Set};
use crate::network::definition::{Checked, GroupDef, MAX_GROUPS, Peer, Rule, Traffic};

/// Packets a second, and at once, that a guest may send to the host's services: far more than it needs, and
/// few enough that the host stays idle.
const TO_HOST_RATE: (u32, u32) = (500, 1000);

/// The text that makes the rule set of `plan` out of whatever is there, in one transaction.
pub fn whole(prefix: &str, plan: &Checked) -> String {
    let mut elements: BTreeMap<Set, BTreeSet<Element>> = BTreeMap::new();
    let attached = plan.attachments.values().filter_map(|attachment| {
        Some(element::of_attachment(attachment, plan.networks.get(&attachment.network)?))
    });
    for element in attached.flatten().chain(plan.published.iter().map(element::of_published)) {
        elements.entry(element.set.clone()).or_default().insert(element);
    }
    let own = |set: Set| list(elements.get(&set).into_iter().flatten().map(Element::to_string));
    let mut text = String::new();
    let out = &mut text;
    // Declared first, so that there is something to delete.
    for family in ["inet", "arp"] {
        line(out, format_args!("table {family} {prefix}\ndelete table {family} {prefix}"));
    }
    line(out, format_args!("table arp {prefix} {{"));
    set(out, "guests", "ifname . ipv4_addr", "", &own(Set::ArpGuests));
    out.push_str(&ARP_CHAINS.replace("TAP", &format!("\"{prefix}-*\"")));
    out.push_str("}\n");

    line(out, format_args!("table inet {prefix} {{"));
    set(out, "guests", "ifname . ipv4_addr", "", &own(Set::Guests));
    set(out, "gateways", "ifname . ipv4_addr", "", &own(Set::Gateways));
    let networks = plan.networks.values();
    let subnets = list(networks.clone().map(|network| network.subnet.to_string()));
    set(out, "subnets", "ipv4_addr", "flags interval; ", &subnets);
    let natted = list(networks.clone().filter(|n| n.nat).map(|network| network.subnet.to_string()));
    set(out, "natted", "ipv4_addr", "flags interval; ", &natted);
    let within = list(networks.map(|network| format!("{0} . {0}", network.subnet)));
    set(out, "within", "ipv4_addr . ipv4_addr", "flags interval; ", &within);
    line(out, format_args!("\tset to_host {{ type ifname; size 65535; flags dynamic; timeout 1m; }}"));
    for slot in (0_u8..).take(MAX_GROUPS) {
        map(out, &format!("egress{slot}"), "ipv4_addr : verdict", &own(Set::Egress(slot)));
        map(out, &format!("ingress{slot}"), "ipv4_addr : verdict", &own(Set::Ingress(slot)));
    }
    let to_guest = "ipv4_addr . inet_service";
    let kind = format!("inet_proto . ipv4_addr . inet_service : {to_guest}");
    map(out, "published", &kind, &own(Set::Published));
    let kind = format!("inet_proto . inet_service : {to_guest}");
    map(out, "published_anywhere", &kind, &own(Set::PublishedAnywhere));
    // Chains before what jumps to them is not asked for: it is one transaction.
    for group in plan.groups.values() {
        set(out, &format!("{}.members", group.id), "ipv4_addr", "", &own(Set::Members(group.id.clone())));
    }
    for group in plan.groups.values() {
        chains_of(out, group);
    }
    let jumps = |way: &str, address: &str| -> String {
        (0..MAX_GROUPS).map(|slot| format!("\t\tip {address} vmap @{way}{slot}\n")).collect()
    };
    let (rate, burst) = TO_HOST_RATE;
    let chains = INET_CHAINS
        .replace("TAP", &format!("\"{prefix}-*\""))
        .replace("\t\tEGRESS_GROUPS\n", &jumps("egress", "saddr"))
        .replace("\t\tINGRESS_GROUPS\n", &jumps("ingress", "daddr"))
        .replace("RATE", &rate.to_string())
        .replace("BURST", &burst.to_string());
    out.push_str(&chains);
    out.push_str("}\n");
    text
}

const ARP_CHAINS: &str = r#"	chain input {
		type filter hook input priority filter; policy accept;
		iifname TAP goto from_guest
	}
	chain from_guest {
		iifname . arp saddr ip @guests accept
		arp saddr ip 0.0.0.0 accept
		counter drop
	}
"#;

/// What is related to a connection, such as an ICMP error, has to be from the same network: whoever can guess the
/// ports of a stranger's connection could send such errors otherwise. And whatever is published on all of the
/// host's addresses, a guest's own gateway stays its name server.
const INET_CHAINS: &str = r#"	chain spoofed {
		type filter hook prerouting priority raw; policy accept;
		iifname TAP goto from_guest
		iifname != "lo" ip saddr @subnets counter drop
	}
	chain from_guest {
		iifname . ip saddr @guests accept
		ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
		counter drop
	}
	chain publish {
		type nat hook prerouting priority dstnat; policy accept;
		iifname . ip daddr @gateways accept
		fib daddr type local goto published_ports
	}
	chain publish_to_host {
		type nat hook output priority -100; policy accept;
		fib daddr type local goto published_ports
	}
	chain published_ports {
		dnat ip to meta l4proto . ip daddr . th dport map @published
		dnat ip to meta l4proto . th dport map @published_anywhere
	}
	chain egress {
		type filter hook forward priority filter - 10; policy accept;
		iifname TAP goto leave
	}
	chain leave {
		ct state established accept
		ct state invalid counter drop
		ct state new ct status dnat ip saddr @natted goto leave_by_groups
		ip saddr . ip daddr @within goto leave_by_groups
		ip daddr { 127.0.0.0/8, 169.254.0.0/16 } counter drop
		ip daddr @subnets counter drop
		ip saddr != @natted counter drop
		goto leave_by_groups
	}
	chain leave_by_groups {
		ct state related accept
		EGRESS_GROUPS
		counter drop
	}
	chain ingress {
		type filter hook forward priority filter - 5; policy accept;
		oifname TAP goto enter
		iifname TAP tcp flags syn / syn,rst tcp option maxseg size set rt mtu
	}
	chain enter {
		ct state established,related accept
		ct state invalid counter drop
		ct status dnat accept
		iifname != TAP ip daddr != @natted counter drop
		INGRESS_GROUPS
		counter drop
	}
	chain input {
		type filter hook input priority filter - 10; policy accept;
		iifname TAP goto to_host
	}
	chain to_host {
		udp dport { 53, 67 } add @to_host { iifname limit rate over RATE/second burst BURST packets } counter drop
		icmp type echo-request add @to_host { iifname limit rate over RATE/second burst BURST packets } counter drop
		ct state established,related accept
		udp sport 68 udp dport 67 accept
		iifname . ip daddr @gateways meta l4proto { tcp, udp } th dport 53 accept
		iifname . ip daddr @gateways icmp type echo-request accept
		counter drop
	}
	chain outward {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @natted ip daddr != @subnets oifname != TAP masquerade
	}
"#;

/// The two chains of a group. What they do not accept goes on to the next group.
fn chains_of(out: &mut String, group: &GroupDef) {
    for (way, rules, peer) in [("in", &group.ingress, "saddr"), ("out", &group.egress, "daddr")] {
        line(out, format_args!("\tchain {}.{way} {{", group.id));
        for rule in rules {
            rule_lines(out, rule, peer);
        }
        line(out, format_args!("\t}}"));
    }
}

fn rule_lines(out: &mut String, rule: &Rule, peer: &str) {
    let traffic = match rule.traffic {
        Traffic::All => String::new(),
        Traffic::Tcp(ports) => format!(" tcp dport {}-{}", ports.from, ports.to),
        Traffic::Udp(ports) => format!(" udp dport {}-{}", ports.from, ports.to),
        Traffic::Icmp(None) => " meta l4proto icmp".to_owned(),
        Traffic::Icmp(Some(kind)) => format!(" icmp type {kind}"),
    };
    let cidrs = rule.peers.iter().filter_map(|peer| match peer {
        Peer::Cidr(cidr) => Some(cidr.trunc()),
        Peer::Group(_) => None,
    });
    let cidrs = ipnet::Ipv4Net::aggregate(&cidrs.collect::<Vec<_>>());
    if cidrs.iter().any(|cidr| cidr.prefix_len() == 0) {
        line(out, format_args!("\t\tmeta nfproto ipv4{traffic} accept"));
    } else if !cidrs.is_empty() {
        let cidrs = cidrs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        line(out, format_args!("\t\tip {peer} {{ {cidrs} }}{traffic} accept"));
    }
    for group in rule.peers.iter() {
        if let Peer::Group(group) = group {
            line(out, format_args!("\t\tip {peer} @{group}.members{traffic} accept"));
        }
    }
}

fn set(out: &mut String, name: &str, kind: &str, flags: &str, elements: &str) {
    line(out, format_args!("\tset {name} {{ type {kind}; {flags}{elements}}}"));
}

fn map(out: &mut String, name: &str, kind: &str, elements: &str) {
    line(out, format_args!("\tmap {name} {{ type {kind}; {elements}}}"));
}

/// `elements = …; `, or nothing if there are none.
fn list(elements: impl Iterator<Item = String>) -> String {
    let elements = elements.collect::<Vec<_>>().join(", ");
    if elements.is_empty() { elements } else { format!("elements = {{ {elements} }}; ") }
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "{text}");
}

#[cfg(test)]
#[path = "ruleset_tests.rs"]
mod tests;
