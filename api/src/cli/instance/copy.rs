//! `pulau instance cp`

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use pulau_agent_protocol::message::CopyIn;

use super::session;
use crate::client::Client;
use crate::microvm::Agent;
use crate::model::id::{INSTANCE, is_id};

/// Copy a file into an instance or out of it, with its permissions.
///
/// It appears under its name only when it is whole. Directories that are missing in the guest are made.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance cp app.conf i-0123456789abcdef0:/etc/app.conf
  pulau instance cp app i-0123456789abcdef0:/usr/local/bin/
  pulau instance cp i-0123456789abcdef0:/var/log/syslog .")]
pub struct Args {
    /// FILE, or ID:/PATH in an instance.
    from: String,
    /// Where it goes: the other of the two. Ends with a slash, or is a directory here, to keep its name.
    to: String,
}

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    There { id: String, path: String },
}

impl Place {
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((id, path)) if is_id(INSTANCE, id) => {
                Place::There { id: id.to_owned(), path: path.to_owned() }
            }
            _ => Place::Here(text.into()),
        }
    }
}

pub async fn run(args: &Args, client: &Client) -> anyhow::Result<()> {
    match (Place::parse(&args.from), Place::parse(&args.to)) {
        (Place::Here(from), Place::There { id, path }) => {
            let path = absolute(named(&path, from.file_name().and_then(|name| name.to_str())))?;
            let agent = session::agent(client, &id).await?;
            let copied = tokio::task::spawn_blocking(move || put(agent, &from, path));
            copied.await?
        }
        (Place::There { id, path }, Place::Here(to)) => {
            let path = absolute(path)?;
            let name = Path::new(&path).file_name().context("name a file of the guest")?.to_owned();
            let to = if to.is_dir() { to.join(name) } else { to };
            let agent = session::agent(client, &id).await?;
            tokio::task::spawn_blocking(move || get(agent, &path, &to)).await?
        }
        _ => bail!("one of the two must be a file here, the other ID:/PATH in an instance"),
    }
}

/// A path that ends with a slash, and the name that belongs there.
fn named(path: &str, name: Option<&str>) -> String {
    match name {
        Some(name) if path.ends_with('/') => format!("{path}{name}"),
        _ => path.to_owned(),
    }
}

fn absolute(path: String) -> anyhow::Result<String> {
    if !path.starts_with('/') {
        bail!("{path:?}: a path in an instance must be absolute, as in ID:/etc/motd");
    }
    Ok(path)
}

fn put(mut agent: Agent, from: &Path, path: String) -> anyhow::Result<()> {
    let open = || -> std::io::Result<_> {
        let file = File::open(from)?;
        let meta = file.metadata()?;
        Ok((file, meta))
    };
    let (file, meta) = open().with_context(|| format!("cannot read {}", from.display()))?;
    if !meta.is_file() {
        bail!(
            "{} is no file: copy directories with `tar c DIR | pulau instance exec ID -- tar x`",
            from.display()
        );
    }
    let mode = meta.permissions().mode() & 0o777;
    let request = CopyIn { path, size: meta.len(), mode, owner: None, parents: true, sync: false };
    // However long it takes.
    agent.set_deadline(None)?;
    Ok(agent.copy_in(&request, file)?)
}

fn get(mut agent: Agent, path: &str, to: &Path) -> anyhow::Result<()> {
    let cannot = || format!("cannot write {}", to.display());
    let dir = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(cannot)?;
    agent.set_deadline(None)?;
    let info = agent.copy_out(path, &mut file)?;
    file.flush().with_context(cannot)?;
    let mode = std::fs::Permissions::from_mode(info.mode & 0o777);
    file.as_file().set_permissions(mode).with_context(cannot)?;
    file.persist(to).with_context(cannot)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        let there = |path: &str| Place::There { id: "i-0123456789abcdef0".into(), path: path.into() };
        assert_eq!(Place::parse("i-0123456789abcdef0:/etc/motd"), there("/etc/motd"));
        assert_eq!(Place::parse("i-0123456789abcdef0"), Place::Here("i-0123456789abcdef0".into()));
        assert_eq!(Place::parse("./a:b"), Place::Here("./a:b".into()));
        assert_eq!(named("/etc/", Some("x")), "/etc/x");
        assert_eq!(named("/etc/y", Some("x")), "/etc/y");
        assert!(absolute("etc".into()).is_err());
    }
}
