//! The daemon: puts the parts together, listens, and lets go of everything in order when told to end.
//!
//! The microVMs are not its children in any way that matters: when it ends, by a signal or otherwise, they run
//! on, and the next daemon on the same data directory adopts them.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::{Extension, Router};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::balancer::Balancers;
use crate::groups::{Groups, Pace};
use crate::http::{self, Api, Door};
use crate::image::{self, Images};
use crate::instances::{Host, Limits, Service, TAP_PREFIX, Wiring, network_plan};
use crate::microvm::Machines;
use crate::network::{self, Fabric};
use crate::records::Records;
use crate::store::Embedded;
use crate::tls;
use crate::volume::Volumes;

/// Requests under way when the daemon ends get so long.
const LAST_REQUESTS: Duration = Duration::from_secs(5);
/// Bytes of the data directory's file system that are never filled.
const DISK_RESERVE: u64 = 512 << 20;

/// What the daemon is told.
#[derive(Clone, Debug)]
pub struct Config {
    pub data_dir: PathBuf,
    /// Where local clients connect.
    pub socket: PathBuf,
    /// Where others do, with tokens.
    pub listen: Option<SocketAddr>,
    /// With TLS, if there is a certificate.
    pub tls: Option<tls::Files>,
    pub limits: Limits,
    pub machines: Machines,
    /// `pulau-agent`, for images made of container images.
    pub agent: Option<PathBuf>,
    /// Whether instances get a network.
    pub connected: bool,
    pub jailed: bool,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
///
/// Something it needs cannot be had; the message says what.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let identity = config.tls.clone().map(tls::Identity::read).transpose()?;
    if let Some(address) = config.listen.filter(|address| identity.is_none() && !address.ip().is_loopback()) {
        anyhow::bail!(
            "--listen {address} would send tokens over the network for all to read: give --tls-cert and --tls-key, or \
             listen on a loopback address, behind a proxy that speaks TLS or for those who come by SSH"
        );
    }
    let service = start(&config).await?;
    let groups = Groups::start(service.clone(), Pace::default());
    let balancers = Balancers::start(service.clone());
    let api = Api::new(service.clone(), groups.clone(), balancers.clone());
    let router = http::router(api.clone());

    let (end, ended) = watch::channel(false);
    let unix = bind_socket(&config.socket).await?;
    let mut servers = vec![tokio::spawn(serve_unix(unix, router.clone(), ended.clone()))];
    if let Some(address) = config.listen {
        let tcp = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let address = tcp.local_addr()?;
        match &identity {
            Some(identity) => {
                let listener = tls::Listener::new(tcp, identity.clone())?;
                tracing::info!("listening on https://{address}");
                tokio::spawn(identity.clone().follow());
                servers.push(tokio::spawn(serve_tcp(listener, router, ended)));
            }
            None => {
                tracing::info!("listening on http://{address}");
                servers.push(tokio::spawn(serve_tcp(tcp, router, ended)));
            }
        }
    }
    tracing::info!("listening on {}", config.socket.display());
    tell_manager("READY=1");

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => if let Some(identity) = &identity {
                identity.read_again();
            },
        }
    }
    tracing::info!("ending; instances run on");
    tell_manager("STOPPING=1");
    end.send_replace(true);
    api.end_streams();
    let finish = async {
        for server in servers {
            let _ = server.await;
        }
    };
    let _ = tokio::time::timeout(LAST_REQUESTS, finish).await;
    groups.let_go();
    balancers.let_go();
    service.let_go().await;
    let _ = std::fs::remove_file(&config.socket);
    Ok(())
}

/// The services over what is in the data directory.
async fn start(config: &Config) -> anyhow::Result<Service> {
    let data_dir = &config.data_dir;
    let logs = data_dir.join("logs");
    for dir in [data_dir, &logs] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    std::fs::set_permissions(&logs, std::fs::Permissions::from_mode(0o700))?;
    let store = Embedded::open(&data_dir.join("store.redb"))?;
    let records = Records::open(Arc::new(store)).await?;
    let wiring = if config.connected {
        let plan = network_plan(&records.read());
        let network = network::Config { prefix: TAP_PREFIX.to_owned(), ..Default::default() };
        Wiring::Host(Fabric::start(network, plan).await.context("the network of instances")?)
    } else {
        Wiring::Unconnected
    };
    let host = Host {
        records,
        machines: config.machines.clone(),
        wiring,
        images: Images::open(data_dir, image::Limits::default(), DISK_RESERVE)?,
        volumes: Volumes::open(data_dir, DISK_RESERVE)?,
        agent: config.agent.clone(),
        limits: Arc::new(config.limits.clone()),
        logs,
        jailed: config.jailed,
    };
    Ok(Service::open(host).await?)
}

/// Listens where local clients look, in place of a daemon that died.
async fn bind_socket(path: &Path) -> anyhow::Result<UnixListener> {
    let context = || format!("cannot listen on {}", path.display());
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(context)?;
    }
    match UnixStream::connect(path).await {
        Ok(_) => anyhow::bail!("{}: a daemon is listening there already", context()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(context)?;
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).with_context(context)?;
    // Whoever can write to it may do everything.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(context)?;
    Ok(listener)
}

async fn serve_unix(listener: UnixListener, router: Router, ended: watch::Receiver<bool>) {
    let router = router.layer(Extension(Door::UnixSocket));
    let served = axum::serve(listener, router).with_graceful_shutdown(until(ended)).await;
    if let Err(error) = served {
        tracing::error!("the Unix socket is not served any more: {error}");
    }
}

async fn serve_tcp<L>(listener: L, router: Router, ended: watch::Receiver<bool>)
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    let router = router.layer(Extension(Door::Tcp));
    let served = axum::serve(listener, router).with_graceful_shutdown(until(ended)).await;
    if let Err(error) = served {
        tracing::error!("TCP is not served any more: {error}");
    }
}

async fn until(mut ended: watch::Receiver<bool>) {
    let _ = ended.wait_for(|ended| *ended).await;
}

/// Tells the service manager, if there is one (sd_notify(3)).
fn tell_manager(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = std::os::unix::net::UnixDatagram::unbound()
        .and_then(|socket| socket.send_to(state.as_bytes(), PathBuf::from(path)));
    if let Err(error) = told {
        tracing::warn!("cannot tell the service manager: {error}");
    }
}
