//! Hands whole connections on.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::targets::{Lease, Targets};
use crate::model::Algorithm;

/// For a connection to a target.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// Connects to a target, and to another if that does not take the connection.
pub async fn serve(mut client: TcpStream, targets: &Targets, algorithm: Algorithm) {
    let mut tried: Vec<SocketAddr> = Vec::new();
    while let Some(mut lease) = targets.choose(algorithm, &tried) {
        if !tried.is_empty() {
            targets.counts.retries.fetch_add(1, Ordering::Relaxed);
        }
        match timeout(CONNECT_WITHIN, TcpStream::connect(lease.address())).await {
            Ok(Ok(server)) => return join(&mut client, server, &mut lease).await,
            _ => tried.push(lease.address()),
        }
    }
    targets.counts.refused.fetch_add(1, Ordering::Relaxed);
}

async fn join(client: &mut TcpStream, mut server: TcpStream, lease: &mut Lease) {
    // Small writes are not held back: both ends have decided on that themselves.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    tokio::select! {
        _ = tokio::io::copy_bidirectional(client, &mut server) => {}
        () = lease.cut() => {}
    }
}
