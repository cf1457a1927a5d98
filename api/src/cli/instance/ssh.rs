//! `pulau instance ssh`: the system's ssh, told all it needs to know.
//!
//! The guest's host keys are read by way of its agent, which nobody on the network can stand in for: so ssh need not
//! ask whether they are right, and a guest that got its address from one that is gone alarms nobody.

use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, bail};
use pulau_agent_protocol::message::ExecRequest;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::{path, session};
use crate::cli::print_json;
use crate::cli::table::cell;
use crate::client::{Client, Refused};

const PORT: u16 = 22;
/// Between two looks at a guest whose ssh is not there yet.
const PAUSE: Duration = Duration::from_millis(250);
/// For one connection to its port.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Log in to an instance by ssh, or run a command in it.
///
/// Runs the system's ssh on the instance's private address, which the host itself reaches, with the host keys that
/// the instance has. Waits for a guest whose ssh server is just starting. With --json it only says how to connect.
///
/// Exit code: as ssh's, which is the command's, or 255 if ssh failed.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance ssh i-0123456789abcdef0 --identity ~/.ssh/pulau
  pulau instance ssh i-0123456789abcdef0 -i ~/.ssh/pulau -- sudo apt-get update
  pulau instance ssh i-0123456789abcdef0 --user root --json")]
pub struct Args {
    /// Id of a running instance.
    id: String,
    /// User of the guest. If not given, the first ordinary one (number 1000), else root.
    #[arg(long, short)]
    user: Option<String>,
    /// File with the private key; ssh's own choice if not given.
    #[arg(long, short, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// How long to wait for the guest's ssh server.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    /// The command and its arguments; a shell if there is none.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Prints the public host keys, and `user NAME`.
const LOOK: &str = "
    [ -x /usr/sbin/sshd ] || command -v sshd >/dev/null || { echo no-server; exit; }
    cat /etc/ssh/ssh_host_*_key.pub 2>/dev/null
    sed -n 's/^\\([^:]*\\):[^:]*:1000:.*/user \\1/p' /etc/passwd";

/// What a guest says of its ssh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Guest {
    /// Kind and key, as known_hosts wants them.
    keys: Vec<String>,
    user: Option<String>,
}

impl Guest {
    /// Takes what [`LOOK`] prints. A guest may say anything: only what can be a key or a name is taken.
    fn parse(text: &str) -> Self {
        let mut guest = Guest::default();
        let plain = |word: &str, more: &str| {
            !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
            if first == "user" {
                if plain(second, "-_.") && !second.starts_with('-') {
                    guest.user.get_or_insert_with(|| second.to_owned());
                }
            } else if plain(first, "-@.") && plain(second, "+/=") {
                guest.keys.push(format!("{first} {second}"));
            }
        }
        guest
    }
}

pub async fn run(args: &Args, client: &Client, json: bool) -> anyhow::Result<ExitCode> {
    let instance: Value = client.get(&path(&args.id)).await?;
    let (id, address) = (cell(&instance, "/id"), cell(&instance, "/interface/private_address"));
    let guest = reach(args, client, &address).await?;
    let user = args.user.clone().or(guest.user).unwrap_or_else(|| "root".to_owned());
    if json {
        let keys: Vec<_> = guest.keys;
        print_json(&json!({"address": address, "port": PORT, "user": user, "host_keys": keys}))?;
        return Ok(ExitCode::SUCCESS);
    }
    // Read through our descriptor, so nothing is left whichever way this ends.
    let mut known = tempfile::tempfile().context("a temporary file")?;
    for key in &guest.keys {
        writeln!(known, "{id} {key}").context("a temporary file")?;
    }
    let known_path = format!("/proc/{}/fd/{}", std::process::id(), known.as_raw_fd());
    let mut ssh = Command::new("ssh");
    ssh.args(["-o", &format!("UserKnownHostsFile={known_path}"), "-o", "GlobalKnownHostsFile=/dev/null"]);
    ssh.args(["-o", "StrictHostKeyChecking=yes", "-o", &format!("HostKeyAlias={id}")]);
    ssh.args(["-o", "CheckHostIP=no", "-o", "UpdateHostKeys=no", "-p", &PORT.to_string(), "-l", &user]);
    if let Some(identity) = &args.identity {
        ssh.args(["-o", "IdentitiesOnly=yes", "-i"]).arg(identity);
    }
    ssh.arg(&address);
    if !args.command.is_empty() {
        ssh.arg("--").args(&args.command);
    }
    let status = tokio::task::spawn_blocking(move || ssh.status()).await?;
    let status = status.context("cannot run ssh: is the package openssh-client installed?")?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// Waits until the guest's ssh server takes connections; what there is to know of it.
async fn reach(args: &Args, client: &Client, address: &str) -> anyhow::Result<Guest> {
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let mut told = false;
    loop {
        let (guest, lacks) = match look(client, &args.id).await {
            Ok(Some(guest)) if guest.keys.is_empty() => (guest, Some("it has no host keys yet".to_owned())),
            Ok(Some(guest)) => (guest, None),
            Ok(None) => {
                bail!(
                    "instance {} has no ssh server in its image; `pulau instance shell` needs none",
                    args.id
                )
            }
            // The daemon says no.
            Err(error) if error.is::<Refused>() => return Err(error),
            // A guest that has much to do while it boots may not answer in time.
            Err(error) => (Guest::default(), Some(format!("{error:#}"))),
        };
        let lacks = if let Some(lacks) = lacks {
            lacks
        } else {
            let connecting = tokio::net::TcpStream::connect((address, PORT));
            match timeout(CONNECT_WITHIN, connecting).await {
                Ok(Ok(_)) => return Ok(guest),
                Ok(Err(error)) => format!("{address} port {PORT}: {error}"),
                Err(_) => format!("{address} port {PORT} does not answer"),
            }
        };
        if Instant::now() >= deadline {
            bail!(
                "instance {}: its ssh server is not reached ({lacks}). Instances are reached from the host they run on; \
                 `pulau instance shell` works from everywhere",
                args.id
            );
        }
        if !told {
            eprintln!("pulau: waiting for the ssh server of instance {} ({lacks})", args.id);
            told = true;
        }
        sleep(PAUSE).await;
    }
}

/// None if there is no ssh server to wait for.
async fn look(client: &Client, id: &str) -> anyhow::Result<Option<Guest>> {
    let agent = session::agent(client, id).await?;
    let argv = ["sh", "-c", LOOK].map(str::to_owned).to_vec();
    let request = ExecRequest { argv, ..Default::default() };
    let output = tokio::task::spawn_blocking(move || agent.output(&request, b"")).await??;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok((text.trim() != "no-server").then(|| Guest::parse(&text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_a_key_or_a_name_is_taken_from_a_guest() {
        let text = "ssh-ed25519 AAAAC3Nza+/= root@web\n\necdsa-sha2-nistp256 AAAA\nuser debian\nuser other\n\
                    * ssh-rsa AAAA\nssh-rsa A\u{7f}A\nuser -oProxyCommand=x\nrubbish\n";
        let guest = Guest::parse(text);
        assert_eq!(guest.keys, ["ssh-ed25519 AAAAC3Nza+/=", "ecdsa-sha2-nistp256 AAAA"]);
        assert_eq!(guest.user.as_deref(), Some("debian"));
        assert_eq!(Guest::parse("user -oProxyCommand=x\nuser a;b\n"), Guest::default());
    }
}
