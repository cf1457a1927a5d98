//! The handle through which everybody changes the network: requests one after the other, none cut short.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::conntrack::Forgetting;
use super::definition::{Attachment, GroupDef, NetworkDef, Plan, Published};
use super::host::{Config, Host, NetworkError};
use super::route::Counters;

/// How often it is checked that the rules are still there: whoever restarts the host's firewall may flush them.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// How long after a guest has gone its connections are forgotten, with those of others that go meanwhile.
const FORGET_AFTER: Duration = Duration::from_millis(100);

/// The network of one daemon. Clones are the same one.
///
/// Every request is carried out by a thread that may block, to its end, even if who asked stops waiting. One
/// that fails leaves the network as it was, as far as the host permits; [`Fabric::reconcile`] mends the rest.
/// Each may be repeated.
///
/// When the last clone is dropped DHCP and DNS end; all else stays, so that guests keep their network while the
/// daemon is replaced.
#[derive(Clone, Debug)]
pub struct Fabric {
    host: Arc<Mutex<Host>>,
    /// Told when a guest has gone.
    gone: Arc<Notify>,
}

impl Fabric {
    /// Checks and sets up the host, and makes the network what `plan` says, out of whatever an earlier daemon
    /// left. What is right is not disturbed: connections of guests go on.
    ///
    /// # Errors
    ///
    /// The plan makes no sense, or the host lacks something; the error says what to do.
    pub async fn start(config: Config, plan: Plan) -> Result<Self, NetworkError> {
        let runtime = tokio::runtime::Handle::current();
        let start = move || -> Result<Host, NetworkError> {
            let mut host = Host::start(config, runtime)?;
            host.reconcile(&plan)?;
            Ok(host)
        };
        let host = blocking(start).await?;
        let connections = host.connections();
        let fabric = Self { host: Arc::new(Mutex::new(host)), gone: Arc::new(Notify::new()) };
        fabric.watch();
        fabric.forget(connections);
        Ok(fabric)
    }

    /// Makes the network what `plan` says, whatever the host has: removes what is left over, adds what lacks.
    ///
    /// # Errors
    ///
    /// As [`Fabric::start`].
    pub async fn reconcile(&self, plan: Plan) -> Result<(), NetworkError> {
        self.with(move |host| host.reconcile(&plan)).await
    }

    /// Adds a network, or changes whether it leads outside or its largest packet.
    ///
    /// # Errors
    ///
    /// It is malformed, or its subnet is in use on the host or by another network.
    pub async fn set_network(&self, network: NetworkDef) -> Result<(), NetworkError> {
        self.with(move |host| host.set_network(network)).await
    }

    /// Removes a network, if it is there.
    ///
    /// # Errors
    ///
    /// Something is attached to it.
    pub async fn remove_network(&self, id: &str) -> Result<(), NetworkError> {
        let id = id.to_owned();
        self.with(move |host| host.remove_network(&id)).await
    }

    /// Replaces all security groups. Connections that exist go on.
    ///
    /// # Errors
    ///
    /// One is malformed, or one that is left out is in use.
    pub async fn set_groups(&self, groups: Vec<GroupDef>) -> Result<(), NetworkError> {
        self.with(move |host| host.set_groups(groups)).await
    }

    /// Gives a guest its tap and its place in the network, or changes the place of one that has it.
    ///
    /// # Errors
    ///
    /// Its network or a group is not there, or its address is not to be had.
    pub async fn attach(&self, attachment: Attachment) -> Result<(), NetworkError> {
        let result = self.with(move |host| host.attach(attachment)).await;
        self.gone.notify_one();
        result
    }

    /// Removes a tap and all that belongs to it, if it is there. The VMM need not have ended.
    ///
    /// # Errors
    ///
    /// Those of the host.
    pub async fn detach(&self, tap: &str) -> Result<(), NetworkError> {
        let tap = tap.to_owned();
        let result = self.with(move |host| host.detach(&tap)).await;
        self.gone.notify_one();
        result
    }

    /// Has these ports of the host, and no others, lead to a guest of this address, past the guest's groups.
    /// Connections by ports that lead there no longer go on.
    ///
    /// # Errors
    ///
    /// A port leads elsewhere already, or to another address.
    pub async fn publish(&self, address: Ipv4Addr, ports: Vec<Published>) -> Result<(), NetworkError> {
        self.with(move |host| host.publish(address, &ports)).await
    }

    /// What has gone through each tap since it was made, by the tap's name.
    ///
    /// # Errors
    ///
    /// Those of the host.
    pub async fn counters(&self) -> Result<BTreeMap<String, Counters>, NetworkError> {
        self.with(Host::counters).await
    }

    /// Removes everything from the host, guests' taps included. For when Pulau leaves it.
    ///
    /// # Errors
    ///
    /// Those of the host.
    pub async fn clear(self) -> Result<(), NetworkError> {
        self.with(Host::clear).await
    }

    async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Host) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let host = self.host.clone();
        // Where a request panicked the plan is still whole: it is changed before the host is.
        blocking(move || work(&mut host.lock().unwrap_or_else(PoisonError::into_inner))).await
    }

    /// Puts the rules back when somebody removes them, until the last clone is dropped.
    fn watch(&self) {
        let host = Arc::downgrade(&self.host);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(CHECK_INTERVAL).await;
                let Some(host) = host.upgrade() else { return };
                let check = move || host.lock().unwrap_or_else(PoisonError::into_inner).mend();
                if let Err(error) = blocking(check).await {
                    tracing::error!(%error, "the guests' packet filter is gone and cannot be put back");
                }
            }
        });
    }

    /// Forgets the connections of guests that are gone, until the last clone is dropped.
    fn forget(&self, connections: Arc<Forgetting>) {
        let (host, gone) = (Arc::downgrade(&self.host), self.gone.clone());
        tokio::spawn(async move {
            while host.strong_count() > 0 {
                // It also ends when nobody is left to tell it that somebody has gone.
                let _ = tokio::time::timeout(CHECK_INTERVAL, gone.notified()).await;
                tokio::time::sleep(FORGET_AFTER).await;
                let connections = connections.clone();
                let catch_up = move || connections.catch_up();
                if let Ok(Err(error)) = tokio::task::spawn_blocking(catch_up).await {
                    tracing::error!(%error, "connections of guests that are gone stay known");
                }
            }
        });
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(NetworkError::Ending),
        },
    }
}
