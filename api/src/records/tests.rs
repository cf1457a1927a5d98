use std::collections::BTreeMap;
use std::path::Path;

use super::*;
use crate::model::KeyPair;
use crate::store::Embedded;

async fn records(dir: &Path) -> Records {
    Records::open(Arc::new(Embedded::open(&dir.join("store.redb")).unwrap())).await.unwrap()
}

fn key_pair(id: &str) -> KeyPair {
    KeyPair {
        id: id.into(),
        name: id.into(),
        public_key: String::new(),
        fingerprint: String::new(),
        created: Default::default(),
        tags: BTreeMap::new(),
    }
}

async fn create(records: &Records, id: &str) {
    let create = |_: &Tables, changes: &mut Changes| {
        changes.create(&key_pair(id));
        Ok::<_, Failure>(())
    };
    records.update(create).await.unwrap();
}

#[derive(Debug, PartialEq)]
enum Failure {
    Taken,
    Store(String),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Failure::Store(error.to_string())
    }
}

#[tokio::test]
async fn what_is_written_is_read_at_once_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = records(dir.path()).await;
    let mut changes = first.subscribe();
    create(&first, "a").await;
    assert_eq!(first.get::<KeyPair>("a").unwrap().name, "a");
    let rename = |key: &mut KeyPair| {
        key.name = "b".into();
        Ok::<_, Failure>(())
    };
    let renamed = first.modify("a", rename).await.unwrap();
    assert_eq!(renamed.unwrap().name, "b");
    assert!(matches!(changes.recv().await.unwrap().record, AnyRecord::KeyPair { old: None, new: Some(_) }));
    assert!(matches!(
        changes.recv().await.unwrap().record,
        AnyRecord::KeyPair { old: Some(_), new: Some(_) }
    ));
    assert_eq!(first.modify("x", |_: &mut KeyPair| Ok::<_, Failure>(())).await, Ok(None));
    drop(first);

    let second = loop {
        // The first one's follower lets go of the store when it next looks.
        match Embedded::open(&dir.path().join("store.redb")) {
            Ok(store) => break Records::open(Arc::new(store)).await.unwrap(),
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
        }
    };
    assert_eq!(second.get::<KeyPair>("a").unwrap().name, "b");
    second
        .update(|tables, changes| {
            changes.delete::<KeyPair>(tables, "a");
            Ok::<_, Failure>(())
        })
        .await
        .unwrap();
    assert_eq!(second.get::<KeyPair>("a"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn decisions_do_not_overlap() {
    let dir = tempfile::tempdir().unwrap();
    let records = records(dir.path()).await;
    let takers = (0..20).map(|n| {
        let records = records.clone();
        tokio::spawn(async move {
            records
                .update(|tables, changes| {
                    if tables.key_pairs.len() == 5 {
                        return Err(Failure::Taken);
                    }
                    changes.create(&key_pair(&format!("k{n}")));
                    Ok(())
                })
                .await
        })
    });
    let mut taken = 0;
    for taker in takers.collect::<Vec<_>>() {
        taken += u32::from(taker.await.unwrap() == Err(Failure::Taken));
    }
    assert_eq!((taken, records.read().key_pairs.len()), (15, 5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn modifications_at_the_same_time_all_count() {
    let dir = tempfile::tempdir().unwrap();
    let records = records(dir.path()).await;
    create(&records, "a").await;
    let writers = (0..8).map(|n| {
        let records = records.clone();
        tokio::spawn(async move {
            records
                .modify("a", |key: &mut KeyPair| {
                    key.tags.insert(n.to_string(), String::new());
                    Ok::<_, Failure>(())
                })
                .await
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap().unwrap();
    }
    assert_eq!(records.get::<KeyPair>("a").unwrap().tags.len(), 8);
}
