//! `pulau instance run` and `modify`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::publish::published_port;
use super::template::{Custom, TemplateArgs, read_user_data};
use super::{path, show_all};
use crate::cli::resource::tag;
use crate::client::Client;
use crate::model::{PublishedPort, id};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance run --image minimal
  pulau instance run --image debian --type large --key-name me --tag Name=web --wait
  pulau instance run --image debian --type custom --cpus 3 --memory 1536M --user-data setup.sh
  pulau instance run --image minimal --volume size=10 --volume id=vol-0123456789abcdef0
  pulau instance run --image minimal --publish 8080:80 --publish 192.0.2.1:53:53/udp
  pulau instance run --image minimal --count 10 --json")]
pub struct Args {
    #[command(flatten)]
    template: TemplateArgs,
    /// How many; all or none.
    #[arg(long, value_name = "N", default_value_t = 1)]
    count: u32,
    /// Be content with so many of --count.
    #[arg(long, value_name = "N")]
    min_count: Option<u32>,
    /// Address in the network.
    #[arg(long, value_name = "ADDRESS")]
    private_address: Option<String>,
    /// Have a port of the host lead to it: [ADDRESS:]HOSTPORT:PORT[/udp]; may be repeated.
    #[arg(long, value_name = "PORT", value_parser = published_port)]
    publish: Vec<PublishedPort>,
    /// A disk besides the root disk: `id=VOLUME`, one that exists, or `size=GIB`, `snapshot=SNAPSHOT`, a new one, which
    /// is deleted with the instance. `,keep` keeps a new one, `,delete` deletes an old one. May be repeated.
    #[arg(long = "volume", value_name = "VOLUME")]
    volumes: Vec<VolumeArg>,
    /// Refuse to terminate it until this is taken back.
    #[arg(long)]
    termination_protection: bool,
    /// Makes it safe to send this again: the same token makes no second instance.
    #[arg(long, value_name = "TOKEN")]
    client_token: Option<String>,
    /// Only check whether it could be done.
    #[arg(long)]
    dry_run: bool,
    /// Wait until the agent in the guest answers.
    #[arg(long, short)]
    wait: bool,
}

/// A volume, as the API takes it.
#[derive(Clone, Debug)]
struct VolumeArg(Value);

impl std::str::FromStr for VolumeArg {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "expected id=VOLUME, size=GIB or snapshot=SNAPSHOT, and maybe ,keep or ,delete";
        let mut volume = json!({});
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("id", id)) => volume["volume_id"] = id.into(),
                Some(("snapshot", id)) => volume["snapshot_id"] = id.into(),
                Some(("size", gib)) => volume["size_gib"] = gib.parse::<u64>().map_err(|_| FORM)?.into(),
                None if part == "keep" => volume["delete_on_termination"] = false.into(),
                None if part == "delete" => volume["delete_on_termination"] = true.into(),
                _ => return Err(FORM),
            }
        }
        Ok(VolumeArg(volume))
    }
}

pub async fn run(args: &Args, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let mut body = args.template.body()?;
    for (field, value) in [
        ("min_count", json!(args.min_count.unwrap_or(args.count))),
        ("max_count", json!(args.count)),
        ("private_address", json!(args.private_address)),
        ("published_ports", json!(args.publish)),
        ("volumes", json!(args.volumes.iter().map(|volume| volume.0.clone()).collect::<Vec<_>>())),
        ("termination_protection", json!(args.termination_protection)),
        // A connection that breaks leaves open whether it was done; with a token it can be sent again.
        ("client_token", json!(args.client_token.clone().unwrap_or_else(|| id::new("run")))),
        ("dry_run", json!(args.dry_run)),
    ] {
        body[field] = value;
    }
    let ran: Value = client.post("/v1/instances", &body).await?;
    let mut instances = ran["instances"].as_array().cloned().unwrap_or_default();
    if args.wait {
        for instance in &mut instances {
            let id = instance["id"].as_str().unwrap_or_default().to_owned();
            let wait = format!("{}/wait?state=running&agent=true&timeout_seconds=300", path(&id));
            *instance = client.get(&wait).await?;
        }
    }
    show_all(&instances, json)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance modify i-0123456789abcdef0 --type large
  pulau instance modify i-0123456789abcdef0 --termination-protection false --tag Name=web --tag env=test")]
pub struct ModifyArgs {
    pub id: String,
    /// Another type, of a stopped instance.
    #[arg(long = "type", short = 't', value_name = "TYPE")]
    instance_type: Option<String>,
    #[command(flatten)]
    size: Custom,
    /// Other user data, of a stopped instance.
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// Other security groups, in place of all it has; may be repeated.
    #[arg(long = "security-group", value_name = "GROUP")]
    security_groups: Vec<String>,
    /// Other tags, in place of all it has; may be repeated.
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
    tags: Vec<(String, String)>,
    #[arg(long, value_name = "BOOL")]
    termination_protection: Option<bool>,
    /// Whether it is booted anew when its guest does not answer any more.
    #[arg(long, value_name = "BOOL")]
    auto_recovery: Option<bool>,
}

impl ModifyArgs {
    pub fn body(&self) -> anyhow::Result<Value> {
        let given = |values: &[String]| (!values.is_empty()).then(|| values.to_vec());
        let tags: Option<BTreeMap<_, _>> =
            (!self.tags.is_empty()).then(|| self.tags.iter().cloned().collect());
        Ok(json!({
            "instance_type": self.instance_type,
            "vcpus": self.size.cpus,
            "memory_mib": self.size.memory_mib(),
            "user_data": read_user_data(self.user_data.as_ref())?,
            "security_groups": given(&self.security_groups),
            "termination_protection": self.termination_protection,
            "auto_recovery": self.auto_recovery,
            "tags": tags,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_of_parts() {
        let parse = |text: &str| text.parse::<VolumeArg>().map(|volume| volume.0);
        assert_eq!(
            parse("id=vol-1,delete"),
            Ok(json!({"volume_id": "vol-1", "delete_on_termination": true}))
        );
        let new = json!({"size_gib": 5, "snapshot_id": "snap-1", "delete_on_termination": false});
        assert_eq!(parse("size=5,snapshot=snap-1,keep"), Ok(new));
        for bad in ["", "vol-1", "size=x", "id=vol-1,nothing", "colour=red"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
