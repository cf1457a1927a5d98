//! Where the host manager keeps what must not be lost: keys, values and revisions, with etcd's semantics.
//!
//! Everything above stands on this trait alone, so that one host needs no more than a file
//! ([`Embedded`]) and several can share a real etcd.
//!
//! - Keys are text, values are bytes. A *revision* counts the transactions that have changed anything.
//! - A transaction compares, and only if all comparisons hold applies all of its operations, as one
//!   revision. It is on disk before [`Store::commit`] returns.
//! - A watch tells every change since a revision, in order, none left out. One that can no longer do so
//!   ends with [`StoreError::Compacted`]: read everything again, and watch from there.
//!
//! Leases belong to this contract as soon as several hosts share a store; one host has no use for them.

mod embedded;
mod feed;

use async_trait::async_trait;

pub use embedded::Embedded;
pub use feed::Watch;

/// Counts transactions; 0 is the empty store.
pub type Revision = u64;

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    /// The revision that last wrote it.
    pub modified: Revision,
}

/// What must hold for a transaction to be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// There is no such key.
    Absent(String),
    /// The key was last written by this revision.
    Modified(String, Revision),
}

/// What a transaction does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    Put { key: String, value: Vec<u8> },
    Delete { key: String },
}

/// Comparisons and what to do if they hold. Each key may be written once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    pub compares: Vec<Compare>,
    pub ops: Vec<Op>,
}

/// What a watch tells: the key has this entry now, or (None) is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: String,
    pub entry: Option<Entry>,
    pub revision: Revision,
}

/// A store that did not do what it was asked to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// A comparison did not hold. Nothing was changed.
    #[error("the store was changed by somebody else at the same time")]
    Conflict,
    /// A watch asks for changes that are no longer kept, or was too slow to take them.
    #[error("the changes since that revision are no longer kept")]
    Compacted,
    /// It cannot be read or written: what is on disk is as it was before.
    #[error("the store cannot be used: {0}")]
    Unavailable(String),
}

/// See the module's text.
#[async_trait]
pub trait Store: Send + Sync {
    /// All entries whose key begins with `prefix`, in order of their keys, as of one revision, which is
    /// returned with them.
    ///
    /// # Errors
    ///
    /// [`StoreError::Unavailable`].
    async fn range(&self, prefix: &str) -> Result<(Vec<Entry>, Revision), StoreError>;

    /// Applies a transaction; returns its revision once it is durable.
    ///
    /// # Errors
    ///
    /// [`StoreError::Conflict`], [`StoreError::Unavailable`]; either way nothing was changed.
    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError>;

    /// Every change after revision `after` of keys that begin with `prefix`.
    ///
    /// # Errors
    ///
    /// [`StoreError::Compacted`].
    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, StoreError>;
}
