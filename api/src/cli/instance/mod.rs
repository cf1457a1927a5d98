//! `pulau instance …`

mod console;
mod copy;
mod patch;
mod publish;
mod run;
mod session;
mod show;
mod ssh;
pub mod template;

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::{print, print_json, resource};
use crate::client::{Client, escape};
use crate::model::PublishedPort;
use show::summary;

/// Machines of your own: run, look at, stop, start and terminate them.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau instance run --image minimal --wait
  pulau instance list --filter state=running,tag:Name=web-*
  pulau instance exec i-0123456789abcdef0 -- uname -a
  pulau instance shell i-0123456789abcdef0
  pulau instance ssh i-0123456789abcdef0 --identity ~/.ssh/pulau
  pulau instance stop i-0123456789abcdef0 --wait
  pulau instance terminate i-0123456789abcdef0"
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
    /// Run instances of an image.
    Run(run::Args),
    /// List instances.
    #[command(after_help = "Examples:
  pulau instance list
  pulau instance list --filter state=running,tag:Name=web-*")]
    List {
        /// Only those that fit, as NAME=VALUE,…: id, state, image, type, network, key, group, address, hostname,
        /// tag:KEY. `|` stands between values, `*` for anything.
        #[arg(long, short, value_name = "FILTER")]
        filter: Option<String>,
    },
    /// Show all there is to know of an instance.
    #[command(after_help = "Examples:
  pulau instance show i-0123456789abcdef0")]
    Show {
        /// Id of an instance.
        id: String,
    },
    /// Start stopped instances.
    #[command(after_help = "Examples:
  pulau instance start i-0123456789abcdef0 --wait")]
    Start(Several),
    /// Stop instances. They keep their ids, disks and addresses.
    #[command(after_help = "Examples:
  pulau instance stop i-0123456789abcdef0 --wait
  pulau instance stop i-0123456789abcdef0 --force")]
    Stop {
        #[command(flatten)]
        several: Several,
        /// Do not ask the guest, and do not wait for it: as a power cut.
        #[arg(long)]
        force: bool,
    },
    /// Boot running instances anew.
    #[command(after_help = "Examples:
  pulau instance reboot i-0123456789abcdef0")]
    Reboot(Several),
    /// End instances for good, with their root disks and the volumes that are to go with them.
    #[command(after_help = "Examples:
  pulau instance terminate i-0123456789abcdef0")]
    Terminate(Several),
    /// Change an instance.
    Modify(run::ModifyArgs),
    /// Have ports of the host lead to an instance, whatever its security groups say.
    Publish(publish::PublishArgs),
    /// Take back that ports are published. Connections that exist go on.
    Unpublish(publish::UnpublishArgs),
    /// Wait until an instance is in a state.
    #[command(after_help = "Examples:
  pulau instance wait i-0123456789abcdef0 running --agent
  pulau instance wait i-0123456789abcdef0 stopped --timeout 300")]
    Wait {
        /// Id of an instance.
        id: String,
        /// pending, running, stopping, stopped, shutting-down or terminated.
        #[arg(default_value = "running")]
        state: String,
        /// Also until the agent in the guest answers.
        #[arg(long)]
        agent: bool,
        /// Seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u64,
    },
    Console(console::Args),
    Exec(session::ExecArgs),
    Shell(session::ShellArgs),
    Ssh(ssh::Args),
    Cp(copy::Args),
    Patch(patch::Args),
    Patches(patch::ListArgs),
    /// Show what an instance uses of the host.
    #[command(after_help = "Examples:
  pulau instance metrics i-0123456789abcdef0")]
    Metrics {
        /// Id of an instance.
        id: String,
    },
    /// List the instance types.
    Types,
}

#[derive(Debug, clap::Args)]
struct Several {
    /// Ids of instances.
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
    /// Wait until it has been done.
    #[arg(long, short)]
    wait: bool,
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    let json = args.json;
    let several = async |several: &Several, action: &str, body: Value, state: &str| {
        let mut done = Vec::new();
        for id in &several.ids {
            let mut instance: Value = match action {
                "terminate" => client.delete(&path(id)).await?,
                action => client.post(&format!("{}/{action}", path(id)), &body).await?,
            };
            if several.wait {
                instance =
                    client.get(&format!("{}/wait?state={state}&timeout_seconds=300", path(id))).await?;
            }
            done.push(instance);
        }
        show_all(&done, json)
    };
    match &args.command {
        Command::Run(run) => return run::run(run, &client, json).await,
        Command::List { filter } => {
            let all = resource::all(&client, "/v1/instances", filter.as_deref()).await?;
            show_all(&all, json)?;
        }
        Command::Show { id } => {
            let instance: Value = client.get(&path(id)).await?;
            if json { print_json(&instance)? } else { print(&show::details(&instance))? }
        }
        Command::Start(ids) => several(ids, "start", json!({}), "running").await?,
        Command::Stop { several: ids, force } => {
            several(ids, "stop", json!({"force": force}), "stopped").await?
        }
        Command::Reboot(ids) => several(ids, "reboot", json!({}), "running").await?,
        Command::Terminate(ids) => several(ids, "terminate", json!({}), "terminated").await?,
        Command::Modify(modify) => {
            let instance: Value = client.patch(&path(&modify.id), &modify.body()?).await?;
            show_all(&[instance], json)?;
        }
        Command::Publish(args) => ports(&client, &args.id, "publish", &args.ports, json).await?,
        Command::Unpublish(args) => ports(&client, &args.id, "unpublish", &args.ports, json).await?,
        Command::Wait { id, state, agent, timeout } => {
            let query = format!("state={}&agent={agent}&timeout_seconds={timeout}", escape(state));
            let instance: Value = client.get(&format!("{}/wait?{query}", path(id))).await?;
            show_all(&[instance], json)?;
        }
        Command::Console(args) => console::run(args, &client).await?,
        Command::Exec(args) => return session::exec(args, &client, json).await,
        Command::Shell(args) => return Ok(session::shell(args, &client).await),
        Command::Ssh(args) => return ssh::run(args, &client, json).await,
        Command::Patch(args) => return patch::run(args, &client, json).await,
        Command::Patches(args) => return patch::list_or_show(args, &client, json).await,
        Command::Cp(args) => copy::run(args, &client).await?,
        Command::Metrics { id } => print_json(&client.get::<Value>(&format!("{}/metrics", path(id))).await?)?,
        Command::Types => {
            let types: Value = client.get("/v1/instance-types").await?;
            let items = types["items"].as_array().cloned().unwrap_or_default();
            if json { print_json(&types)? } else { print(&show::types(&items))? }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn ports(
    client: &Client,
    id: &str,
    action: &str,
    ports: &[PublishedPort],
    json: bool,
) -> anyhow::Result<()> {
    let mut instance = Value::Null;
    for port in ports {
        instance = client.post(&format!("{}/{action}", path(id)), port).await?;
    }
    show_all(&[instance], json)
}

fn show_all(instances: &[Value], json: bool) -> anyhow::Result<()> {
    if json { print_json(&json!({ "items": instances })) } else { print(&summary(instances)) }
}

fn path(id: &str) -> String {
    format!("/v1/instances/{}", escape(id))
}
