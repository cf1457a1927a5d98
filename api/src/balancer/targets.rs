//! The targets of one load balancer, as those who hand connections on see them: who is healthy, who has how
//! much to do, and who is to be let go of.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

use crate::model::{Algorithm, LoadBalancer, TargetState};

/// One target.
#[derive(Debug)]
pub struct Backend {
    pub instance: String,
    pub address: SocketAddr,
    /// Requests or connections under way.
    active: AtomicUsize,
    /// What is under way is to end at once.
    cut: watch::Sender<bool>,
}

/// A target that something is under way to; until it is dropped.
#[derive(Debug)]
pub struct Lease {
    backend: Arc<Backend>,
    cut: watch::Receiver<bool>,
}

impl Lease {
    pub fn address(&self) -> SocketAddr {
        self.backend.address
    }

    /// The target is taken away for good: nothing goes on with it.
    pub async fn cut(&mut self) {
        if self.cut.wait_for(|cut| *cut).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.backend.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a load balancer has done.
#[derive(Debug, Default)]
pub struct Counts {
    pub connections: AtomicU64,
    /// Clients' connections that are open now.
    pub open: AtomicU64,
    pub requests: AtomicU64,
    /// Requests and connections that no target took.
    pub refused: AtomicU64,
    /// Tries after a first one that failed.
    pub retries: AtomicU64,
}

/// All targets.
#[derive(Debug, Default)]
pub struct Targets {
    /// Those that may be chosen.
    healthy: RwLock<Vec<Arc<Backend>>>,
    all: RwLock<Vec<Arc<Backend>>>,
    turn: AtomicUsize,
    pub counts: Counts,
}

impl Targets {
    /// Takes over what the record says. What is under way to a target that is gone is cut.
    pub fn set(&self, balancer: &LoadBalancer) {
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *all);
        let mut healthy = Vec::new();
        for target in &balancer.targets {
            let address = SocketAddr::new(target.address.into(), balancer.target_port);
            let same =
                |known: &&Arc<Backend>| known.instance == target.instance_id && known.address == address;
            let backend = before.iter().find(same).cloned().unwrap_or_else(|| {
                let (active, cut) = (AtomicUsize::new(0), watch::Sender::new(false));
                Arc::new(Backend { instance: target.instance_id.clone(), address, active, cut })
            });
            if target.state == TargetState::Healthy {
                healthy.push(backend.clone());
            }
            all.push(backend);
        }
        *self.healthy.write().unwrap_or_else(PoisonError::into_inner) = healthy;
        for gone in before.iter().filter(|known| !all.iter().any(|other| Arc::ptr_eq(other, known))) {
            gone.cut.send_replace(true);
        }
    }

    /// There are none any more.
    pub fn clear(&self) {
        self.healthy.write().unwrap_or_else(PoisonError::into_inner).clear();
        let gone = std::mem::take(&mut *self.all.write().unwrap_or_else(PoisonError::into_inner));
        gone.iter().for_each(|backend| _ = backend.cut.send_replace(true));
    }

    /// A healthy target that is none of those that were tried.
    pub fn choose(&self, algorithm: Algorithm, tried: &[SocketAddr]) -> Option<Lease> {
        let healthy = self.healthy.read().unwrap_or_else(PoisonError::into_inner);
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..healthy.len()).filter_map(|index| {
            let index = turn.wrapping_add(index).checked_rem(healthy.len())?;
            healthy.get(index).filter(|backend| !tried.contains(&backend.address))
        });
        let mut in_turn = in_turn;
        let backend = match algorithm {
            Algorithm::RoundRobin => in_turn.next(),
            Algorithm::LeastConnections => {
                in_turn.min_by_key(|backend| backend.active.load(Ordering::Acquire))
            }
        }?;
        // Under the lock: whoever takes the target out of the healthy ones afterwards sees this.
        backend.active.fetch_add(1, Ordering::AcqRel);
        Some(Lease { backend: backend.clone(), cut: backend.cut.subscribe() })
    }

    /// Requests or connections under way to an instance.
    pub fn active(&self, instance: &str) -> usize {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        let own = all.iter().filter(|backend| backend.instance == instance);
        own.map(|backend| backend.active.load(Ordering::Acquire)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balancer(states: &[TargetState]) -> LoadBalancer {
        let targets: Vec<_> = (0..)
            .zip(states)
            .map(|(index, state)| {
                serde_json::json!({"instance_id": format!("i-{index}"), "address": format!("10.0.0.{index}"),
                    "state": state, "since": "2026-01-01T00:00:00Z"})
            })
            .collect();
        let record = serde_json::json!({"id": "lb-1", "name": "web", "created": "2026-01-01T00:00:00Z",
            "state": "active", "protocol": "tcp", "listen": "127.0.0.1:80", "target_port": 80, "health_check": {},
            "deregistration_delay_seconds": 1, "max_connections": 1, "targets": targets});
        serde_json::from_value(record).unwrap()
    }

    fn instance(lease: &Option<Lease>) -> &str {
        &lease.as_ref().unwrap().backend.instance
    }

    #[tokio::test]
    async fn only_healthy_ones_are_chosen_each_in_turn() {
        use TargetState::{Draining, Healthy, Initial, Unhealthy};
        let targets = Targets::default();
        assert!(targets.choose(Algorithm::RoundRobin, &[]).is_none());
        targets.set(&balancer(&[Healthy, Initial, Healthy, Unhealthy, Draining]));
        let chosen: Vec<_> = (0..4).map(|_| targets.choose(Algorithm::RoundRobin, &[])).collect();
        assert_eq!(chosen.iter().map(instance).collect::<Vec<_>>(), ["i-2", "i-0", "i-2", "i-0"]);
        assert_eq!((targets.active("i-0"), targets.active("i-1"), targets.active("i-2")), (2, 0, 2));
        let other = targets.choose(Algorithm::RoundRobin, &["10.0.0.0:80".parse().unwrap()]);
        assert_eq!(instance(&other), "i-2");
        assert_eq!(instance(&targets.choose(Algorithm::LeastConnections, &[])), "i-0");
        drop((chosen, other));
        assert_eq!(targets.active("i-2"), 0);
        // What is under way to a target goes on while it drains, and ends with it.
        let mut lease =
            targets.choose(Algorithm::LeastConnections, &["10.0.0.2:80".parse().unwrap()]).unwrap();
        targets.set(&balancer(&[Draining, Initial, Healthy]));
        assert_eq!(
            (targets.active("i-0"), instance(&targets.choose(Algorithm::RoundRobin, &[]))),
            (1, "i-2")
        );
        let waited = tokio::time::timeout(std::time::Duration::from_millis(5), lease.cut()).await;
        assert!(waited.is_err());
        targets.set(&balancer(&[]));
        lease.cut().await;
    }
}
