use super::*;

fn put(key: &str, value: &str) -> Op {
    Op::Put { key: key.into(), value: value.into() }
}

fn txn(compares: Vec<Compare>, ops: Vec<Op>) -> Txn {
    Txn { compares, ops }
}

async fn all(store: &Embedded, prefix: &str) -> Vec<(String, String)> {
    let (entries, _) = store.range(prefix).await.unwrap();
    entries.into_iter().map(|e| (e.key, String::from_utf8(e.value).unwrap())).collect()
}

#[tokio::test]
async fn transactions_compare_and_apply_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(&dir.path().join("store.redb")).unwrap();
    let first =
        store.commit(txn(vec![Compare::Absent("a/1".into())], vec![put("a/1", "x"), put("a/2", "y")]));
    assert_eq!(first.await.unwrap(), 1);
    let again = store.commit(txn(vec![Compare::Absent("a/1".into())], vec![put("a/3", "z")])).await;
    assert!(matches!(again, Err(StoreError::Conflict)));
    let stale = store.commit(txn(vec![Compare::Modified("a/1".into(), 9)], vec![put("a/1", "z")])).await;
    assert!(matches!(stale, Err(StoreError::Conflict)));
    let both = vec![Op::Delete { key: "a/2".into() }, put("a/1", "w")];
    assert_eq!(store.commit(txn(vec![Compare::Modified("a/1".into(), 1)], both)).await.unwrap(), 2);
    assert_eq!(all(&store, "").await, [("a/1".to_owned(), "w".to_owned())]);
    assert_eq!(store.range("").await.unwrap().1, 2);
    assert_eq!(all(&store, "a/2").await, []);
}

#[tokio::test]
async fn what_was_committed_is_there_after_a_restart_and_changes_go_on_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let store = Embedded::open(&path).unwrap();
    store.commit(txn(vec![], vec![put("k", "v")])).await.unwrap();
    let open = Embedded::open(&path).err().unwrap().to_string();
    assert!(open.contains("another process has it open"), "{open}");
    drop(store);
    let store = Embedded::open(&path).unwrap();
    assert_eq!(all(&store, "").await, [("k".to_owned(), "v".to_owned())]);
    assert!(matches!(store.watch("", 0).await, Err(StoreError::Compacted)), "from before the restart");
    let mut watch = store.watch("", 1).await.unwrap();
    assert_eq!(store.commit(txn(vec![], vec![put("k", "w")])).await.unwrap(), 2);
    let changes = watch.next().await.unwrap();
    assert_eq!((changes.len(), changes[0].revision), (1, 2));
    assert_eq!(changes[0].entry.as_ref().unwrap().value, b"w");
}

#[tokio::test]
async fn a_transaction_that_changes_nothing_is_no_revision() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(&dir.path().join("s")).unwrap();
    assert_eq!(store.commit(Txn::default()).await.unwrap(), 0);
    store.commit(txn(vec![], vec![put("a", "")])).await.unwrap();
    assert_eq!(store.commit(txn(vec![Compare::Modified("a".into(), 1)], vec![])).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writers_lose_no_update() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(Embedded::open(&dir.path().join("s")).unwrap());
    store.commit(txn(vec![], vec![put("n", "0")])).await.unwrap();
    let mut watch = store.watch("n", 1).await.unwrap();
    let writers = (0..16).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut done = 0;
            while done < 10 {
                let (entries, _) = store.range("n").await.unwrap();
                let n: u32 = std::str::from_utf8(&entries[0].value).unwrap().parse().unwrap();
                let compare = Compare::Modified("n".into(), entries[0].modified);
                match store.commit(txn(vec![compare], vec![put("n", &(n + 1).to_string())])).await {
                    Ok(_) => done += 1,
                    Err(StoreError::Conflict) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    assert_eq!(all(&store, "n").await, [("n".to_owned(), "160".to_owned())]);
    for n in 1..=160 {
        let changes = watch.next().await.unwrap();
        assert_eq!(changes[0].entry.as_ref().unwrap().value, n.to_string().as_bytes());
    }
}

#[test]
fn a_file_that_is_no_store_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    std::fs::write(&path, vec![b'x'; 8192]).unwrap();
    let error = Embedded::open(&path).err().unwrap().to_string();
    assert!(error.contains("not a store") && error.contains(path.to_str().unwrap()), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), vec![b'x'; 8192]);
}
