//! The store of a single host: a redb file, written by one thread.
//!
//! Transactions queue up for that thread. It takes all that wait, applies them one after the other, and
//! makes them durable by one sync: many clients cost hardly more than one. Reads go to redb directly and
//! never wait for a write.
//!
//! After an I/O error, such as a full disk, redb refuses to go on; the file is opened again then, as of
//! the last durable transaction.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;

use async_trait::async_trait;
use redb::{Database, ReadableDatabase, ReadableTable, Table, TableDefinition};
use tokio::sync::{mpsc, oneshot};

use super::feed::{Feed, Watch};
use super::{Change, Compare, Entry, Op, Revision, Store, StoreError, Txn};

/// Key to the revision that last wrote it (8 bytes, little endian) and its value.
const ENTRIES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("entries");
/// One key, `revision`.
const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");
const REVISION: &str = "revision";

/// Transactions that may wait; beyond that, writers wait to be let in.
const QUEUE: usize = 1024;
/// Transactions made durable by one sync, at most.
const BATCH: usize = 256;
/// Memory redb may use for pages; a host's whole state is smaller.
const CACHE_BYTES: usize = 32 << 20;

type Reply = oneshot::Sender<Result<Revision, StoreError>>;

/// See the module's text. Dropping it waits until what was committed is durable.
pub struct Embedded {
    shared: Arc<Shared>,
    queue: Option<mpsc::Sender<(Txn, Reply)>>,
    writer: Option<thread::JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    /// Absent only while it is opened again after an error.
    database: RwLock<Option<Database>>,
    feed: Feed,
}

impl Embedded {
    /// Opens the store at `path`, which is made if it does not exist.
    ///
    /// # Errors
    ///
    /// The file cannot be read or written, is no store, or another process has it open.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = open(path)?;
        let revision = prepare(&database)?;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            database: RwLock::new(Some(database)),
            feed: Feed::new(revision),
        });
        let (queue, transactions) = mpsc::channel(QUEUE);
        let writer = Writer { shared: shared.clone(), transactions, revision };
        let writer = thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run())
            .map_err(|error| StoreError::Unavailable(error.to_string()))?;
        Ok(Embedded { shared, queue: Some(queue), writer: Some(writer) })
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

#[async_trait]
impl Store for Embedded {
    async fn range(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError> {
        self.shared.read(|database| {
            let read = database.begin_read()?;
            let revision = read.open_table(META)?.get(REVISION)?.map_or(0, |revision| revision.value());
            let mut found = Vec::new();
            for entry in read.open_table(ENTRIES)?.range(prefix..)? {
                let (key, value) = entry?;
                if !key.value().starts_with(prefix) {
                    break;
                }
                found.extend(decode(key.value(), value.value()));
            }
            Ok((found, revision))
        })
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        let closed = || StoreError::Unavailable("its writer has ended".into());
        let (reply, answer) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or_else(closed)?;
        queue.send((txn, reply)).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        self.shared.feed.watch(prefix, after)
    }
}

impl Shared {
    fn read<T>(&self, read: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, StoreError> {
        let guard = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let database =
            guard.as_ref().ok_or_else(|| StoreError::Unavailable("it is being repaired".into()))?;
        read(database).map_err(unavailable)
    }
}

/// The one who writes.
struct Writer {
    shared: Arc<Shared>,
    transactions: mpsc::Receiver<(Txn, Reply)>,
    revision: Revision,
}

impl Writer {
    fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        while self.transactions.blocking_recv_many(&mut batch, BATCH) > 0 {
            let (txns, replies): (Vec<Txn>, Vec<Reply>) = batch.drain(..).unzip();
            match self.apply(&txns) {
                Ok(results) => {
                    for (result, reply) in results.into_iter().zip(replies) {
                        let answer = result.map(|(revision, changes)| {
                            self.shared.feed.publish(changes);
                            revision
                        });
                        // Whoever asked may have left.
                        let _ = reply.send(answer);
                    }
                }
                Err(error) => {
                    tracing::error!("store: {error}");
                    replies.into_iter().for_each(|reply| _ = reply.send(Err(error.clone())));
                    self.reopen();
                }
            }
        }
    }

    /// Applies transactions and makes them durable, or changes nothing. A result for each.
    #[expect(clippy::type_complexity, reason = "used once")]
    fn apply(
        &mut self,
        txns: &[Txn],
    ) -> Result<Vec<Result<(Revision, Vec<Change>), StoreError>>, StoreError> {
        let mut revision = self.revision;
        let results = self.shared.read(|database| {
            let write = database.begin_write()?;
            let mut results = Vec::with_capacity(txns.len());
            {
                let mut entries = write.open_table(ENTRIES)?;
                for txn in txns {
                    results.push(match holds(&entries, &txn.compares)? {
                        false => Err(StoreError::Conflict),
                        true if txn.ops.is_empty() => Ok((revision, Vec::new())),
                        true => {
                            revision += 1;
                            Ok((revision, perform(&mut entries, &txn.ops, revision)?))
                        }
                    });
                }
                write.open_table(META)?.insert(REVISION, revision)?;
            }
            if revision == self.revision {
                write.abort()?;
            } else {
                write.commit()?;
            }
            Ok(results)
        })?;
        self.revision = revision;
        Ok(results)
    }

    /// Opens the file again after an error. If that fails, the next transaction tries once more.
    fn reopen(&mut self) {
        let mut database = self.shared.database.write().unwrap_or_else(PoisonError::into_inner);
        // The old one holds a lock on the file.
        *database = None;
        let opened = open(&self.shared.path).and_then(|opened| Ok((prepare(&opened)?, opened)));
        match opened {
            Ok((revision, opened)) => {
                self.revision = revision;
                *database = Some(opened);
            }
            Err(error) => tracing::error!("store: cannot open it again: {error}"),
        }
    }
}

fn holds(entries: &Table<'_, &str, &[u8]>, compares: &[Compare]) -> Result<bool, redb::Error> {
    for compare in compares {
        let (key, wanted) = match compare {
            Compare::Absent(key) => (key, None),
            Compare::Modified(key, revision) => (key, Some(*revision)),
        };
        let found = entries.get(key.as_str())?.and_then(|value| Some(decode(key, value.value())?.modified));
        if found != wanted {
            return Ok(false);
        }
    }
    Ok(true)
}

fn perform(
    entries: &mut Table<'_, &str, &[u8]>,
    ops: &[Op],
    revision: Revision,
) -> Result<Vec<Change>, redb::Error> {
    let mut changes = Vec::with_capacity(ops.len());
    for op in ops {
        let (key, entry) = match op {
            Op::Put { key, value } => {
                let stored = [&revision.to_le_bytes()[..], value].concat();
                entries.insert(key.as_str(), stored.as_slice())?;
                (key, Some(Entry { key: key.clone(), value: value.clone(), modified: revision }))
            }
            Op::Delete { key } => {
                if entries.remove(key.as_str())?.is_none() {
                    continue;
                }
                (key, None)
            }
        };
        changes.push(Change { key: key.clone(), entry, revision });
    }
    Ok(changes)
}

/// An entry as stored; None if it is not one.
fn decode(key: &str, stored: &[u8]) -> Option<Entry> {
    let (modified, value) = stored.split_first_chunk()?;
    Some(Entry { key: key.to_owned(), value: value.to_owned(), modified: Revision::from_le_bytes(*modified) })
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let opened = Database::builder().set_cache_size(CACHE_BYTES).create(path);
    opened.map_err(|error| {
        let problem = match &error {
            redb::DatabaseError::DatabaseAlreadyOpen => "another process has it open".to_owned(),
            redb::DatabaseError::Storage(redb::StorageError::Io(e))
                if e.kind() == io::ErrorKind::InvalidData =>
            {
                "this file is not a store".to_owned()
            }
            other => other.to_string(),
        };
        StoreError::Unavailable(format!("{}: {problem}", path.display()))
    })
}

/// Makes the tables, so that reads find them. Returns the revision of what is there.
fn prepare(database: &Database) -> Result<Revision, StoreError> {
    let prepare = || {
        let write = database.begin_write()?;
        write.open_table(ENTRIES)?;
        let revision = write.open_table(META)?.get(REVISION)?.map_or(0, |revision| revision.value());
        write.commit()?;
        Ok(revision)
    };
    prepare().map_err(unavailable)
}

fn unavailable(error: redb::Error) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

#[cfg(test)]
#[path = "embedded_tests.rs"]
mod tests;
