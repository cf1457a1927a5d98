//! `pulau group …`

mod roll;

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Subcommand;
use serde_json::{Map, Value, json};

use super::connection::Connection;
use super::instance::template::TemplateArgs;
use super::resource::{self, Columns, tag};
use super::table::cell;
use super::{print, print_json};
use crate::client::{Client, escape};

const PATH: &str = "/v1/groups";
const COLUMNS: &Columns = &[
    ("ID", "/id"),
    ("NAME", "/name"),
    ("STATE", "/state"),
    ("DESIRED", "/desired_capacity"),
    ("MIN", "/min_size"),
    ("MAX", "/max_size"),
    ("TEMPLATE", "/template_version"),
];

/// Groups of like instances: kept at a number, healthy, replaced by new ones bit by bit.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau group create web --image web-1 --type small --desired 3
  pulau group describe web
  pulau group update web --desired 5
  pulau group roll web --image web-2
  pulau group delete web"
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
    /// Make a group; its instances are run behind this.
    #[command(after_help = "Examples:
  pulau group create web --image web-1 --type small --desired 3
  pulau group create web --image web-1 --desired 2 --min 2 --max 10 --cpu-target 60
  pulau group create web --image web-1 --desired 2 --max 10 --health-check load-balancer \\
      --schedule 'day=0 8 * * MON-FRI,desired=8' --schedule 'night=0 20 * * *,desired=2'")]
    Create(Box<Create>),
    /// List groups.
    #[command(after_help = "Examples:
  pulau group list
  pulau group list --filter state=active|scaling,name=web-*")]
    List {
        /// Only those that fit, as NAME=VALUE,…: id, name, state, tag:KEY. `|` stands between values, `*` for
        /// anything.
        #[arg(long, short, value_name = "FILTER")]
        filter: Option<String>,
    },
    /// Show a group: its members, and what was done last.
    #[command(after_help = "Examples:
  pulau group describe web")]
    Describe {
        /// Id or name.
        id: String,
    },
    /// Change a group's size, policies or template; its members stay.
    #[command(after_help = "Examples:
  pulau group update web --desired 5
  pulau group update web --cpu-target 70 --cooldown 120
  pulau group update web --no-cpu-target")]
    Update {
        /// Id or name.
        id: String,
        #[command(flatten)]
        size: Size,
        #[command(flatten)]
        policy: Policy,
        /// Do not scale on CPU usage any more.
        #[arg(long, conflicts_with = "cpu_target")]
        no_cpu_target: bool,
        /// Have no schedules any more.
        #[arg(long, conflicts_with = "schedules")]
        no_schedules: bool,
    },
    Roll(roll::Args),
    /// Take back a roll that is under way.
    #[command(after_help = "Examples:
  pulau group rollback web")]
    Rollback {
        /// Id or name.
        id: String,
    },
    /// Launch and terminate nothing, until it is resumed.
    #[command(after_help = "Examples:
  pulau group pause web")]
    Pause {
        /// Id or name.
        id: String,
    },
    /// Go on with a group that is paused, or that waits because launches failed.
    #[command(after_help = "Examples:
  pulau group resume web")]
    Resume {
        /// Id or name.
        id: String,
    },
    /// Delete groups, with their instances.
    #[command(after_help = "Examples:
  pulau group delete web
  pulau group delete web --keep-instances")]
    Delete {
        /// Ids or names.
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
        /// Leave their instances alone.
        #[arg(long)]
        keep_instances: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Create {
    /// What to call it.
    name: String,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    policy: Policy,
}

#[derive(Debug, clap::Args)]
struct Size {
    /// Instances there are to be.
    #[arg(long, value_name = "N")]
    desired: Option<u32>,
    /// No fewer than this; 0 if not given.
    #[arg(long, value_name = "N")]
    min: Option<u32>,
    /// No more than this; the desired number if not given.
    #[arg(long, value_name = "N")]
    max: Option<u32>,
}

#[derive(Debug, clap::Args)]
struct Policy {
    /// Who says whether members are healthy: their own status checks, or load balancers as well.
    #[arg(long, value_name = "WHO", value_parser = ["instance", "load-balancer"])]
    health_check: Option<String>,
    /// Seconds within which a new member has to be healthy; 300 if not given.
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u64>,
    /// Keep the members' mean CPU usage at this, between --min and --max.
    #[arg(long, value_name = "PERCENT")]
    cpu_target: Option<u32>,
    /// Least time between two changes for the sake of --cpu-target; 300 s if not given.
    #[arg(long, value_name = "SECONDS", requires = "cpu_target")]
    cooldown: Option<u64>,
    /// A size from a time on, as NAME=CRON,desired=N,min=N,max=N; in UTC; may be repeated, and replaces all.
    #[arg(long = "schedule", value_name = "SCHEDULE", value_parser = schedule)]
    schedules: Vec<Value>,
    /// A tag of the group's; may be repeated, and replaces all.
    #[arg(long = "group-tag", value_name = "KEY=VALUE", value_parser = tag)]
    group_tags: Vec<(String, String)>,
}

/// `NAME=CRON,desired=N,min=N,max=N`; the time itself may have commas.
fn schedule(text: &str) -> Result<Value, String> {
    let (name, mut rest) = text.split_once('=').ok_or("expected NAME=CRON,desired=N")?;
    let mut fields = Map::from_iter([("name".to_owned(), json!(name))]);
    while let Some((before, last)) = rest.rsplit_once(',') {
        let Some((key, value)) = last.split_once('=') else { break };
        let field = match key {
            "desired" => "desired_capacity",
            "min" => "min_size",
            "max" => "max_size",
            _ => return Err(format!("{key}: expected desired, min or max")),
        };
        let number: u32 = value.parse().map_err(|_| format!("{key}: {value:?} is no number"))?;
        fields.insert(field.to_owned(), json!(number));
        rest = before;
    }
    fields.insert("cron".to_owned(), json!(rest));
    Ok(Value::Object(fields))
}

impl Size {
    fn add(&self, body: &mut Map<String, Value>) {
        for (field, size) in
            [("desired_capacity", self.desired), ("min_size", self.min), ("max_size", self.max)]
        {
            if let Some(size) = size {
                body.insert(field.to_owned(), json!(size));
            }
        }
    }
}

impl Policy {
    fn add(&self, body: &mut Map<String, Value>) {
        let mut add = |field: &str, value: Value| _ = body.insert(field.to_owned(), value);
        if let Some(who) = &self.health_check {
            add("health_check_type", json!(who));
        }
        if let Some(seconds) = self.grace {
            add("health_check_grace_seconds", json!(seconds));
        }
        if let Some(percent) = self.cpu_target {
            let cooldown = self.cooldown.unwrap_or(300);
            add("scaling", json!({"cpu_percent": percent, "cooldown_seconds": cooldown}));
        }
        if !self.schedules.is_empty() {
            add("schedules", json!(self.schedules));
        }
        if !self.group_tags.is_empty() {
            add("tags", json!(self.group_tags.iter().cloned().collect::<BTreeMap<_, _>>()));
        }
    }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    args.connection.run(|client| act(args, client))
}

async fn act(args: &Args, client: Client) -> anyhow::Result<ExitCode> {
    let json = args.json;
    let post = async |id: &str, action: &str| -> anyhow::Result<()> {
        let group: Value = client.post(&format!("{}/{action}", path(id)), &json!({})).await?;
        resource::show(&group, COLUMNS, json)
    };
    match &args.command {
        Command::Create(create) => {
            let Create { name, template, size, policy } = &**create;
            let mut body = Map::new();
            body.insert("name".to_owned(), json!(name));
            body.insert("template".to_owned(), template.body()?);
            body.insert("desired_capacity".to_owned(), json!(size.min.unwrap_or(1)));
            size.add(&mut body);
            policy.add(&mut body);
            resource::show(&client.post::<Value>(PATH, &body).await?, COLUMNS, json)?;
        }
        Command::List { filter } => {
            let all = resource::all(&client, PATH, filter.as_deref()).await?;
            resource::show_all(&all, COLUMNS, json)?;
        }
        Command::Describe { id } => {
            let group: Value = client.get(&path(id)).await?;
            if json { print_json(&group)? } else { print(&describe(&group))? }
        }
        Command::Update { id, size, policy, no_cpu_target, no_schedules } => {
            let mut body = Map::new();
            size.add(&mut body);
            policy.add(&mut body);
            if *no_cpu_target {
                body.insert("scaling".to_owned(), Value::Null);
            }
            if *no_schedules {
                body.insert("schedules".to_owned(), json!([]));
            }
            resource::show(&client.patch::<Value>(&path(id), &body).await?, COLUMNS, json)?;
        }
        Command::Roll(roll) => return roll::run(roll, &client, json).await,
        Command::Rollback { id } => post(id, "rollback").await?,
        Command::Pause { id } => post(id, "pause").await?,
        Command::Resume { id } => post(id, "resume").await?,
        Command::Delete { ids, keep_instances } => {
            for id in ids {
                client.delete(&format!("{}?keep_instances={keep_instances}", path(id))).await?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A group for people.
fn describe(group: &Value) -> String {
    let mut text = resource::rows(std::slice::from_ref(group), COLUMNS);
    if let Some(why) = group.pointer("/state_reason/message").and_then(Value::as_str) {
        text.push_str(&format!("\n{why}\n"));
    }
    let list = |field: &str| group[field].as_array().cloned().unwrap_or_default();
    let columns: &Columns = &[
        ("MEMBER", "/instance_id"),
        ("STATE", "/state"),
        ("SINCE", "/since"),
        ("TEMPLATE", "/template_version"),
        ("REASON", "/reason"),
    ];
    text.push('\n');
    text.push_str(&resource::rows(&list("members"), columns));
    text.push('\n');
    for activity in list("activities") {
        text.push_str(&format!("{}  {}\n", cell(&activity, "/at"), cell(&activity, "/description")));
    }
    text
}

fn path(id: &str) -> String {
    format!("{PATH}/{}", escape(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_times_and_sizes() {
        assert_eq!(
            schedule("day=0,30 8 * * MON-FRI,desired=8,max=10").unwrap(),
            json!({"name": "day", "cron": "0,30 8 * * MON-FRI", "desired_capacity": 8, "max_size": 10})
        );
        assert!(schedule("day").is_err() && schedule("day=0 8 * * *,size=3").is_err());
        assert!(schedule("day=0 8 * * *,desired=many").is_err());
    }
}
