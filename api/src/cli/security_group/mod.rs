//! `pulau security-group …`

mod rule;

use std::process::ExitCode;

use anyhow::bail;
use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::print_json;
use super::resource::{self, Columns};
use super::table::table;
use crate::client::{Client, escape};
use crate::model::{Rule, SecurityGroup};

const PATH: &str = "/v1/security-groups";
const COLUMNS: &Columns =
    &[("ID", "/id"), ("NAME", "/name"), ("NETWORK", "/network_id"), ("DESCRIPTION", "/description")];

/// Who may talk to whom: what no rule of an instance's groups allows is dropped.
///
/// A rule is PROTOCOL:PORTS:PEER or PROTOCOL:PEER, where the protocol is tcp, udp, icmp or all, ports are one
/// (22) or a range (8000-8100) of tcp or udp, and the peer is a subnet, an address, or the id of a security group.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau security-group create web --ingress tcp:80:0.0.0.0/0 --ingress tcp:443:0.0.0.0/0
  pulau security-group rules web
  pulau security-group rules web --ingress tcp:22:10.0.0.0/8 --ingress icmp:0.0.0.0/0
  pulau instance run --image debian --security-group web"
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
    /// Make a security group.
    #[command(after_help = "Examples:
  pulau security-group create web --ingress tcp:80:0.0.0.0/0 --ingress tcp:443:0.0.0.0/0
  pulau security-group create db --network backend --ingress tcp:5432:10.80.0.0/20 --no-egress")]
    Create {
        /// What to call it; unique in its network.
        name: String,
        /// What it is for.
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
        /// Id or name of its network; the default one if not given.
        #[arg(long, value_name = "NETWORK")]
        network: Option<String>,
        #[command(flatten)]
        rules: RuleArgs,
    },
    /// List security groups.
    List,
    /// Show all there is to know of a security group.
    #[command(after_help = "Examples:
  pulau security-group show web")]
    Show {
        /// Id or name.
        id: String,
    },
    /// Show the rules of a security group, or replace them. Members feel it at once.
    ///
    /// Those of a direction for which nothing is given stay as they are.
    #[command(after_help = "Examples:
  pulau security-group rules web
  pulau security-group rules web --ingress tcp:22:10.0.0.0/8 --ingress all:sg-0123456789abcdef0
  pulau security-group rules web --no-egress")]
    Rules {
        /// Id or name.
        id: String,
        #[command(flatten)]
        rules: RuleArgs,
    },
    /// Delete security groups that nothing uses.
    #[command(after_help = "Examples:
  pulau security-group delete web")]
    Delete {
        /// Ids or names.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
struct RuleArgs {
    /// Who may connect to members; may be repeated.
    #[arg(long, value_name = "RULE", value_parser = rule::parse)]
    ingress: Vec<Rule>,
    /// To whom members may connect; may be repeated. Everybody, if a group is made and nothing given.
    #[arg(long, value_name = "RULE", value_parser = rule::parse)]
    egress: Vec<Rule>,
    /// Let nobody connect to members.
    #[arg(long, conflicts_with = "ingress")]
    no_ingress: bool,
    /// Let members connect to nobody.
    #[arg(long, conflicts_with = "egress")]
    no_egress: bool,
}

impl RuleArgs {
    /// Rules of one direction, if anything is said of it.
    fn given(rules: &[Rule], none: bool) -> Option<&[Rule]> {
        (none || !rules.is_empty()).then_some(rules)
    }

    fn ingress(&self) -> Option<&[Rule]> {
        Self::given(&self.ingress, self.no_ingress)
    }

    fn egress(&self) -> Option<&[Rule]> {
        Self::given(&self.egress, self.no_egress)
    }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Create { name, description, network, rules } => {
            let body = json!({
                "name": name,
                "description": description,
                "network": network,
                "ingress": rules.ingress().unwrap_or_default(),
                "egress": rules.egress(),
            });
            resource::show(&client.post::<Value>(PATH, &body).await?, COLUMNS, args.json)?;
        }
        Command::List => resource::list(&client, PATH, COLUMNS, args.json).await?,
        Command::Show { id } => print_json(&find(&client, id).await?)?,
        Command::Rules { id, rules } => {
            let mut group = find(&client, id).await?;
            if rules.ingress().or(rules.egress()).is_some() {
                let body = json!({"ingress": rules.ingress(), "egress": rules.egress()});
                group = client.patch(&format!("{PATH}/{}", escape(&group.id)), &body).await?;
            }
            if args.json {
                print_json(&json!({"ingress": group.ingress, "egress": group.egress}))?;
            } else {
                super::print(&in_words(&group))?;
            }
        }
        Command::Delete { ids } => {
            for id in ids {
                let group = find(&client, id).await?;
                client.delete(&format!("{PATH}/{}", escape(&group.id))).await?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A group by its id, or by its name where only one network has it.
async fn find(client: &Client, id: &str) -> anyhow::Result<SecurityGroup> {
    #[derive(serde::Deserialize)]
    struct Groups {
        items: Vec<SecurityGroup>,
    }
    if crate::model::id::is_id(crate::model::id::SECURITY_GROUP, id) {
        return client.get(&format!("{PATH}/{}", escape(id))).await;
    }
    let groups: Groups = client.get(PATH).await?;
    let mut named: Vec<_> = groups.items.into_iter().filter(|group| group.name == id).collect();
    match (named.pop(), named.len()) {
        (Some(group), 0) => Ok(group),
        (None, _) => {
            bail!("there is no security group {id:?}; `pulau security-group list` shows those there are")
        }
        _ => bail!("several networks have a security group {id:?}: name it by its id"),
    }
}

fn in_words(group: &SecurityGroup) -> String {
    let row = |direction: &str| {
        let direction = direction.to_owned();
        move |rule: &Rule| vec![direction.clone(), rule::format(rule)]
    };
    let ingress = group.ingress.iter().map(row("ingress"));
    let rows: Vec<Vec<String>> = ingress.chain(group.egress.iter().map(row("egress"))).collect();
    table(&["DIRECTION", "RULE"], &rows)
}
