//! `pulau image …`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::table::{cell, table};
use super::{print, print_json, resource};
use crate::client::{Client, escape};
use crate::model::id;

/// What instances are made from.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau image import minimal --kernel vmlinux --root minimal.erofs
  pulau image import debian-12 --root debian-12-genericcloud-amd64.qcow2
  pulau image list
  pulau image delete minimal"
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
    /// List images.
    List,
    /// Import a root file system or disk image, and wait until that has been done.
    #[command(after_help = "Examples:
  pulau image import minimal --kernel vmlinux --root minimal.erofs
  pulau image import debian-12 --root debian-12-genericcloud-amd64.qcow2")]
    Import {
        /// What to call it.
        name: String,
        /// Root file system or disk image: EROFS, ext4, raw disk with partitions, or qcow2.
        #[arg(long, value_name = "FILE")]
        root: PathBuf,
        /// Kernel; found in the image if not given.
        #[arg(long, value_name = "FILE")]
        kernel: Option<PathBuf>,
        /// Initial RAM disk.
        #[arg(long, value_name = "FILE")]
        initrd: Option<PathBuf>,
        /// Words for the kernel command line.
        #[arg(long, value_name = "ARGS", default_value = "")]
        boot_args: String,
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
    },
    /// Show an image.
    #[command(after_help = "Examples:
  pulau image show minimal")]
    Show {
        /// Id or name.
        id: String,
    },
    /// Delete images that nothing is made of.
    #[command(after_help = "Examples:
  pulau image delete minimal")]
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
        Command::List => {
            let list: Value = client.get("/v1/images").await?;
            if args.json {
                print_json(&list)?;
            } else {
                print(&summary(list["items"].as_array().map(Vec::as_slice).unwrap_or_default()))?;
            }
        }
        Command::Import { name, root, kernel, initrd, boot_args, description, no_wait } => {
            let full = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
            let body = json!({
                "name": name,
                "description": description,
                "root": std::path::absolute(root)?,
                "kernel": full(kernel)?,
                "initrd": full(initrd)?,
                "boot_args": boot_args,
                "tags": BTreeMap::<String, String>::new(),
                "client_token": id::new("import"),
            });
            let mut image: Value = client.post("/v1/images", &body).await?;
            let path = format!("/v1/images/{}", cell(&image, "/id"));
            while !no_wait && image["state"] == "pending" {
                tokio::time::sleep(Duration::from_millis(200)).await;
                image = client.get(&path).await?;
            }
            if image["state"] == "failed" {
                bail!("the import failed: {}", cell(&image, "/state_reason"));
            }
            if args.json { print_json(&image)? } else { print(&summary(&[image]))? }
        }
        Command::Show { id } => {
            print_json(&client.get::<Value>(&format!("/v1/images/{}", escape(id))).await?)?
        }
        Command::Delete { ids } => resource::delete(&client, "/v1/images", ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn summary(images: &[Value]) -> String {
    let row = |image: &Value| {
        let bytes = image["size"].as_u64().unwrap_or(0);
        let mut row = ["/id", "/name", "/state"].map(|pointer| cell(image, pointer)).to_vec();
        row.push(format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)));
        row.push(cell(image, "/created"));
        row
    };
    table(&["ID", "NAME", "STATE", "SIZE", "CREATED"], &images.iter().map(row).collect::<Vec<_>>())
}
