//! How a command finds the daemon.

use std::path::PathBuf;

use anyhow::bail;

use crate::client::{Client, Endpoint};
use crate::tls;

/// Where the daemon listens unless told otherwise: `/run/pulau/api.sock` for root, else in the user's data
/// directory.
pub fn default_socket() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return "/run/pulau/api.sock".into();
    }
    crate::default_data_dir().join("api.sock")
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "The daemon")]
pub struct Connection {
    /// The daemon's Unix socket.
    #[arg(long, global = true, value_name = "PATH", env = "PULAU_SOCKET")]
    socket: Option<PathBuf>,
    /// The daemon's address, as https://HOST:PORT, or http://HOST:PORT without TLS.
    #[arg(long, global = true, value_name = "URL", env = "PULAU_URL", conflicts_with = "socket")]
    url: Option<String>,
    /// Token for a daemon that is reached by --url.
    #[arg(long, global = true, value_name = "TOKEN", env = "PULAU_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Certificates that sign the daemon's, for https: PEM. Those the system trusts if not given.
    #[arg(long, global = true, value_name = "FILE", env = "PULAU_CA")]
    ca: Option<PathBuf>,
}

impl Connection {
    pub fn client(&self) -> anyhow::Result<Client> {
        let Some(url) = &self.url else {
            return Ok(Client(Endpoint::Socket(self.socket.clone().unwrap_or_else(default_socket))));
        };
        let (address, tls) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
            (Some(address), _) => (address, Some(tls::client(self.ca.as_deref())?)),
            (_, Some(address)) => (address, None),
            _ => bail!("--url: {url:?} is not of the form https://HOST:PORT or http://HOST:PORT"),
        };
        let address = address.trim_end_matches('/').to_owned();
        Ok(Client(Endpoint::Tcp { address, token: self.token.clone(), tls }))
    }

    /// Does `work` with a client.
    pub fn run<T, F: Future<Output = anyhow::Result<T>>>(
        &self,
        work: impl FnOnce(Client) -> F,
    ) -> anyhow::Result<T> {
        let client = self.client()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(work(client));
        runtime.shutdown_background();
        result
    }
}
