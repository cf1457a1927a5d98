//! The host manager's memory of everything: typed records over the store, all of them in memory.
//!
//! The data's way is a circle. A change is a transaction on the store; the store's watch brings it back,
//! here or on another host, and only then is it in the [`Tables`] that everybody reads. Who changes
//! something waits for that, so that it reads its own writes. Readers never touch the disk.
//!
//! ```text
//!   update / modify ──▶ Store::commit ──▶ durable ──▶ Watch ──▶ Tables ──▶ readers
//!          ▲                                                │
//!          └──────────── waits for the revision ────────────┴──▶ subscribers (drivers, events)
//! ```
//!
//! - [`Records::modify`] changes one record, as often as it takes until nobody came in between.
//! - [`Records::update`] is for decisions that look at many records, such as the choice of a free address:
//!   those are taken one at a time.

mod tables;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use tokio::sync::{Mutex, broadcast, watch};

use crate::fault;
use crate::store::{Change, Compare, Op, Revision, Store, StoreError, Txn};

pub use tables::{AnyRecord, Record, RecordChange, Table, Tables, Token};

/// Changes a subscriber may be behind.
const SUBSCRIBERS_LAG: usize = 4096;
/// Tries of [`Records::modify`]. Whoever loses that often fights a program.
const TRIES: usize = 32;

/// See the module's text. Clones are the same.
#[derive(Clone)]
pub struct Records {
    store: Arc<dyn Store>,
    shared: Arc<Shared>,
    /// How far the tables are.
    reached: watch::Receiver<Revision>,
}

struct Shared {
    tables: RwLock<Tables>,
    decisions: Mutex<()>,
    changes: broadcast::Sender<RecordChange>,
}

/// What a decision wants written. Each record read for it is compared when it is written.
#[derive(Debug, Default)]
pub struct Changes(Txn);

impl Changes {
    /// Writes a record that must not exist yet.
    pub fn create<R: Record>(&mut self, record: &R) {
        self.0.compares.push(Compare::Absent(record.key()));
        self.put(record);
    }

    /// Writes a record over the one that was read.
    pub fn replace<R: Record>(&mut self, tables: &Tables, record: &R) {
        self.expect_unchanged::<R>(tables, record.id());
        self.put(record);
    }

    /// Removes a record that was read.
    pub fn delete<R: Record>(&mut self, tables: &Tables, id: &str) {
        self.expect_unchanged::<R>(tables, id);
        self.0.ops.push(Op::Delete { key: tables::key::<R>(id) });
    }

    /// Has the decision fail to be written if the record has changed since it was read.
    pub fn expect_unchanged<R: Record>(&mut self, tables: &Tables, id: &str) {
        let key = tables::key::<R>(id);
        self.0.compares.push(match R::table(tables).revision(id) {
            Some(revision) => Compare::Modified(key, revision),
            None => Compare::Absent(key),
        });
    }

    fn put<R: Record>(&mut self, record: &R) {
        self.0.ops.push(Op::Put { key: record.key(), value: record.encode() });
    }
}

impl Records {
    /// Reads everything there is in `store`, and follows it from then on.
    ///
    /// # Errors
    ///
    /// The store cannot be read, or holds a record that this version does not understand.
    pub async fn open(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let (tables, revision) = load(&*store).await?;
        let watch = store.watch("", revision).await?;
        let (reached_sender, reached) = watch::channel(revision);
        let shared = Arc::new(Shared {
            tables: RwLock::new(tables),
            decisions: Mutex::new(()),
            changes: broadcast::Sender::new(SUBSCRIBERS_LAG),
        });
        tokio::spawn(follow(store.clone(), shared.clone(), watch, reached_sender));
        Ok(Records { store, shared, reached })
    }

    /// Everything, as it is now. Not to be held across an await.
    pub fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.shared.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The revision that everything read is of, at least.
    pub fn revision(&self) -> Revision {
        *self.reached.borrow()
    }

    /// The record, if there is one.
    pub fn get<R: Record>(&self, id: &str) -> Option<Arc<R>> {
        R::table(&self.read()).get(id).cloned()
    }

    /// Tells every change from now on. One who is too slow gets `Lagged`, and must read everything again.
    pub fn subscribe(&self) -> broadcast::Receiver<RecordChange> {
        self.shared.changes.subscribe()
    }

    /// Takes a decision: `decide` reads the tables and says what is to be written. Decisions are taken one at
    /// a time; what `decide` read and compared is what holds when its changes are written.
    ///
    /// # Errors
    ///
    /// Those of `decide`, and of the store.
    pub async fn update<T, E: From<StoreError>>(
        &self,
        mut decide: impl FnMut(&Tables, &mut Changes) -> Result<T, E>,
    ) -> Result<T, E> {
        let _one_at_a_time = self.shared.decisions.lock().await;
        for _ in 0..TRIES {
            let mut changes = Changes::default();
            let result = decide(&self.read(), &mut changes)?;
            match self.commit(changes.0).await {
                Ok(()) => return Ok(result),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(StoreError::Conflict.into())
    }

    /// Changes one record. `change` may be called several times, and may leave it as it is.
    ///
    /// Returns the record as it is afterwards; None if there is no such record (any more).
    ///
    /// # Errors
    ///
    /// Those of `change`, and of the store.
    pub async fn modify<R: Record, E: From<StoreError>>(
        &self,
        id: &str,
        mut change: impl FnMut(&mut R) -> Result<(), E>,
    ) -> Result<Option<Arc<R>>, E> {
        for _ in 0..TRIES {
            let Some((before, revision)) = R::table(&self.read()).versioned(id) else { return Ok(None) };
            let mut after = (*before).clone();
            change(&mut after)?;
            if after == *before {
                return Ok(Some(before));
            }
            let compares = vec![Compare::Modified(tables::key::<R>(id), revision)];
            let ops = vec![Op::Put { key: after.key(), value: after.encode() }];
            match self.commit(Txn { compares, ops }).await {
                Ok(()) => return Ok(Some(Arc::new(after))),
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(StoreError::Conflict.into())
    }

    /// Writes, and waits until it is to be read.
    async fn commit(&self, txn: Txn) -> Result<(), StoreError> {
        if txn.ops.is_empty() {
            return Ok(());
        }
        fault::point("records.decided");
        let result = self.store.commit(txn).await;
        fault::point("records.committed");
        let mut reached = self.reached.clone();
        match result {
            Ok(revision) => {
                let gone = |_| StoreError::Unavailable("it is no longer followed".into());
                reached.wait_for(|reached| *reached >= revision).await.map(|_| ()).map_err(gone)
            }
            Err(StoreError::Conflict) => {
                // Somebody else's change is on its way here; it is worth a moment.
                let _ = tokio::time::timeout(std::time::Duration::from_millis(10), reached.changed()).await;
                Err(StoreError::Conflict)
            }
            Err(error) => Err(error),
        }
    }
}

async fn load(store: &dyn Store) -> Result<(Tables, Revision), StoreError> {
    let (entries, revision) = store.range("").await?;
    let mut tables = Tables::default();
    for entry in entries {
        let key = entry.key.clone();
        let change = Change { key: entry.key.clone(), revision: entry.modified, entry: Some(entry) };
        tables.apply(change).map_err(|problem| StoreError::Unavailable(format!("{key}: {problem}")))?;
    }
    Ok((tables, revision))
}

/// Brings the store's changes into the tables, as long as there is a store and somebody to read them.
async fn follow(
    store: Arc<dyn Store>,
    shared: Arc<Shared>,
    mut watch: crate::store::Watch,
    reached: watch::Sender<Revision>,
) {
    loop {
        let next = tokio::select! {
            next = watch.next() => next,
            () = reached.closed() => return, // Nobody reads any more.
        };
        match next {
            Ok(changes) => {
                let revision = changes.first().map_or(0, |change| change.revision);
                shared.apply(changes);
                reached.send_replace(revision);
            }
            Err(StoreError::Compacted) => match reload(&*store, &shared).await {
                Ok((new, revision)) => {
                    watch = new;
                    reached.send_replace(revision);
                }
                Err(error) => {
                    tracing::error!("cannot read the store again: {error}");
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                }
            },
            Err(error) => {
                tracing::debug!("the store is not followed any more: {error}");
                return;
            }
        }
    }
}

/// Reads everything again. Subscribers are told what is different.
async fn reload(store: &dyn Store, shared: &Shared) -> Result<(crate::store::Watch, Revision), StoreError> {
    let (tables, revision) = load(store).await?;
    let watch = store.watch("", revision).await?;
    let old = std::mem::replace(
        &mut *shared.tables.write().unwrap_or_else(PoisonError::into_inner),
        tables.clone(),
    );
    for change in tables.differences(&old) {
        let _ = shared.changes.send(change);
    }
    Ok((watch, revision))
}

impl Shared {
    fn apply(&self, changes: Vec<Change>) {
        let mut applied = Vec::with_capacity(changes.len());
        {
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            for change in changes {
                let key = change.key.clone();
                match tables.apply(change) {
                    Ok(change) => applied.extend(change),
                    Err(problem) => tracing::error!(key, "a record cannot be understood: {problem}"),
                }
            }
        }
        for change in applied {
            // Nobody may be listening.
            let _ = self.changes.send(change);
        }
    }
}

#[cfg(test)]
mod tests;
