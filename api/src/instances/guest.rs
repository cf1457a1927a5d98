//! What goes on inside an instance's guest: its console, commands run by its agent; and waiting for it.

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pulau_agent_protocol::client::Output;
use pulau_agent_protocol::message::ExecRequest;
use tokio::net::UnixStream;

use super::error::Error;
use super::{Service, find, launch};
use crate::model::{Check, Desired, Instance, InstanceState, Kind};

/// How much of a console is shown.
const CONSOLE_TAIL: u64 = 64 * 1024;
/// Output of a command that is kept, each stream.
const OUTPUT: usize = 1 << 20;

impl Service {
    /// Waits until an instance is in a state (and its agent answers).
    ///
    /// # Errors
    ///
    /// There is no such instance (any more), or it will not come there unless it is asked to.
    pub async fn wait(&self, id: &str, state: InstanceState, agent: bool) -> Result<Arc<Instance>, Error> {
        let mut changes = self.host.records.subscribe();
        loop {
            let instance = self.get(id)?;
            let there = instance.state == state && (!agent || instance.status.agent == Check::Ok);
            if there {
                return Ok(instance);
            }
            let comes = match state {
                InstanceState::Pending | InstanceState::Running => Desired::Running,
                InstanceState::Stopping | InstanceState::Stopped => Desired::Stopped,
                InstanceState::ShuttingDown | InstanceState::Terminated => Desired::Terminated,
            };
            let settled = matches!(instance.state, InstanceState::Stopped | InstanceState::Terminated);
            if settled && instance.desired != comes {
                let why = instance.state_reason.as_ref().map(|why| format!(": {}", why.message));
                return Err(Error::State {
                    kind: Kind::Instance,
                    id: id.to_owned(),
                    state: format!("{}{}", instance.state.name(), why.unwrap_or_default()),
                    needed: "it will not come to the state that is waited for unless it is asked to",
                });
            }
            // Others' changes wake us, too; looking again costs little.
            let _ = changes.recv().await;
        }
    }

    /// The file an instance's console is kept in; it may not be there yet.
    ///
    /// # Errors
    ///
    /// There is no such instance.
    pub fn console_log(&self, id: &str) -> Result<PathBuf, Error> {
        find::instance(&self.host.records.read(), id)?;
        Ok(launch::console_log(&self.host, id).path)
    }

    /// The end of what an instance wrote to its console.
    ///
    /// # Errors
    ///
    /// There is no such instance.
    pub async fn console(&self, id: &str) -> Result<String, Error> {
        let path = self.console_log(id)?;
        let read = tokio::task::spawn_blocking(move || -> std::io::Result<Vec<u8>> {
            let mut file = match std::fs::File::open(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                file => file?,
            };
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE_TAIL)))?;
            let mut text = Vec::new();
            file.take(CONSOLE_TAIL).read_to_end(&mut text)?;
            Ok(text)
        });
        let text = read.await?;
        let text = text.map_err(|error| Error::Internal(format!("console of {id}: {error}")))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Runs a command in a guest and waits for it. With what it wrote, whether that was more than is kept.
    ///
    /// # Errors
    ///
    /// The instance does not run, its agent does not answer, or the command cannot be run or takes too long.
    pub async fn exec(
        &self,
        id: &str,
        argv: Vec<String>,
        stdin: String,
        user: Option<String>,
        limit: Duration,
    ) -> Result<(Output, bool), Error> {
        let vm = self.machine(id)?;
        let problem = |problem: String| Error::Guest { id: id.to_owned(), problem };
        let run = async {
            let agent = vm.agent(limit).await.map_err(|error| problem(error.to_string()))?;
            let request = ExecRequest { argv, user, stdin: !stdin.is_empty(), ..Default::default() };
            let run = tokio::task::spawn_blocking(move || agent.output(&request, stdin.as_bytes()));
            let output = run.await?;
            output.map_err(|error| problem(error.to_string()))
        };
        let limited = tokio::time::timeout(limit, run).await;
        let mut output = limited.map_err(|_| Error::Timeout(limit.as_secs()))??;
        let truncated = output.stdout.len() > OUTPUT || output.stderr.len() > OUTPUT;
        output.stdout.truncate(OUTPUT);
        output.stderr.truncate(OUTPUT);
        Ok((output, truncated))
    }

    /// A connection to the agent in a guest, for somebody who speaks its protocol: nothing has been said on it.
    ///
    /// # Errors
    ///
    /// The instance does not run, or its agent does not answer.
    pub async fn agent_stream(&self, id: &str, limit: Duration) -> Result<UnixStream, Error> {
        let stream = self.machine(id)?.agent_stream(limit).await;
        stream.map_err(|error| Error::Guest { id: id.to_owned(), problem: error.to_string() })
    }

    /// The serial console of a guest, to read and to type.
    ///
    /// # Errors
    ///
    /// The instance does not run, or its console is not to be had.
    pub async fn attach_console(&self, id: &str) -> Result<UnixStream, Error> {
        let stream = self.machine(id)?.attach_console().await;
        stream.map_err(|error| Error::Guest { id: id.to_owned(), problem: error.to_string() })
    }
}
