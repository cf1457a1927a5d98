//! `pulau host …`

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};

use super::connection::Connection;
use super::table::cell;
use super::{print, print_json};
use crate::client::events::{Received, Subscription};
use crate::client::{Client, Refused};

/// Before the daemon is looked for again when it has gone.
const PAUSE: Duration = Duration::from_secs(1);

/// This host: what it has, what instances take of it, and what happens.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau host show
  pulau host events --follow
  pulau host cordon
  pulau host drain"
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
    /// Show what the host has and what instances take of it.
    Show,
    /// Show the last changes of state of instances and images. With --json, one document a line.
    #[command(after_help = "Examples:
  pulau host events
  pulau host events --follow
  pulau host events --follow --json | jq -r .id")]
    Events {
        /// Go on with what happens, and look for the daemon again if it goes.
        #[arg(long, short)]
        follow: bool,
    },
    /// Run no instances on this host any more. Those that exist stay as they are.
    Cordon,
    /// Run instances again. Those that a drain stopped stay stopped.
    Uncordon,
    /// Cordon the host, stop all its instances in order, and wait until none runs: before its kernel is replaced, or
    /// itself.
    #[command(after_help = "Examples:
  pulau host drain
  pulau host drain --terminate --timeout 600")]
    Drain {
        /// Terminate instances instead of stopping them, but for protected ones.
        #[arg(long)]
        terminate: bool,
        /// Do not ask the guests, and do not wait for them.
        #[arg(long)]
        force: bool,
        /// How long to wait, in seconds.
        #[arg(long, value_name = "SECONDS", default_value_t = 300)]
        timeout: u64,
    },
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    let host: Value = match &args.command {
        Command::Show => client.get("/v1/host").await?,
        Command::Cordon => client.post("/v1/host/cordon", &()).await?,
        Command::Uncordon => client.post("/v1/host/uncordon", &()).await?,
        Command::Drain { terminate, force, timeout } => {
            drain(&client, *terminate, *force, Duration::from_secs(*timeout)).await?
        }
        Command::Events { follow } => return events(&client, *follow, args.json).await,
    };
    if args.json {
        print_json(&host)?
    } else {
        print(&in_words(&host))?
    }
    Ok(ExitCode::SUCCESS)
}

/// Drains the host and tells on standard error how far it is.
async fn drain(client: &Client, terminate: bool, force: bool, limit: Duration) -> anyhow::Result<Value> {
    let begun = std::time::Instant::now();
    let mut told = None;
    let mut host: Value =
        client.post("/v1/host/drain", &json!({"terminate": terminate, "force": force})).await?;
    loop {
        let left: u64 = ["pending", "running", "stopping", "shutting-down"]
            .iter()
            .filter_map(|state| host["instances"][state].as_u64())
            .sum();
        if told.replace(left) != Some(left) {
            eprintln!("pulau: {left} instances are left");
        }
        if left == 0 {
            return Ok(host);
        }
        anyhow::ensure!(
            begun.elapsed() < limit,
            "{left} instances have not stopped within {} s: wait longer with --timeout, or kill them with --force",
            limit.as_secs()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
        host = client.get("/v1/host").await?;
    }
}

fn in_words(host: &Value) -> String {
    let of = |what: &str| {
        format!("{} of {}", cell(host, &format!("/used/{what}")), cell(host, &format!("/capacity/{what}")))
    };
    let cordoned = match host["cordoned_since"].as_str() {
        Some(since) => format!("since {since}: no instances are run"),
        None => "no".to_owned(),
    };
    let states = host["instances"].as_object().into_iter().flatten();
    let states = states.filter(|(_, count)| count.as_u64() != Some(0));
    let instances: Vec<String> = states.map(|(state, count)| format!("{count} {state}")).collect();
    let rows = [
        ("Version", cell(host, "/version")),
        ("vCPUs", of("vcpus")),
        ("Memory (MiB)", of("memory_mib")),
        ("Instances", if instances.is_empty() { "none".to_owned() } else { instances.join(", ") }),
        ("Cordoned", cordoned),
    ];
    rows.iter().map(|(name, value)| format!("{name:12}  {value}\n")).collect()
}

/// Shows what has happened, and if asked to what happens, for as long as it takes.
async fn events(client: &Client, follow: bool, json: bool) -> anyhow::Result<ExitCode> {
    // From the first that is kept.
    let mut last = Some("0".to_owned());
    loop {
        match listen(client, &mut last, follow, json).await {
            Ok(()) if !follow => return Ok(ExitCode::SUCCESS),
            Ok(()) => {}
            // It says no: asking again would not help.
            Err(error) if !follow || error.is::<Refused>() => return Err(error),
            Err(error) => eprintln!("pulau: {error:#}; trying again"),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn listen(client: &Client, last: &mut Option<String>, follow: bool, json: bool) -> anyhow::Result<()> {
    let mut subscription = Subscription::open(client, last.as_deref()).await?;
    let mut is_first_of_all = last.as_deref() == Some("0");
    loop {
        let received = if follow {
            subscription.next().await?
        } else {
            // What is kept comes at once.
            match tokio::time::timeout(Duration::from_millis(300), subscription.next()).await {
                Ok(received) => received?,
                Err(_) => return Ok(()),
            }
        };
        match received {
            None => return Ok(()),
            Some(Received::Lost) if is_first_of_all => {}
            Some(Received::Lost) => eprintln!("pulau: events are missing here"),
            Some(Received::State { id, event }) => {
                *last = Some(id);
                show(&event, json)?;
            }
        }
        is_first_of_all = false;
    }
}

fn show(event: &Value, json: bool) -> anyhow::Result<()> {
    if json {
        return print(&format!("{event}\n"));
    }
    let state = |pointer: &str| match cell(event, pointer) {
        none if none.is_empty() => "-".to_owned(),
        state => state,
    };
    let change = if event["old_state"] == event["state"] {
        ["vmm", "agent", "network"]
            .map(|check| format!("{check} {}", state(&format!("/status/{check}"))))
            .join(", ")
    } else {
        format!("{} → {}", state("/old_state"), state("/state"))
    };
    let [revision, id, reason] = ["/revision", "/id", "/reason/message"].map(|pointer| cell(event, pointer));
    let line = format!("{revision:>8}  {id:<21}  {change:<27}  {reason}");
    print(&format!("{}\n", line.trim_end()))
}
