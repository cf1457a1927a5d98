//! TLS for the API: the daemon's certificate, which is read again when its files change, and what clients trust.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// Whoever has not shaken hands by then is let go.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// Handshakes at once.
const HANDSHAKES: usize = 256;
/// Between looks at whether the files have changed.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Where the daemon's certificate is.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate and those that sign it, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

impl Files {
    fn read(&self) -> anyhow::Result<CertifiedKey> {
        let certificates = CertificateDer::pem_file_iter(&self.certificate).and_then(Iterator::collect);
        let certificates: Vec<_> = certificates
            .with_context(|| format!("cannot read a certificate from {}", self.certificate.display()))?;
        let key = PrivateKeyDer::from_pem_file(&self.key);
        let key = key.with_context(|| format!("cannot read a private key from {}", self.key.display()))?;
        CertifiedKey::from_der(certificates, key, &default_provider()).with_context(|| {
            format!("{} and {} do not go together", self.certificate.display(), self.key.display())
        })
    }

    /// When they were changed last.
    fn changed(&self) -> [Option<SystemTime>; 2] {
        [&self.certificate, &self.key].map(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok())
    }
}

/// The certificate in use.
#[derive(Debug)]
pub struct Identity {
    files: Files,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Identity {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// They cannot be read, or do not go together.
    pub fn read(files: Files) -> anyhow::Result<Arc<Self>> {
        let current = RwLock::new(Arc::new(files.read()?));
        Ok(Arc::new(Identity { files, current }))
    }

    /// Reads the files again. What is wrong with them is logged, and the certificate before stays in use.
    pub fn read_again(&self) {
        match self.files.read() {
            Ok(read) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(read);
                tracing::info!("the TLS certificate was read again");
            }
            Err(error) => tracing::error!("the TLS certificate stays the one before: {error:#}"),
        }
    }

    /// Reads them again whenever they have changed.
    pub async fn follow(self: Arc<Self>) {
        let mut seen = self.files.changed();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let changed = self.files.changed();
            if changed != seen {
                seen = changed;
                self.read_again();
            }
        }
    }
}

impl ResolvesServerCert for Identity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// Connections whose handshake is done.
pub struct Listener {
    ready: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
}

impl Listener {
    /// Speaks TLS with whoever connects.
    ///
    /// # Errors
    ///
    /// The listener has no address.
    pub fn new(tcp: TcpListener, identity: Arc<Identity>) -> anyhow::Result<Self> {
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(identity);
        let address = tcp.local_addr()?;
        let (sender, ready) = mpsc::channel(HANDSHAKES);
        tokio::spawn(shake_hands(tcp, TlsAcceptor::from(Arc::new(config)), sender));
        Ok(Listener { ready, address })
    }
}

/// Shakes hands with everybody at once, so that nobody waits for one who is slow.
async fn shake_hands(
    mut tcp: TcpListener,
    acceptor: TlsAcceptor,
    ready: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let room = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        let (stream, address) = tokio::select! {
            accepted = axum::serve::Listener::accept(&mut tcp) => accepted,
            () = ready.closed() => return,
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            let _permit = permit;
            match timeout(HANDSHAKE_WITHIN, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => _ = ready.send((stream, address)).await,
                Ok(Err(error)) => tracing::debug!(%address, "no TLS: {error}"),
                Err(_) => tracing::debug!(%address, "it does not shake hands"),
            }
        });
    }
}

impl axum::serve::Listener for Listener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // Nobody is let in any more.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}

/// What a client trusts: the certificates in a file, or else those the system trusts.
///
/// # Errors
///
/// The file has none.
pub fn client(ca: Option<&Path>) -> anyhow::Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            let context = || format!("cannot read certificates from {}", path.display());
            for certificate in CertificateDer::pem_file_iter(path).with_context(context)? {
                roots.add(certificate.with_context(context)?).with_context(context)?;
            }
            anyhow::ensure!(!roots.is_empty(), "there is no certificate in {}", path.display());
        }
        None => _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
    }
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()));
    let config = config.with_safe_default_protocol_versions()?.with_root_certificates(roots);
    Ok(Arc::new(config.with_no_client_auth()))
}
