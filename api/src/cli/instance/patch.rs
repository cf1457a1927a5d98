//! `pulau instance patch` and `patches`

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use serde_json::{Value, json};

use crate::cli::table::{cell, table};
use crate::cli::{print, print_json, resource};
use crate::client::{Client, escape};
use crate::model::id;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Update the packages in running instances, unattended.
///
/// Each guest's own package manager does it: apt-get, in images that have it. Waits, tells how it goes, and reports
/// for each instance which packages have changed, and whether a reboot is needed. Ctrl-C leaves off: what has not
/// begun is left alone, what is under way is stopped; a second one only stops waiting.
///
/// Exit code: 0 if all instances were updated, else 1.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance patch i-0123456789abcdef0
  pulau instance patch --filter tag:Name=web-* --reboot
  pulau instance patch --filter image=debian --json > report.json")]
pub struct Args {
    /// Ids of instances.
    #[arg(value_name = "ID", required_unless_present = "filter", conflicts_with = "filter")]
    ids: Vec<String>,
    /// All running ones that fit, as for `pulau instance list`.
    #[arg(long, short, value_name = "FILTER")]
    filter: Option<String>,
    /// Boot those anew that need it for the update to take effect.
    #[arg(long)]
    reboot: bool,
    /// For one instance, without its reboot.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    timeout: u64,
    /// Do not wait; `pulau instance patches` shows how it goes.
    #[arg(long)]
    no_wait: bool,
}

/// List, show or leave off updates of instances.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance patches
  pulau instance patches patch-0123456789abcdef0 --json
  pulau instance patches patch-0123456789abcdef0 --cancel")]
pub struct ListArgs {
    /// Id of one, as `pulau instance patch --no-wait` prints it.
    id: Option<String>,
    /// Leave off.
    #[arg(long, requires = "id")]
    cancel: bool,
}

pub async fn run(args: &Args, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let ids = match &args.filter {
        Some(filter) => running(client, filter).await?,
        None => args.ids.clone(),
    };
    let body = json!({
        "instance_ids": ids,
        "reboot": args.reboot,
        "timeout_seconds": args.timeout,
        "client_token": id::new("run"),
    });
    let mut patch: Value = client.post("/v1/patches", &body).await?;
    let path = path(&cell(&patch, "/id"));
    let mut told = BTreeMap::new();
    let mut interrupted = false;
    while !args.no_wait && patch["finished"].is_null() {
        progress(&patch, &mut told);
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = tokio::signal::ctrl_c() => {
                if interrupted {
                    break;
                }
                interrupted = true;
                eprintln!("pulau: leaving off; again Ctrl-C stops waiting");
                client.post::<Value>(&format!("{path}/cancel"), &json!({})).await?;
            }
        }
        patch = client.get(&path).await?;
    }
    if !args.no_wait {
        progress(&patch, &mut told);
    }
    show(&patch, json)?;
    let good = args.no_wait || patch["state"] == "succeeded";
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub async fn list_or_show(args: &ListArgs, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    if let Some(id) = &args.id {
        let patch: Value = if args.cancel {
            client.post(&format!("{}/cancel", path(id)), &json!({})).await?
        } else {
            client.get(&path(id)).await?
        };
        show(&patch, json)?;
        return Ok(ExitCode::SUCCESS);
    }
    let all: Value = client.get("/v1/patches").await?;
    if json {
        print_json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |patch: &Value| {
        let count = patch["instances"].as_array().map_or(0, Vec::len).to_string();
        let [id, state, created, finished] =
            ["/id", "/state", "/created", "/finished"].map(|at| cell(patch, at));
        vec![id, state, count, created, finished]
    };
    let rows: Vec<_> = all["items"].as_array().into_iter().flatten().map(row).collect();
    print(&table(&["ID", "STATE", "INSTANCES", "CREATED", "FINISHED"], &rows))?;
    Ok(ExitCode::SUCCESS)
}

fn path(id: &str) -> String {
    format!("/v1/patches/{}", escape(id))
}

/// Ids of the running instances that fit.
async fn running(client: &Client, filter: &str) -> anyhow::Result<Vec<String>> {
    let all = resource::all(client, "/v1/instances", Some(filter)).await?;
    let ids: Vec<_> = all.iter().filter(|i| i["state"] == "running").map(|i| cell(i, "/id")).collect();
    if ids.is_empty() {
        bail!("no running instance fits {filter:?}");
    }
    Ok(ids)
}

/// Tells on standard error what has changed since the last time.
fn progress(patch: &Value, told: &mut BTreeMap<String, String>) {
    for entry in patch["instances"].as_array().into_iter().flatten() {
        let id = cell(entry, "/instance_id");
        let line = [cell(entry, "/state"), cell(entry, "/message")].join(" ").trim().to_owned();
        if told.get(&id) != Some(&line) {
            eprintln!("{id}: {line}");
            told.insert(id, line);
        }
    }
}

fn show(patch: &Value, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(patch);
    }
    let mut text = String::new();
    let entries = patch["instances"].as_array().map(Vec::as_slice).unwrap_or_default();
    let row = |entry: &Value| {
        let changed = entry["packages"].as_array().map_or(0, Vec::len).to_string();
        let reboot = match (&entry["reboot_required"], entry["rebooted"] == true) {
            (_, true) => "done",
            (Value::Bool(true), _) => "required",
            (Value::Bool(false), _) => "no",
            _ => "",
        };
        let [id, state, exit] = ["/instance_id", "/state", "/exit_code"].map(|at| cell(entry, at));
        vec![id, state, exit, changed, reboot.to_owned(), cell(entry, "/message")]
    };
    let heading = ["INSTANCE", "STATE", "EXIT", "PACKAGES", "REBOOT", "MESSAGE"];
    text.push_str(&table(&heading, &entries.iter().map(row).collect::<Vec<_>>()));
    for entry in entries {
        for package in entry["packages"].as_array().into_iter().flatten() {
            let or = |at: &str, other: &str| {
                Some(cell(package, at)).filter(|v| !v.is_empty()).unwrap_or(other.into())
            };
            let (old, new) = (or("/old_version", "(none)"), or("/new_version", "(removed)"));
            text.push_str(&format!(
                "{}  {} {old} -> {new}\n",
                cell(entry, "/instance_id"),
                cell(package, "/name")
            ));
        }
        if entry["state"] == "failed" {
            let output = entry["output"].as_str().unwrap_or_default();
            for line in output.lines() {
                let line: String = line.chars().filter(|c| !c.is_control()).collect();
                text.push_str(&format!("{}  | {line}\n", cell(entry, "/instance_id")));
            }
        }
    }
    if patch["finished"].is_null() {
        text.push_str(&format!("{} is {}\n", cell(patch, "/id"), cell(patch, "/state")));
    }
    print(&text)
}
