//! `pulau instance console`

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;

use anyhow::Context as _;
use http_body_util::BodyExt as _;
use tokio::sync::oneshot;

use super::path;
use crate::cli::microvm::escape::copy_typed;
use crate::cli::microvm::terminal::{self, RawMode};
use crate::cli::print;
use crate::client::Client;
use crate::http::CONSOLE;

/// Show what an instance wrote to its console, or attach to it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  pulau instance console i-0123456789abcdef0
  pulau instance console i-0123456789abcdef0 --follow
  pulau instance console i-0123456789abcdef0 --attach")]
pub struct Args {
    /// Id of an instance.
    id: String,
    /// Read and type, as at a serial line; one at a time can. `~.` at the beginning of a line leaves.
    #[arg(long, short, conflicts_with = "follow")]
    attach: bool,
    /// Go on with what comes, until Ctrl-C. Any number can.
    #[arg(long, short)]
    follow: bool,
}

pub async fn run(args: &Args, client: &Client) -> anyhow::Result<()> {
    if args.attach {
        return attach(&args.id, client).await;
    }
    if args.follow {
        return follow(&args.id, client).await;
    }
    print(&client.text(&format!("{}/console", path(&args.id))).await?)
}

async fn follow(id: &str, client: &Client) -> anyhow::Result<()> {
    let mut console = client.stream(&format!("{}/console?follow=true", path(id))).await?;
    while let Some(frame) = console.frame().await {
        let frame = frame.context("the daemon broke off")?;
        let mut output = io::stdout().lock();
        output.write_all(frame.data_ref().map_or(&[], |data| data))?;
        output.flush()?;
    }
    Ok(())
}

async fn attach(id: &str, client: &Client) -> anyhow::Result<()> {
    let stream = client.upgrade(&format!("{}/console/attach", path(id)), CONSOLE).await?;
    let typed = stream.try_clone()?;
    let interactive = terminal::is_interactive();
    if interactive {
        eprintln!("pulau: attached to the console of {id}; `~.` at the beginning of a line leaves");
    }
    let raw = interactive.then(RawMode::enter).transpose().context("the terminal")?;
    let (left, mut has_left) = oneshot::channel();
    // Left behind at the end: it waits in a read that may never return.
    let left = interactive.then_some(left);
    std::thread::spawn(move || copy_typed(left, |bytes| (&typed).write_all(bytes)));
    let mut shown = tokio::task::spawn_blocking(move || show(stream));
    let mut may_leave = interactive;
    let result = loop {
        tokio::select! {
            result = &mut shown => break result?.context("the console"),
            result = &mut has_left, if may_leave => match result {
                Ok(()) => break Ok(()),
                Err(_) => may_leave = false, // Standard input has ended.
            },
        }
    };
    drop(raw);
    result
}

fn show(mut console: UnixStream) -> io::Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        let length = console.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        let mut output = io::stdout().lock();
        output.write_all(&buffer[..length])?;
        output.flush()?;
    }
}
