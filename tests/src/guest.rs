//! The guest, reached through its agent.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use pulau_agent_protocol::client::{Connection, connect};
use pulau_agent_protocol::message::{ExecRequest, ExitStatus};

use crate::PATIENCE;
use crate::vmm::Vmm;

impl Vmm {
    /// A connection to the guest's agent, once it is there.
    #[track_caller]
    pub fn agent(&self) -> Connection<UnixStream> {
        match connect(&self.path("vsock"), Instant::now() + PATIENCE) {
            Ok(connection) => connection,
            Err(e) => panic!("the guest's agent: {e}; console: {}", self.console()),
        }
    }

    /// Runs a shell command in the guest and returns its standard output; it must succeed.
    #[track_caller]
    pub fn sh(&self, command: &str) -> String {
        let (status, stdout, stderr) = self.try_sh(command);
        assert!(matches!(status, ExitStatus::Code(0)), "{command:?}: {status:?}, {stdout:?}, {stderr:?}");
        stdout
    }

    /// Runs a shell command that ends the guest, and with it the connection.
    pub fn sh_and_end(&self, command: &str) {
        let request =
            ExecRequest { argv: vec!["/bin/sh".into(), "-c".into(), command.into()], ..Default::default() };
        let _ = self.agent().output(&request, b"");
    }

    /// Runs a shell command in the guest.
    #[track_caller]
    pub fn try_sh(&self, command: &str) -> (ExitStatus, String, String) {
        let request =
            ExecRequest { argv: vec!["/bin/sh".into(), "-c".into(), command.into()], ..Default::default() };
        let output = match self.agent().output(&request, b"") {
            Ok(output) => output,
            Err(e) => panic!("{command:?} in the guest: {e}; console: {}", self.console()),
        };
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (output.status, text(output.stdout), text(output.stderr))
    }
}
