//! `pulau load-balancer …`

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::connection::Connection;
use super::resource::{self, Columns, tag};
use super::{print, print_json};
use crate::client::{Client, escape};

const PATH: &str = "/v1/load-balancers";
const COLUMNS: &Columns = &[
    ("ID", "/id"),
    ("NAME", "/name"),
    ("STATE", "/state"),
    ("PROTOCOL", "/protocol"),
    ("LISTEN", "/listen"),
    ("TARGET PORT", "/target_port"),
];

/// Ports of the host behind which many instances are.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau load-balancer create web --listen 0.0.0.0:80 --group web --health-path /
  pulau load-balancer describe web
  pulau load-balancer delete web"
)]
pub struct Args {
    #[command(flatten)]
    connection: Connection,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a load balancer over a group's members, or over instances.
    #[command(after_help = "Examples:
  pulau load-balancer create web --listen 0.0.0.0:80 --group web --health-path /healthz
  pulau load-balancer create db --listen 127.0.0.1:5432 --protocol tcp --instance i-0123456789abcdef0")]
    Create {
        /// What to call it.
        name: String,
        /// Address and port of the host; 0.0.0.0 is all of its addresses.
        #[arg(long, value_name = "ADDRESS:PORT")]
        listen: String,
        /// Hand on requests of HTTP, or whole connections.
        #[arg(long, value_parser = ["http", "tcp"], default_value = "http")]
        protocol: String,
        /// Id or name of the group whose members it leads to.
        #[arg(long, required_unless_present = "instances")]
        group: Option<String>,
        /// Id of an instance it leads to; may be repeated.
        #[arg(long = "instance", value_name = "ID", conflicts_with = "group")]
        instances: Vec<String>,
        /// The instances' port; the same as its own if not given.
        #[arg(long, value_name = "PORT")]
        target_port: Option<u16>,
        #[command(flatten)]
        settings: Settings,
    },
    /// List load balancers.
    #[command(after_help = "Examples:
  pulau load-balancer list
  pulau load-balancer list --filter state=active")]
    List {
        /// Only those that fit, as NAME=VALUE,…: id, name, state, tag:KEY. `|` stands between values, `*` for
        /// anything.
        #[arg(long, short, value_name = "FILTER")]
        filter: Option<String>,
    },
    /// Show a load balancer, with the health of its targets.
    #[command(after_help = "Examples:
  pulau load-balancer describe web")]
    Describe {
        /// Id or name.
        id: String,
    },
    /// Change a load balancer. Open connections are not disturbed.
    #[command(after_help = "Examples:
  pulau load-balancer update web --algorithm least-connections --drain 60
  pulau load-balancer update db --instance i-0123456789abcdef0 --instance i-0123456789abcdef1")]
    Update {
        /// Id or name.
        id: String,
        /// Id of an instance it is to lead to, in place of all before; may be repeated.
        #[arg(long = "instance", value_name = "ID")]
        instances: Vec<String>,
        #[command(flatten)]
        settings: Settings,
    },
    /// Delete load balancers. Connections through them are closed.
    #[command(after_help = "Examples:
  pulau load-balancer delete web")]
    Delete {
        /// Ids or names.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Settings {
    /// Which healthy target is next: each in turn, or the one with the least to do.
    #[arg(long, value_parser = ["round-robin", "least-connections"])]
    algorithm: Option<String>,
    /// Ask targets for this path by HTTP; else it is enough that they take a connection.
    #[arg(long, value_name = "PATH")]
    health_path: Option<String>,
    /// Seconds between two checks of a target; 5 if not given.
    #[arg(long, value_name = "SECONDS")]
    health_interval: Option<u64>,
    /// Seconds for one check; 3 if not given.
    #[arg(long, value_name = "SECONDS")]
    health_timeout: Option<u64>,
    /// Good checks in a row that make a target healthy; 2 if not given.
    #[arg(long, value_name = "N")]
    healthy_threshold: Option<u32>,
    /// Bad ones that make it unhealthy; 2 if not given.
    #[arg(long, value_name = "N")]
    unhealthy_threshold: Option<u32>,
    /// Seconds that connections to a target that is taken away may go on; 30 if not given.
    #[arg(long, value_name = "SECONDS")]
    drain: Option<u64>,
    /// Connections at once; 4096 if not given.
    #[arg(long, value_name = "N")]
    max_connections: Option<u32>,
    /// A tag; may be repeated, and replaces all.
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
    tags: Vec<(String, String)>,
}

impl Settings {
    /// Adds what is given; of the health check what is not given is as `known`.
    fn add(&self, body: &mut Map<String, Value>, known: &Value) {
        let mut health = known.as_object().cloned().unwrap_or_default();
        let given = [
            ("path", self.health_path.as_ref().map(|path| json!(path))),
            ("interval_seconds", self.health_interval.map(|seconds| json!(seconds))),
            ("timeout_seconds", self.health_timeout.map(|seconds| json!(seconds))),
            ("healthy_threshold", self.healthy_threshold.map(|number| json!(number))),
            ("unhealthy_threshold", self.unhealthy_threshold.map(|number| json!(number))),
        ];
        if given.iter().any(|(_, value)| value.is_some()) {
            health.extend(given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
            body.insert("health_check".to_owned(), Value::Object(health));
        }
        let tags = (!self.tags.is_empty()).then(|| self.tags.iter().cloned().collect::<BTreeMap<_, _>>());
        for (field, value) in [
            ("algorithm", json!(self.algorithm)),
            ("deregistration_delay_seconds", json!(self.drain)),
            ("max_connections", json!(self.max_connections)),
            ("tags", json!(tags)),
        ] {
            if !value.is_null() {
                body.insert(field.to_owned(), value);
            }
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Create { name, listen, protocol, group, instances, target_port, settings } => {
            let mut body = Map::new();
            for (field, value) in [
                ("name", json!(name)),
                ("listen", json!(listen)),
                ("protocol", json!(protocol)),
                ("group", json!(group)),
                ("instance_ids", json!(instances)),
                ("target_port", json!(target_port)),
            ] {
                body.insert(field.to_owned(), value);
            }
            settings.add(&mut body, &Value::Null);
            resource::show(&client.post::<Value>(PATH, &body).await?, COLUMNS, args.json)?;
        }
        Command::List { filter } => {
            let all = resource::all(&client, PATH, filter.as_deref()).await?;
            resource::show_all(&all, COLUMNS, args.json)?;
        }
        Command::Describe { id } => {
            let balancer: Value = client.get(&path(id)).await?;
            if args.json { print_json(&balancer)? } else { print(&describe(&balancer))? }
        }
        Command::Update { id, instances, settings } => {
            let known: Value = client.get(&path(id)).await?;
            let mut body = Map::new();
            settings.add(&mut body, &known["health_check"]);
            if !instances.is_empty() {
                body.insert("instance_ids".to_owned(), json!(instances));
            }
            resource::show(&client.patch::<Value>(&path(id), &body).await?, COLUMNS, args.json)?;
        }
        Command::Delete { ids } => resource::delete(&client, PATH, ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A load balancer for people.
fn describe(balancer: &Value) -> String {
    let mut text = resource::rows(std::slice::from_ref(balancer), COLUMNS);
    if let Some(why) = balancer.pointer("/state_reason/message").and_then(Value::as_str) {
        text.push_str(&format!("\n{why}\n"));
    }
    let columns: &Columns = &[
        ("TARGET", "/instance_id"),
        ("ADDRESS", "/address"),
        ("STATE", "/state"),
        ("SINCE", "/since"),
        ("REASON", "/reason"),
    ];
    let targets = balancer["targets"].as_array().cloned().unwrap_or_default();
    text.push('\n');
    text + &resource::rows(&targets, columns)
}

fn path(id: &str) -> String {
    format!("{PATH}/{}", escape(id))
}
