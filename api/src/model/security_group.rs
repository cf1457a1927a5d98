//! Who may talk to whom.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A set of rules. What no rule of an instance's groups allows is dropped; answers to what was allowed
/// always pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SecurityGroup {
    /// `sg-` and 17 hexadecimal digits.
    pub id: String,
    /// Unique within its network.
    pub name: String,
    #[serde(default)]
    pub description: String,
    pub network_id: String,
    /// Who may connect to its members.
    pub ingress: Vec<Rule>,
    /// To whom its members may connect.
    pub egress: Vec<Rule>,
    pub created: DateTime<Utc>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// Traffic that is allowed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    pub protocol: Protocol,
    /// First and last port, both inclusive; absent for all ports, and always for `icmp` and `all`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_port: Option<u16>,
    pub peer: Peer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Icmp,
    All,
}

/// The other end: `{"cidr": "0.0.0.0/0"}` or `{"group_id": "sg-…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    /// Addresses.
    #[schema(value_type = String)]
    Cidr(Ipv4Net),
    /// The members of a security group.
    GroupId(String),
}

impl Rule {
    /// Everything, to or from everywhere.
    pub fn all() -> Self {
        let peer = Peer::Cidr(Ipv4Net::default());
        Rule { protocol: Protocol::All, from_port: None, to_port: None, peer }
    }

    /// What is wrong with it, if anything.
    pub fn problem(&self) -> Option<String> {
        match (self.protocol, self.from_port, self.to_port) {
            (Protocol::Tcp | Protocol::Udp, Some(from), Some(to)) if from > to => {
                Some(format!("from_port {from} is above to_port {to}"))
            }
            (Protocol::Tcp | Protocol::Udp, Some(_), Some(_)) | (_, None, None) => None,
            (Protocol::Tcp | Protocol::Udp, ..) => {
                Some("from_port and to_port are given both or not at all".into())
            }
            _ => Some("from_port and to_port are for tcp and udp only".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_written_as_documented_and_checked() {
        let text = r#"{"protocol":"tcp","from_port":22,"to_port":22,"peer":{"cidr":"10.0.0.0/8"}}"#;
        let rule: Rule = serde_json::from_str(text).unwrap();
        assert_eq!((serde_json::to_string(&rule).unwrap().as_str(), rule.problem()), (text, None));
        let by_group = r#"{"protocol":"all","peer":{"group_id":"sg-1"}}"#;
        assert_eq!(serde_json::from_str::<Rule>(by_group).unwrap().problem(), None);
        let wrong = |change: fn(&mut Rule)| {
            let mut rule = rule.clone();
            change(&mut rule);
            rule.problem().unwrap()
        };
        assert!(wrong(|rule| rule.to_port = Some(21)).contains("above"));
        assert!(wrong(|rule| rule.to_port = None).contains("both"));
        assert!(wrong(|rule| rule.protocol = Protocol::Icmp).contains("tcp and udp only"));
    }
}
