//! All records, by kind and id.

use std::collections::BTreeMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::{
    ApiToken, Cordon, Group, Image, Instance, KeyPair, LoadBalancer, Network, Patch, SecurityGroup, Snapshot,
    Volume,
};
use crate::store::{Change, Revision};

/// Something kept in the store, as JSON, under `<PREFIX><id>`.
pub trait Record: Clone + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Of its keys; ends with a slash.
    const PREFIX: &'static str;

    fn id(&self) -> &str;

    fn table(tables: &Tables) -> &Table<Self>;

    fn key(&self) -> String {
        key::<Self>(self.id())
    }

    /// The bytes to store.
    fn encode(&self) -> Vec<u8> {
        // A record is plain data with text for keys: there is nothing JSON could not express.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// The key of record `id`.
pub fn key<R: Record>(id: &str) -> String {
    format!("{}{id}", R::PREFIX)
}

/// The answer once given to a request with an idempotency token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The operation and the token.
    pub id: String,
    /// A hash of the request.
    pub request: String,
    /// Ids of what it made.
    pub made: Vec<String>,
    pub created: DateTime<Utc>,
}

/// Records of one kind.
#[derive(Clone, Debug)]
pub struct Table<R>(BTreeMap<String, (Arc<R>, Revision)>);

impl<R> Default for Table<R> {
    fn default() -> Self {
        Table(BTreeMap::new())
    }
}

impl<R> Table<R> {
    pub fn get(&self, id: &str) -> Option<&Arc<R>> {
        self.0.get(id).map(|(record, _)| record)
    }

    /// In order of their ids.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<R>> {
        self.0.values().map(|(record, _)| record)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The revision that wrote a record.
    pub fn revision(&self, id: &str) -> Option<Revision> {
        self.0.get(id).map(|(_, revision)| *revision)
    }

    /// A record and the revision that wrote it.
    pub fn versioned(&self, id: &str) -> Option<(Arc<R>, Revision)> {
        self.0.get(id).cloned()
    }
}

/// Declares the kinds of records: where they are in [`Tables`], their prefix, and the field that is their id.
macro_rules! records {
    ($($table:ident: $Record:ident, $prefix:literal, $id:ident;)*) => {
        /// Everything that is kept.
        #[derive(Clone, Debug, Default)]
        pub struct Tables {
            $(pub $table: Table<$Record>,)*
        }

        /// A record of any kind.
        #[derive(Clone, Debug)]
        pub enum AnyRecord {
            $($Record { old: Option<Arc<$Record>>, new: Option<Arc<$Record>> },)*
        }

        $(impl Record for $Record {
            const PREFIX: &'static str = $prefix;

            fn id(&self) -> &str {
                &self.$id
            }

            fn table(tables: &Tables) -> &Table<Self> {
                &tables.$table
            }
        })*

        impl Tables {
            /// Takes over a change of the store. None if it changes no record.
            ///
            /// # Errors
            ///
            /// The record is none that this version knows.
            pub(super) fn apply(&mut self, change: Change) -> Result<Option<RecordChange>, serde_json::Error> {
                let Change { key, entry, revision } = change;
                $(if let Some(id) = key.strip_prefix($prefix) {
                    let old = self.$table.0.get(id).map(|(record, _)| record.clone());
                    let new = match entry {
                        Some(entry) => {
                            let record: Arc<$Record> = Arc::new(serde_json::from_slice(&entry.value)?);
                            self.$table.0.insert(id.to_owned(), (record.clone(), entry.modified));
                            Some(record)
                        }
                        None => {
                            self.$table.0.remove(id);
                            None
                        }
                    };
                    return Ok(Some(RecordChange { revision, id: id.to_owned(), record: AnyRecord::$Record { old, new } }));
                })*
                tracing::warn!(key, "a record of an unknown kind is left alone");
                Ok(None)
            }

            /// What has to be told to who knows `old`.
            pub(super) fn differences(&self, old: &Tables) -> Vec<RecordChange> {
                let mut differences = Vec::new();
                $({
                    let ids = self.$table.0.keys().chain(old.$table.0.keys().filter(|id| !self.$table.0.contains_key(*id)));
                    for id in ids {
                        let (now, before) = (self.$table.0.get(id), old.$table.0.get(id));
                        if now.map(|(_, revision)| revision) != before.map(|(_, revision)| revision) {
                            let revision = now.or(before).map_or(0, |(_, revision)| *revision);
                            let record = AnyRecord::$Record { old: before.map(|b| b.0.clone()), new: now.map(|n| n.0.clone()) };
                            differences.push(RecordChange { revision, id: id.clone(), record });
                        }
                    }
                })*
                differences
            }
        }
    };
}

records! {
    api_tokens: ApiToken, "api-tokens/", id;
    cordons: Cordon, "cordons/", id;
    groups: Group, "groups/", id;
    images: Image, "images/", id;
    instances: Instance, "instances/", id;
    key_pairs: KeyPair, "key-pairs/", id;
    load_balancers: LoadBalancer, "load-balancers/", id;
    networks: Network, "networks/", id;
    patches: Patch, "patches/", id;
    security_groups: SecurityGroup, "security-groups/", id;
    snapshots: Snapshot, "snapshots/", id;
    tokens: Token, "tokens/", id;
    volumes: Volume, "volumes/", id;
}

/// A record that was made, changed or removed.
#[derive(Clone, Debug)]
pub struct RecordChange {
    pub revision: Revision,
    pub id: String,
    pub record: AnyRecord,
}
