//! `pulau volume …`

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

const PATH: &str = "/v1/volumes";

/// Disks that outlive instances: make, attach, enlarge and delete them.
///
/// A guest finds a volume by its serial number, which is the id without its hyphen: in /sys/block/*/serial, and where
/// udev runs as /dev/disk/by-id/virtio-vol….
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau volume create --size 10 --tag Name=data
  pulau volume attach vol-0123456789abcdef0 i-0123456789abcdef0
  pulau volume list --filter state=available
  pulau volume detach vol-0123456789abcdef0
  pulau volume delete vol-0123456789abcdef0"
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
    /// Make a volume, blank or of a snapshot, and wait until that has been done.
    #[command(after_help = "Examples:
  pulau volume create --size 10 --tag Name=data
  pulau volume create --snapshot snap-0123456789abcdef0
  pulau volume create --snapshot snap-0123456789abcdef0 --size 20 --no-wait")]
    Create {
        /// GiB; only what is written takes space. That of the snapshot if not given.
        #[arg(long, value_name = "GIB", required_unless_present = "snapshot")]
        size: Option<u64>,
        /// What is to be on it.
        #[arg(long, value_name = "SNAPSHOT")]
        snapshot: Option<String>,
        /// A tag; may be repeated.
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
        tags: Vec<(String, String)>,
        /// Makes it safe to send this again: the same token makes no second volume.
        #[arg(long, value_name = "TOKEN")]
        client_token: Option<String>,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// List volumes. Root disks are among them.
    #[command(after_help = "Examples:
  pulau volume list
  pulau volume list --filter instance=i-0123456789abcdef0
  pulau volume list --filter state=available,tag:Name=data-*")]
    List {
        /// Only those that fit, as NAME=VALUE,…: id, state, instance, snapshot, tag:KEY. `|` stands between values, `*`
        /// for anything.
        #[arg(long, short, value_name = "FILTER")]
        filter: Option<String>,
    },
    /// Show a volume.
    #[command(after_help = "Examples:
  pulau volume show vol-0123456789abcdef0")]
    Show {
        /// Id of a volume.
        id: String,
    },
    /// Attach a volume to a stopped instance, behind the disks it has.
    #[command(after_help = "Examples:
  pulau volume attach vol-0123456789abcdef0 i-0123456789abcdef0
  pulau volume attach vol-0123456789abcdef0 i-0123456789abcdef0 --delete-on-termination")]
    Attach {
        /// Id of a volume.
        id: String,
        /// Id of a stopped instance.
        instance: String,
        /// Delete it when the instance is terminated.
        #[arg(long)]
        delete_on_termination: bool,
    },
    /// Detach volumes from their instances, which must be stopped.
    #[command(after_help = "Examples:
  pulau volume detach vol-0123456789abcdef0")]
    Detach {
        /// Ids of volumes.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Make a volume larger. It must be detached, or its instance stopped.
    ///
    /// The file system on it stays as it is until the guest makes it larger: `resize2fs /dev/vdc` for ext4, for one. The
    /// writable layer of an instance is enlarged with its root disk.
    #[command(after_help = "Examples:
  pulau volume resize vol-0123456789abcdef0 20")]
    Resize {
        /// Id of a volume.
        id: String,
        /// GiB.
        #[arg(value_name = "GIB")]
        size: u64,
    },
    /// Change a volume's tags, or whether it goes with its instance.
    #[command(after_help = "Examples:
  pulau volume modify vol-0123456789abcdef0 --tag Name=data --tag env=test
  pulau volume modify vol-0123456789abcdef0 --delete-on-termination false")]
    Modify {
        /// Id of a volume.
        id: String,
        /// Other tags, in place of all it has; may be repeated.
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
        tags: Vec<(String, String)>,
        /// Delete it when its instance is terminated.
        #[arg(long, value_name = "BOOL")]
        delete_on_termination: Option<bool>,
    },
    /// Delete volumes that are not attached.
    #[command(after_help = "Examples:
  pulau volume delete vol-0123456789abcdef0")]
    Delete {
        /// Ids of volumes.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    let show = |volumes: &[Value]| match args.json {
        true => print_json(&json!({ "items": volumes })),
        false => print(&summary(volumes)),
    };
    match &args.command {
        Command::Create { size, snapshot, tags, client_token, no_wait } => {
            let body = json!({
                "size_gib": size,
                "snapshot_id": snapshot,
                "tags": tags.iter().cloned().collect::<BTreeMap<String, String>>(),
                "client_token": client_token.clone().unwrap_or_else(|| id::new("volume")),
            });
            let mut volume: Value = client.post(PATH, &body).await?;
            if !no_wait {
                let made =
                    progress::settled(&client, &path(&cell(&volume, "/id")), volume, "creating").await?;
                volume = made.ok_or_else(|| anyhow::anyhow!("the volume was deleted meanwhile"))?;
            }
            show(&[volume])?;
        }
        Command::List { filter } => show(&resource::all(&client, PATH, filter.as_deref()).await?)?,
        Command::Show { id } => print_json(&client.get::<Value>(&path(id)).await?)?,
        Command::Attach { id, instance, delete_on_termination } => {
            let body = json!({"instance_id": instance, "delete_on_termination": delete_on_termination});
            show(&[client.post(&format!("{}/attach", path(id)), &body).await?])?;
        }
        Command::Detach { ids } => {
            let mut detached = Vec::new();
            for id in ids {
                detached.push(client.post(&format!("{}/detach", path(id)), &json!({})).await?);
            }
            show(&detached)?;
        }
        Command::Resize { id, size } => {
            show(&[client.patch(&path(id), &json!({ "size_gib": size })).await?])?;
        }
        Command::Modify { id, tags, delete_on_termination } => {
            let tags: BTreeMap<String, String> = tags.iter().cloned().collect();
            let body = json!({
                "tags": (!tags.is_empty()).then_some(tags),
                "delete_on_termination": delete_on_termination,
            });
            show(&[client.patch(&path(id), &body).await?])?;
        }
        Command::Delete { ids } => resource::delete(&client, PATH, ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn path(id: &str) -> String {
    format!("{PATH}/{}", escape(id))
}

fn summary(volumes: &[Value]) -> String {
    let row = |volume: &Value| {
        vec![
            cell(volume, "/id"),
            cell(volume, "/tags/Name"),
            cell(volume, "/state"),
            gib(volume["size"].as_u64().unwrap_or(0)),
            cell(volume, "/attachment/instance_id"),
            cell(volume, "/created"),
        ]
    };
    let heading = ["ID", "NAME", "STATE", "SIZE", "INSTANCE", "CREATED"];
    table(&heading, &volumes.iter().map(row).collect::<Vec<_>>())
}
