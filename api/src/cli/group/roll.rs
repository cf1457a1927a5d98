//! `pulau group roll`, and how far it is

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::path;
use crate::cli::print_json;
use crate::client::Client;

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(500);

/// Replace all members, a few at a time, by ones of another image; go back if new ones do not become healthy.
///
/// Shows how far it is until it has ended, unless told otherwise. Exit code 1 if it was rolled back.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau group roll web --image web-2
  pulau group roll web --image web-2 --min-healthy 50
  pulau group roll web --no-wait")]
pub struct Args {
    /// Id or name.
    id: String,
    /// Id or name of the image; the same as before if not given.
    #[arg(long, short)]
    image: Option<String>,
    /// So much of the desired number stays healthy.
    #[arg(long, value_name = "PERCENT", default_value_t = 90)]
    min_healthy: u32,
    /// No more than so much of it is there; one more, where none may be missing.
    #[arg(long, value_name = "PERCENT", default_value_t = 100)]
    max_healthy: u32,
    /// Only begin.
    #[arg(long)]
    no_wait: bool,
}

pub async fn run(args: &Args, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let body = json!({
        "image": args.image,
        "min_healthy_percent": args.min_healthy,
        "max_healthy_percent": args.max_healthy,
    });
    let group: Value = client.post(&format!("{}/roll", path(&args.id)), &body).await?;
    let group = if args.no_wait { group } else { watch(group, client).await? };
    if json {
        print_json(&group)?;
    }
    let went_wrong = matches!(group["roll"]["status"].as_str(), Some("rolled-back" | "rollback-in-progress"));
    Ok(if went_wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Shows how far a roll is until it has ended.
async fn watch(mut group: Value, client: &Client) -> anyhow::Result<Value> {
    let (started, mut shown) = (group["roll"]["started"].clone(), String::new());
    // The group's own id: a name may come to mean another one.
    let at = path(group["id"].as_str().unwrap_or_default());
    loop {
        let now = line(&group);
        if now != shown {
            eprintln!("{now}");
            shown = now;
        }
        if !group["roll"]["ended"].is_null() || group["roll"]["started"] != started {
            return Ok(group);
        }
        tokio::time::sleep(LOOK).await;
        group = client.get(&at).await?;
    }
}

fn line(group: &Value) -> String {
    let (roll, desired) = (&group["roll"], group["desired_capacity"].as_u64().unwrap_or(0));
    let count = |state: &str| {
        let members = group["members"].as_array().map(Vec::as_slice).unwrap_or_default();
        members.iter().filter(|member| member["state"] == state).count()
    };
    let mut line = format!(
        "{}: {} of {desired} replaced ({} in service, {} pending, {} draining)",
        roll["status"].as_str().unwrap_or("?"),
        roll["replaced"],
        count("in-service"),
        count("pending") + count("launching"),
        count("draining"),
    );
    if let Some(why) = roll["reason"].as_str() {
        line.push_str(&format!(": {}", why.replace(char::is_control, " ")));
    }
    line
}
