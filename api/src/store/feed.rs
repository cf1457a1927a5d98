//! Changes on their way from the store to those who watch it: a bounded history, and a channel behind it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;

use super::{Change, Revision, StoreError};

/// Revisions kept for watches that begin in the past, and for those that are slow.
const KEPT: usize = 4096;

/// All changes of one revision.
type Batch = Arc<[Change]>;

/// The store's side.
#[derive(Debug)]
pub(super) struct Feed {
    history: Mutex<History>,
    sender: broadcast::Sender<Batch>,
}

#[derive(Debug)]
struct History {
    batches: VecDeque<Batch>,
    /// Changes after this revision are all in `batches`.
    complete_after: Revision,
}

impl Feed {
    pub fn new(revision: Revision) -> Self {
        let history = History { batches: VecDeque::new(), complete_after: revision };
        Feed { history: Mutex::new(history), sender: broadcast::Sender::new(KEPT) }
    }

    /// Tells all watches the changes of one revision. Revisions must come in order.
    pub fn publish(&self, changes: Vec<Change>) {
        let Some(revision) = changes.first().map(|change| change.revision) else { return };
        let batch: Batch = changes.into();
        let mut history = self.lock();
        if history.batches.len() == KEPT
            && let Some(oldest) = history.batches.pop_front()
        {
            history.complete_after = oldest.first().map_or(revision, |change| change.revision);
        }
        history.batches.push_back(batch.clone());
        // Nobody may be watching.
        let _ = self.sender.send(batch);
    }

    /// See [`super::Store::watch`].
    pub fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError> {
        let history = self.lock();
        if after < history.complete_after {
            return Err(StoreError::Compacted);
        }
        let is_after = |batch: &&Batch| batch.first().is_some_and(|change| change.revision > after);
        let pending = history.batches.iter().filter(is_after).cloned().collect();
        // Subscribed under the lock: no batch is missed or told twice.
        Ok(Watch { prefix: prefix.to_owned(), pending, receiver: self.sender.subscribe() })
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A watch; see [`super::Store::watch`].
#[derive(Debug)]
pub struct Watch {
    prefix: String,
    pending: VecDeque<Batch>,
    receiver: broadcast::Receiver<Batch>,
}

impl Watch {
    /// Waits for the next revision that changed something under the prefix, and returns all of it.
    /// May be cancelled without a loss.
    ///
    /// # Errors
    ///
    /// [`StoreError::Compacted`] if this watch was too slow; [`StoreError::Unavailable`] once the store is
    /// closed.
    pub async fn next(&mut self) -> Result<Vec<Change>, StoreError> {
        loop {
            let batch = match self.pending.pop_front() {
                Some(batch) => batch,
                None => self.receiver.recv().await.map_err(|error| match error {
                    broadcast::error::RecvError::Lagged(_) => StoreError::Compacted,
                    broadcast::error::RecvError::Closed => StoreError::Unavailable("it was closed".into()),
                })?,
            };
            let ours = batch.iter().filter(|change| change.key.starts_with(&self.prefix));
            let changes: Vec<Change> = ours.cloned().collect();
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(key: &str, revision: Revision) -> Vec<Change> {
        vec![Change { key: key.into(), entry: None, revision }]
    }

    #[tokio::test]
    async fn a_watch_tells_what_was_and_what_comes_without_a_gap() {
        let feed = Feed::new(0);
        feed.publish(change("a/1", 1));
        feed.publish(change("b/1", 2));
        let mut watch = feed.watch("a/", 0).unwrap();
        let mut later = feed.watch("", 1).unwrap();
        feed.publish(change("a/2", 3));
        assert_eq!(watch.next().await.unwrap()[0].revision, 1);
        assert_eq!(watch.next().await.unwrap()[0].revision, 3);
        assert_eq!(later.next().await.unwrap()[0].revision, 2);
    }

    #[tokio::test]
    async fn who_asks_for_too_much_or_is_too_slow_is_told() {
        let feed = Feed::new(7);
        assert!(matches!(feed.watch("", 6), Err(StoreError::Compacted)));
        let mut slow = feed.watch("", 7).unwrap();
        let revisions = 8..8 + 2 * KEPT as Revision;
        revisions.for_each(|revision| feed.publish(change("a", revision)));
        assert!(matches!(slow.next().await, Err(StoreError::Compacted)));
        assert!(matches!(feed.watch("", 8), Err(StoreError::Compacted)));
        assert!(feed.watch("", 8 + KEPT as Revision).is_ok());
        drop(feed);
    }
}
