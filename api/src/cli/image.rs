//! `pulau image …`

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::resource::{self, tag};
use super::table::{cell, table};
use super::{print, print_json, progress};
use crate::client::{Client, escape};
use crate::model::id;

/// What instances are made from.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau image import minimal --kernel vmlinux --root minimal.erofs
  pulau image import debian-12 --root debian-12-genericcloud-amd64.qcow2
  pulau image import nginx --kernel vmlinux --reference docker.io/library/nginx:1.27
  pulau image create golden i-0123456789abcdef0
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
    /// Import a root file system, disk image or container image, and wait until that has been done.
    #[command(after_help = "Examples:
  pulau image import minimal --kernel vmlinux --root minimal.erofs
  pulau image import debian-12 --root debian-12-genericcloud-amd64.qcow2
  pulau image import nginx --kernel vmlinux --reference docker.io/library/nginx:1.27
  pulau image import app --kernel vmlinux --reference ghcr.io/org/app:1 --username me --password-file token
  docker save app > app.tar && pulau image import app --kernel vmlinux --container-file app.tar")]
    Import {
        /// What to call it.
        name: String,
        #[command(flatten)]
        source: Source,
        /// Kernel. It is found in a root file system or disk image if not given; a container image has none.
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
    /// Make an image of an instance, of its root disk, and wait until that has been done. One that runs is asked to write
    /// out what it has in memory, and paused meanwhile; better stop it first.
    #[command(after_help = "Examples:
  pulau instance stop i-0123456789abcdef0 --wait
  pulau image create golden i-0123456789abcdef0
  pulau instance run --image golden")]
    Create {
        /// What to call it.
        name: String,
        /// Id of an instance.
        instance: String,
        #[arg(long, value_name = "TEXT", default_value = "")]
        description: String,
        /// A tag; may be repeated.
        #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = tag)]
        tags: Vec<(String, String)>,
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
    /// Delete images that nothing is made of. One that is being made is given up.
    #[command(after_help = "Examples:
  pulau image delete minimal")]
    Delete {
        /// Ids or names.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

/// What an image is made of.
#[derive(Debug, clap::Args)]
struct Source {
    #[command(flatten)]
    what: What,
    /// Which image of several in --container-file: its tag or name.
    #[arg(long = "container-tag", value_name = "TAG", requires = "container_file")]
    tag: Option<String>,
    /// User of the registry.
    #[arg(long, value_name = "NAME", requires = "reference", requires = "password_file")]
    username: Option<String>,
    /// File with the password or token for the registry, or - for standard input.
    #[arg(long, value_name = "FILE", requires = "username")]
    password_file: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Root file system or disk image: EROFS, ext4, raw disk with partitions, or qcow2.
    #[arg(long, value_name = "FILE")]
    root: Option<PathBuf>,
    /// Container image: an OCI layout, an archive of one, or what `docker save` wrote.
    #[arg(long, value_name = "PATH")]
    container_file: Option<PathBuf>,
    /// Container image in a registry, such as debian:12 or ghcr.io/org/app:1.2.
    #[arg(long, value_name = "REFERENCE")]
    reference: Option<String>,
}

fn read_password(file: Option<&PathBuf>) -> anyhow::Result<Option<String>> {
    let Some(file) = file else { return Ok(None) };
    let text = match file.as_os_str() == "-" {
        true => std::io::read_to_string(std::io::stdin()),
        false => std::fs::read_to_string(file),
    };
    let text = text.with_context(|| format!("--password-file {}", file.display()))?;
    Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
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
        Command::Import { name, source, kernel, initrd, boot_args, description, no_wait } => {
            let full = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
            let body = json!({
                "name": name,
                "description": description,
                "root": full(&source.what.root)?,
                "container_file": full(&source.what.container_file)?,
                "tag": source.tag,
                "reference": source.what.reference,
                "username": source.username,
                "password": read_password(source.password_file.as_ref())?,
                "kernel": full(kernel)?,
                "initrd": full(initrd)?,
                "boot_args": boot_args,
                "client_token": id::new("import"),
            });
            let image: Value = client.post("/v1/images", &body).await?;
            finish(&client, image, *no_wait, args.json).await?;
        }
        Command::Create { name, instance, description, tags, no_wait } => {
            let body = json!({
                "name": name,
                "description": description,
                "tags": tags.iter().cloned().collect::<BTreeMap<String, String>>(),
                "client_token": id::new("image"),
            });
            let image = client.post(&format!("/v1/instances/{}/images", escape(instance)), &body).await?;
            finish(&client, image, *no_wait, args.json).await?;
        }
        Command::Show { id } => {
            print_json(&client.get::<Value>(&format!("/v1/images/{}", escape(id))).await?)?
        }
        Command::Delete { ids } => resource::delete(&client, "/v1/images", ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits for an image, unless it is not to, and shows it.
async fn finish(client: &Client, mut image: Value, no_wait: bool, json: bool) -> anyhow::Result<()> {
    if !no_wait {
        let path = format!("/v1/images/{}", cell(&image, "/id"));
        let made = progress::settled(client, &path, image, "pending").await?;
        image = made.context("the image was deleted before it was made")?;
    }
    if json { print_json(&image) } else { print(&summary(&[image])) }
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
