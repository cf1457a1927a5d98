//! `pulau token …`

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::connection::Connection;
use super::resource::{self, Columns};
use super::{print, print_json};
use crate::client::Client;

const PATH: &str = "/v1/tokens";
const COLUMNS: &Columns =
    &[("ID", "/id"), ("NAME", "/name"), ("ROLE", "/role"), ("CREATED", "/created"), ("EXPIRES", "/expires")];

/// Tokens for clients that reach the daemon over TCP.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Examples:
  pulau token create ci --role operate --expires 90d
  export PULAU_TOKEN=$(pulau token create laptop --role admin)
  pulau token list
  pulau token delete ci"
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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleArg {
    /// Look.
    Read,
    /// Also run and change instances and what they are made of.
    Operate,
    /// Also give and take away tokens, and cordon the host.
    Admin,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a token, and print its secret, this once.
    #[command(after_help = "Examples:
  pulau token create prometheus --role read
  pulau token create ci --role operate --expires 90d")]
    Create {
        /// What to call it: the audit log names it.
        name: String,
        /// What it allows.
        #[arg(long, value_enum)]
        role: RoleArg,
        /// How long it is good for, such as 90d, 12h or 30m; forever if not given.
        #[arg(long, value_name = "TIME", value_parser = lifetime)]
        expires: Option<u32>,
    },
    /// List tokens, without their secrets.
    List,
    /// Take tokens away. Whoever has one is refused from then on.
    #[command(after_help = "Examples:
  pulau token delete ci")]
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
        Command::Create { name, role, expires } => {
            let role = match role {
                RoleArg::Read => "read",
                RoleArg::Operate => "operate",
                RoleArg::Admin => "admin",
            };
            let body = json!({"name": name, "role": role, "lifetime_seconds": expires});
            let token: Value = client.post(PATH, &body).await?;
            if args.json {
                print_json(&token)?;
            } else {
                print(&format!("{}\n", token["secret"].as_str().unwrap_or_default()))?;
            }
        }
        Command::List => resource::list(&client, PATH, COLUMNS, args.json).await?,
        Command::Delete { ids } => resource::delete(&client, PATH, ids).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Seconds of a time such as `90d`.
fn lifetime(text: &str) -> Result<u32, String> {
    let units = [('d', 86_400), ('h', 3600), ('m', 60), ('s', 1)];
    let parsed = units.into_iter().find_map(|(unit, seconds)| {
        let count: u32 = text.strip_suffix(unit)?.parse().ok()?;
        count.checked_mul(seconds).filter(|seconds| *seconds > 0)
    });
    parsed.ok_or_else(|| "must be a number and d, h, m or s, such as 90d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::lifetime;

    #[test]
    fn a_lifetime_has_a_unit() {
        assert_eq!((lifetime("90d"), lifetime("30m")), (Ok(7_776_000), Ok(1800)));
        for wrong in ["", "d", "0s", "90", "-1d", "99999999d"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
    }
}
