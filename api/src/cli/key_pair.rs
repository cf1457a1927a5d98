//! `pulau key-pair …`

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::resource::{self, Columns};
use super::{print, print_json};
use crate::client::Client;

const PATH: &str = "/v1/key-pairs";
const COLUMNS: &Columns =
    &[("ID", "/id"), ("NAME", "/name"), ("FINGERPRINT", "/fingerprint"), ("CREATED", "/created")];

/// Keys that let users log in to instances.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau key-pair create me --output ~/.ssh/pulau
  pulau key-pair import laptop ~/.ssh/id_ed25519.pub
  pulau key-pair list
  pulau instance run --image debian --key-name me"
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
    /// Make a key pair. Its private key is kept nowhere else: without --output it is printed, this once.
    #[command(after_help = "Examples:
  pulau key-pair create me --output ~/.ssh/pulau
  pulau key-pair create ci > ci.key")]
    Create {
        /// What to call it.
        name: String,
        /// File for the private key, which only you may read. It must not exist yet.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Bring along a key that exists.
    #[command(after_help = "Examples:
  pulau key-pair import laptop ~/.ssh/id_ed25519.pub")]
    Import {
        /// What to call it.
        name: String,
        /// The public key, as ssh-keygen writes it.
        #[arg(value_name = "FILE")]
        public_key: PathBuf,
    },
    /// List key pairs.
    List,
    /// Delete key pairs. Instances that have them keep them.
    #[command(after_help = "Examples:
  pulau key-pair delete laptop")]
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
        Command::Create { name, output } => create(&client, name, output.as_deref(), args.json).await?,
        Command::Import { name, public_key } => {
            let text = std::fs::read_to_string(public_key)
                .with_context(|| format!("cannot read {}", public_key.display()))?;
            let key: Value = client.post(PATH, &json!({"name": name, "public_key": text.trim()})).await?;
            resource::show(&key, COLUMNS, args.json)?;
        }
        Command::List => resource::list(&client, PATH, COLUMNS, args.json).await?,
        Command::Delete { ids } => resource::delete(&client, PATH, ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn create(client: &Client, name: &str, output: Option<&Path>, json: bool) -> anyhow::Result<()> {
    // Before the key: one whose private half cannot be kept would be of no use.
    let file = output.map(|path| {
        let new = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        new.with_context(|| format!("cannot make {}", path.display())).map(|file| (path, file))
    });
    let file = file.transpose()?;
    let made = client.post::<Value>(PATH, &json!({ "name": name })).await;
    let mut key = match made {
        Ok(key) => key,
        Err(error) => {
            // It was made just now, and is empty.
            let _ = file.map(|(path, _)| std::fs::remove_file(path));
            return Err(error);
        }
    };
    let Some((path, mut file)) = file else {
        return if json { print_json(&key) } else { print(key["private_key"].as_str().unwrap_or_default()) };
    };
    let private = key.as_object_mut().and_then(|key| key.remove("private_key"));
    let private = private.as_ref().and_then(Value::as_str).unwrap_or_default();
    let written = file.write_all(private.as_bytes()).and_then(|()| file.sync_all());
    written.with_context(|| {
        format!("cannot write {}: delete key pair {name} and make another", path.display())
    })?;
    resource::show(&key, COLUMNS, json)
}
