//! `pulau instance exec` and `shell`: a process in a guest, joined to our terminal or streams.
//!
//! The daemon only passes bytes on; the agent's protocol is spoken from here.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pulau_agent_protocol::client::Connection;
use pulau_agent_protocol::message::ExecRequest;
use serde_json::{Value, json};
use tokio::signal::unix::SignalKind;

use super::path;
use crate::cli::microvm::run::{environment, exit_code};
use crate::cli::microvm::session::{self, End};
use crate::cli::microvm::terminal;
use crate::cli::print_json;
use crate::client::Client;
use crate::http::AGENT;
use crate::microvm::Agent;

/// Exit code where the command's own is not known.
const NOT_RUN: u8 = 125;
/// For an agent to answer.
const AGENT_WITHIN: Duration = Duration::from_secs(10);

/// Run a command in an instance, joined to standard input, output and error.
///
/// Ctrl-C, SIGTERM, SIGHUP and SIGQUIT are passed on to it; after the third it is left. With a terminal, `~.` at
/// the beginning of a line leaves one that no longer answers.
///
/// Exit code: the command's, or 128 and the number of the signal that killed it; 125 if it could not be run.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance exec i-0123456789abcdef0 -- uname -a
  pulau instance exec -t -u postgres i-0123456789abcdef0 -- psql
  tar c . | pulau instance exec i-0123456789abcdef0 -- tar x -C /srv
  pulau instance exec i-0123456789abcdef0 --json -- cat /proc/meminfo")]
pub struct ExecArgs {
    /// Id of a running instance.
    id: String,
    #[command(flatten)]
    how: How,
    /// Give the command a terminal, if we have one.
    #[arg(long, short)]
    tty: bool,
    /// With --json, which waits for the command and prints what it wrote: how long it may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Open a shell in an instance.
///
/// `~.` at the beginning of a line leaves one that no longer answers.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance shell i-0123456789abcdef0
  pulau instance shell -u admin i-0123456789abcdef0
  pulau instance shell i-0123456789abcdef0 < setup.sh")]
pub struct ShellArgs {
    /// Id of a running instance.
    id: String,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, clap::Args)]
struct How {
    /// User of the guest: a name or number, `user:group`; root if not given.
    #[arg(long, short)]
    user: Option<String>,
    /// Set an environment variable; may be repeated.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = environment)]
    env: Vec<(String, String)>,
    /// Directory of the guest; the user's own if not given.
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,
}

pub async fn exec(args: &ExecArgs, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    if !json {
        return Ok(joined(&args.id, &args.how, args.command.clone(), args.tty, client).await);
    }
    let body = json!({"argv": args.command, "user": args.how.user, "timeout_seconds": args.timeout});
    let result: Value = client.post(&format!("{}/exec", path(&args.id)), &body).await?;
    print_json(&result)?;
    let code = result["exit_code"].as_u64().and_then(|code| u8::try_from(code).ok());
    Ok(ExitCode::from(code.unwrap_or(u8::MAX)))
}

pub async fn shell(args: &ShellArgs, client: &Client) -> ExitCode {
    // The user's own, as a login would give it; the agent sets SHELL.
    let shell = ["/bin/sh", "-c", "exec \"${SHELL:-/bin/sh}\" -l"].map(str::to_owned).to_vec();
    joined(&args.id, &args.how, shell, true, client).await
}

/// An agent in a guest, by way of the daemon.
pub async fn agent(client: &Client, id: &str) -> anyhow::Result<Agent> {
    let stream = client.upgrade(&format!("{}/agent", path(id)), AGENT).await?;
    let connect = move || Connection::new(stream, Some(Instant::now() + AGENT_WITHIN));
    Ok(tokio::task::spawn_blocking(connect).await??)
}

async fn joined(id: &str, how: &How, argv: Vec<String>, tty: bool, client: &Client) -> ExitCode {
    let run = async {
        let agent = agent(client, id).await?;
        let interactive = tty && terminal::is_interactive();
        let mut env: BTreeMap<String, String> = how.env.iter().cloned().collect();
        if interactive && let Ok(term) = std::env::var("TERM") {
            env.entry("TERM".into()).or_insert(term);
        }
        let request = ExecRequest {
            argv,
            env,
            clear_env: false,
            cwd: how.workdir.clone(),
            user: how.user.clone(),
            tty: interactive.then(terminal::size),
            stdin: true,
        };
        let forwarded =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];
        anyhow::Ok(session::join(agent, request, &forwarded).await?)
    };
    match run.await {
        Ok(End::Exited(status)) => exit_code(status),
        Ok(End::Left) => ExitCode::from(128 + libc::SIGKILL as u8),
        Ok(End::Signalled(number)) => ExitCode::from(u8::try_from(128 + number).unwrap_or(u8::MAX)),
        // 1 could be the command's as well.
        Err(error) => {
            eprintln!("pulau: instance {id}: {error:#}");
            ExitCode::from(NOT_RUN)
        }
    }
}
