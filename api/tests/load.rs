//! The API under more clients than it lets in: none waits for ever, none loses what it was promised, and those for
//! whom there is no room are told so.

#![allow(clippy::unwrap_used, clippy::expect_used)] // It is all tests.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pulau::client::{Client, Endpoint, Refused};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than anything in here takes.
const PATIENCE: Duration = Duration::from_secs(300);
const CLIENTS: usize = 1000;
/// The daemon's own bound on requests that are under way.
const UNDER_WAY: usize = 1024;
/// More than the daemon takes for that many clients and instances, in KiB.
const MEMORY_KIB: u64 = 768 << 10;

struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Daemon {
    fn start() -> Self {
        // A thousand connections at each end. The daemon inherits it.
        let resource = nix::sys::resource::Resource::RLIMIT_NOFILE;
        let (_, hard) = nix::sys::resource::getrlimit(resource).unwrap();
        nix::sys::resource::setrlimit(resource, hard, hard).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pulau"));
        command.args(["serve", "--simulate", "--vcpus", "100000", "--memory", "1000000G", "--data-dir"]);
        command.arg(dir.path().join("data")).arg("--socket").arg(dir.path().join("api.sock"));
        command.env("PULAU_LOG", "warn");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Daemon { child, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self) -> Client {
        Client(Endpoint::Socket(self.path("api.sock")))
    }

    /// Memory it has taken at most, in KiB.
    fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        line.unwrap().trim().parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.path("log")).unwrap_or_default());
        }
    }
}

async fn image(daemon: &Daemon, dir: &Path) {
    let (kernel, root) = (dir.join("kernel"), dir.join("root"));
    let mut bytes = vec![0; 0x300];
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    std::fs::write(&kernel, bytes).unwrap();
    std::fs::File::create(&root).unwrap().set_len(4 << 20).unwrap();
    assert!(Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(&root).status().unwrap().success());
    let client = daemon.client();
    while client.get::<Value>("/v1/host").await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let body = json!({"name": "tiny", "root": root, "kernel": kernel});
    let _: Value = client.post("/v1/images", &body).await.unwrap();
    while client.get::<Value>("/v1/images/tiny").await.unwrap()["state"] == "pending" {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asks until there is room. Counts how often there was none.
async fn insist<T, F: Future<Output = anyhow::Result<T>>>(full: &AtomicUsize, ask: impl Fn() -> F) -> T {
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) => match error.downcast_ref::<Refused>() {
                Some(refused) if refused.status == 429 => full.fetch_add(1, Ordering::Relaxed),
                // More connect at once than the socket's queue is long.
                None if format!("{error:#}").contains("temporarily unavailable") => 0,
                _ => panic!("{error:#}"),
            },
        };
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs an instance, lists, changes it, and has it stopped; its id.
async fn one_client(client: Client, number: usize, full: Arc<AtomicUsize>) -> String {
    let token = format!("client-{number}");
    let body = json!({"image": "tiny", "instance_type": "nano", "root_size_gib": 1, "client_token": token});
    let ran: Value = insist(&full, || client.post("/v1/instances", &body)).await;
    let id = ran["instances"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/instances/{id}");
    let page: Value = insist(&full, || client.get("/v1/instances?max_results=20")).await;
    assert!(!page["items"].as_array().unwrap().is_empty());
    // Its driver writes to the same record meanwhile; neither may be lost.
    let tags = json!({"tags": {"client": number.to_string()}});
    let _: Value = insist(&full, || client.patch(&path, &tags)).await;
    let again: Value = insist(&full, || client.post("/v1/instances", &body)).await;
    assert_eq!(again["instances"][0]["id"], id.as_str(), "asked twice, and run once");
    let stop = format!("{path}/stop");
    let nothing = json!({});
    let _: Value = insist(&full, || client.post(&stop, &nothing)).await;
    let wait = format!("{path}/wait?state=stopped&timeout_seconds=300");
    let stopped: Value = insist(&full, || client.get(&wait)).await;
    assert_eq!(
        (&stopped["state"], &stopped["tags"]["client"]),
        (&json!("stopped"), &json!(number.to_string()))
    );
    id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clients_get_what_they_ask_for_or_are_told_to_come_back() {
    let daemon = Daemon::start();
    let files = tempfile::tempdir().unwrap();
    image(&daemon, files.path()).await;
    let full = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(one_client(daemon.client(), number, full.clone()))).collect();
    let all = async {
        let mut ids = std::collections::BTreeSet::new();
        for client in clients {
            ids.insert(client.await.unwrap());
        }
        ids
    };
    let ids = tokio::time::timeout(PATIENCE, all).await.expect("nobody waits for ever");
    assert_eq!(ids.len(), CLIENTS, "each has one of its own");
    let client = daemon.client();
    let host: Value = client.get("/v1/host").await.unwrap();
    assert_eq!((&host["instances"]["stopped"], &host["used"]["vcpus"]), (&json!(CLIENTS), &json!(0)));

    // Requests that stay take what room there is. The next is told so, and served when they have gone.
    let some = format!("/v1/instances/{}/wait?state=pending&timeout_seconds=300", ids.first().unwrap());
    let refused: Refused = client.get::<Value>(&some).await.unwrap_err().downcast().unwrap();
    assert_eq!((refused.status, refused.code.as_str()), (409, "IncorrectInstanceState"));
    let mut waiting = Vec::new();
    let start = format!("/v1/instances/{}/start", ids.first().unwrap());
    let _: Value = client.post(&start, &json!({})).await.unwrap();
    let stays = format!("/v1/instances/{}/wait?state=pending&timeout_seconds=300", ids.first().unwrap());
    for _ in 0..UNDER_WAY + 50 {
        let (client, stays, full) = (daemon.client(), stays.clone(), full.clone());
        waiting.push(tokio::spawn(async move { insist(&full, || client.get::<Value>(&stays)).await }));
    }
    let told = async {
        loop {
            match client.get::<Value>("/v1/host").await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => match error.downcast::<Refused>() {
                    Ok(refused) => return refused,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                },
            }
        }
    };
    let refused = tokio::time::timeout(PATIENCE, told).await.expect("at some time there is no room");
    assert_eq!((refused.status, refused.code.as_str()), (429, "RequestLimitExceeded"));
    waiting.iter().for_each(|one| one.abort());
    let served: Value =
        tokio::time::timeout(PATIENCE, insist(&full, || client.get("/v1/host"))).await.unwrap();
    assert_eq!(served["instances"]["running"], 1);
    let peak = daemon.peak_kib();
    assert!(peak < MEMORY_KIB, "{peak} KiB");
    eprintln!("{peak} KiB at most; {} times there was no room", full.load(Ordering::Relaxed));
}
