//! `pulau network …`

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::print_json;
use super::resource::{self, Columns};
use crate::client::{Client, escape};

const PATH: &str = "/v1/networks";
const COLUMNS: &Columns = &[
    ("ID", "/id"),
    ("NAME", "/name"),
    ("SUBNET", "/subnet"),
    ("GATEWAY", "/gateway"),
    ("NAT", "/nat"),
    ("DEFAULT", "/is_default"),
];

/// Isolated subnets for instances.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau network create backend --subnet 10.80.0.0/20
  pulau network list
  pulau instance run --image debian --network backend"
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
    /// Make a network, with a security group `default`.
    #[command(after_help = "Examples:
  pulau network create backend --subnet 10.80.0.0/20
  pulau network create vault --subnet 10.81.0.0/24 --no-nat")]
    Create {
        /// What to call it; the last part of its instances' names in DNS.
        name: String,
        /// IPv4 subnet of private use, /16 to /28, that overlaps no other network's.
        #[arg(long, value_name = "CIDR")]
        subnet: String,
        /// Let its instances reach nothing outside.
        #[arg(long)]
        no_nat: bool,
    },
    /// List networks.
    List,
    /// Show all there is to know of a network.
    #[command(after_help = "Examples:
  pulau network show default")]
    Show {
        /// Id or name.
        id: String,
    },
    /// Delete networks that no instance is in, with their security groups.
    #[command(after_help = "Examples:
  pulau network delete backend")]
    Delete {
        /// Ids or names.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    match &args.command {
        Command::Create { name, subnet, no_nat } => {
            let body = json!({"name": name, "subnet": subnet, "nat": !no_nat});
            resource::show(&client.post::<Value>(PATH, &body).await?, COLUMNS, args.json)?;
        }
        Command::List => resource::list(&client, PATH, COLUMNS, args.json).await?,
        Command::Show { id } => {
            print_json(&client.get::<Value>(&format!("{PATH}/{}", escape(id))).await?)?;
        }
        Command::Delete { ids } => resource::delete(&client, PATH, ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}
