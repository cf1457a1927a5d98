//! Takes what comes in at a load balancer's port.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::targets::Targets;
use super::{http, tcp};
use crate::model::{Algorithm, BalancerProtocol};

/// After an error of the host's, such as too many open files.
const REST: Duration = Duration::from_millis(100);

/// What is done with connections; what can change is looked at for each new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    pub protocol: BalancerProtocol,
    pub algorithm: Algorithm,
}

/// Listens.
///
/// # Errors
///
/// Somebody else does, or the address is none of the host's.
pub async fn bind(at: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(at).await
}

/// Takes connections until `ended` says so. No more than `limit` are open; others wait to be taken.
pub async fn serve(
    listener: TcpListener,
    targets: Arc<Targets>,
    settings: watch::Receiver<Settings>,
    limit: Arc<Semaphore>,
    mut ended: watch::Receiver<bool>,
) {
    let pool = http::pool();
    loop {
        let accepted = async {
            // Never closed.
            let permit = limit.clone().acquire_owned().await.ok()?;
            Some((permit, listener.accept().await))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            _ = ended.wait_for(|ended| *ended) => return,
        };
        let Some((permit, accepted)) = accepted else { return };
        let (client, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("a connection to a load balancer cannot be taken: {error}");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        targets.counts.connections.fetch_add(1, Ordering::Relaxed);
        targets.counts.open.fetch_add(1, Ordering::Relaxed);
        let (open, settings, ended) = (targets.clone(), *settings.borrow(), ended.clone());
        let targets = targets.clone();
        let pool = pool.clone();
        tokio::spawn(async move {
            match settings.protocol {
                BalancerProtocol::Tcp => tcp::serve(client, &targets, settings.algorithm).await,
                BalancerProtocol::Http => {
                    http::serve(client, peer.ip(), targets, settings.algorithm, pool, ended).await
                }
            }
            open.counts.open.fetch_sub(1, Ordering::Relaxed);
            drop(permit);
        });
    }
}
