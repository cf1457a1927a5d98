//! `pulau snapshot …`

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::resource::{self, tag};
use super::table::{cell, gib, table};
use super::{print, print_json, progress};
use crate::client::{Client, escape};
use crate::model::id;

const PATH: &str = "/v1/snapshots";

/// Volumes as they were: take snapshots, and make volumes of them (`pulau volume create --snapshot`).
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau snapshot create vol-0123456789abcdef0 --description 'before the upgrade'
  pulau snapshot list --filter volume=vol-0123456789abcdef0
  pulau volume create --snapshot snap-0123456789abcdef0
  pulau snapshot delete snap-0123456789abcdef0"
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
    /// Take a snapshot of a volume, and wait until that has been done. An instance that has it and runs is asked to write
    /// out what it has in memory, and paused meanwhile.
    #[command(after_help = "Examples:
  pulau snapshot create vol-0123456789abcdef0
  pulau snapshot create vol-0123456789abcdef0 --description 'before the upgrade' --tag env=test")]
    Create {
        /// Id of a volume.
        volume: String,
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
        /// A tag; may be repeated.
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
        tags: Vec<(String, String)>,
        /// Makes it safe to send this again: the same token takes no second snapshot.
        #[arg(long, value_name = "TOKEN")]
        client_token: Option<String>,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// List snapshots.
    #[command(after_help = "Examples:
  pulau snapshot list
  pulau snapshot list --filter volume=vol-0123456789abcdef0,state=completed")]
    List {
        /// Only those that fit, as NAME=VALUE,…: id, state, volume, tag:KEY. `|` stands between values, `*` for anything.
        #[arg(long, short, value_name = "FILTER")]
        filter: Option<String>,
    },
    /// Show a snapshot.
    #[command(after_help = "Examples:
  pulau snapshot show snap-0123456789abcdef0")]
    Show {
        /// Id of a snapshot.
        id: String,
    },
    /// Delete snapshots. Volumes made of them stay.
    #[command(after_help = "Examples:
  pulau snapshot delete snap-0123456789abcdef0")]
    Delete {
        /// Ids of snapshots.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    let show = |snapshots: &[Value]| match args.json {
        true => print_json(&json!({ "items": snapshots })),
        false => print(&summary(snapshots)),
    };
    match &args.command {
        Command::Create { volume, description, tags, client_token, no_wait } => {
            let body = json!({
                "volume_id": volume,
                "description": description,
                "tags": tags.iter().cloned().collect::<BTreeMap<String, String>>(),
                "client_token": client_token.clone().unwrap_or_else(|| id::new("snapshot")),
            });
            let mut snapshot: Value = client.post(PATH, &body).await?;
            if !no_wait {
                let path = format!("{PATH}/{}", cell(&snapshot, "/id"));
                let taken = progress::settled(&client, &path, snapshot, "pending").await?;
                snapshot = taken.ok_or_else(|| anyhow::anyhow!("the snapshot was deleted meanwhile"))?;
            }
            show(&[snapshot])?;
        }
        Command::List { filter } => show(&resource::all(&client, PATH, filter.as_deref()).await?)?,
        Command::Show { id } => {
            print_json(&client.get::<Value>(&format!("{PATH}/{}", escape(id))).await?)?;
        }
        Command::Delete { ids } => resource::delete(&client, PATH, ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(snapshots: &[Value]) -> String {
    let row = |snapshot: &Value| {
        vec![
            cell(snapshot, "/id"),
            cell(snapshot, "/state"),
            gib(snapshot["size"].as_u64().unwrap_or(0)),
            cell(snapshot, "/volume_id"),
            cell(snapshot, "/created"),
            cell(snapshot, "/description"),
        ]
    };
    let heading = ["ID", "STATE", "SIZE", "VOLUME", "CREATED", "DESCRIPTION"];
    table(&heading, &snapshots.iter().map(row).collect::<Vec<_>>())
}
