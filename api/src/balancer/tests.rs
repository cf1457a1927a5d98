//! Load balancers over a simulated host, whose guests are little servers of this machine.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::instances::tests::daemon;
use crate::microvm::sim::Simulation;
use crate::model::{Algorithm, Instance};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a guest's server does.
struct Guest {
    id: String,
    well: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Rig {
    _dir: tempfile::TempDir,
    service: Service,
    balancers: Balancers,
    port: u16,
}

impl Rig {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let service = daemon(dir.path(), &Simulation::new()).await;
        let balancers = Balancers::start(service.clone());
        Rig { _dir: dir, service, balancers, port: free_port() }
    }

    /// An instance at an address of loopback, with a server there. Each answer is its name, what it was told of
    /// who asks, and how long the body was.
    async fn guest(&self, last: u8) -> Guest {
        let request = serde_json::json!({"image": "tiny", "root_size_gib": 1, "instance_type": "nano"});
        let id = self.service.run(serde_json::from_value(request).unwrap()).await.unwrap()[0].id.clone();
        let address = Ipv4Addr::new(127, 77, self.port.to_be_bytes()[1], last);
        let listener = TcpListener::bind((address, self.port)).await.unwrap();
        let (well, served) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
        let task = tokio::spawn(answer(listener, last, well.clone(), served.clone()));
        self.service.wait(&id, InstanceState::Running, false).await.unwrap();
        let moved = self.service.host().records.modify(&id, |instance: &mut Instance| {
            instance.interface.private_address = address;
            Ok::<_, Error>(())
        });
        moved.await.unwrap();
        Guest { id, well, served, task }
    }

    async fn create(&self, guests: &[&Guest], more: serde_json::Value) -> Arc<LoadBalancer> {
        let ids: Vec<&String> = guests.iter().map(|guest| &guest.id).collect();
        let listen = free_port();
        let mut request = serde_json::json!({
            "name": "web", "protocol": "http", "listen": format!("127.0.0.1:{listen}"),
            "instance_ids": ids, "target_port": self.port,
            "health_check": {"path": "/", "interval_seconds": 1, "timeout_seconds": 1, "healthy_threshold": 1,
                "unhealthy_threshold": 1},
        });
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.balancers.create(serde_json::from_value(request).unwrap()).await.unwrap();
        self.until(|balancer| healthy(balancer) == guests.len()).await
    }

    async fn until(&self, mut holds: impl FnMut(&LoadBalancer) -> bool) -> Arc<LoadBalancer> {
        let waiting = async {
            loop {
                let balancer = self.balancers.get("web").unwrap();
                if balancer.state == LoadBalancerState::Active && holds(&balancer) {
                    return balancer;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(balancer) => balancer,
            Err(_) => panic!("never came to it: {:#?}", self.balancers.get("web")),
        }
    }
}

fn healthy(balancer: &LoadBalancer) -> usize {
    balancer.targets.iter().filter(|target| target.state == TargetState::Healthy).count()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

async fn answer(listener: TcpListener, name: u8, well: Arc<AtomicBool>, served: Arc<AtomicUsize>) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let (well, served) = (well.clone(), served.clone());
        tokio::spawn(async move {
            let mut buffer = Vec::new();
            loop {
                let end = loop {
                    if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                        break end + 4;
                    }
                    if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                        return;
                    }
                };
                let head = String::from_utf8_lossy(&buffer[..end]).to_lowercase();
                let field = |name: &str| {
                    head.lines()
                        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                        .unwrap_or("")
                        .to_owned()
                };
                let length: usize = field("content-length").parse().unwrap_or(0);
                while buffer.len() < end + length {
                    if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
                buffer.drain(..end + length);
                if head.starts_with("get /slow") {
                    tokio::time::sleep(Duration::from_millis(400)).await;
                }
                // The load balancer's own questions are not counted.
                if !head.contains("pulau-health-check") {
                    served.fetch_add(1, Ordering::SeqCst);
                }
                let status = if well.load(Ordering::SeqCst) { "200 OK" } else { "500 Broken" };
                let body = format!("{name} {} {length}", field("x-forwarded-for"));
                let keep = head.starts_with("get /keep");
                let connection = if keep { "keep-alive" } else { "close" };
                let head = format!(
                    "HTTP/1.1 {status}\r\nConnection: {connection}\r\nContent-Length: {}",
                    body.len()
                );
                let sent = stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await;
                if sent.is_err() || !keep {
                    return;
                }
            }
        });
    }
}

/// A request on a connection of its own: status and body.
async fn ask(balancer: &LoadBalancer, head: &str, body: &str) -> (u16, String) {
    let asking = async {
        let mut stream = TcpStream::connect(balancer.listen).await.unwrap();
        let length = body.len();
        let request = format!(
            "{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, answer.rsplit("\r\n\r\n").next().unwrap_or_default().to_owned())
    };
    tokio::time::timeout(PATIENCE, asking).await.unwrap()
}

#[tokio::test]
async fn requests_go_to_healthy_targets_each_in_turn() {
    let rig = Rig::new().await;
    let (a, b) = (rig.guest(1).await, rig.guest(2).await);
    let balancer = rig.create(&[&a, &b], serde_json::json!({})).await;
    for _ in 0..10 {
        let (status, body) = ask(&balancer, "POST /x", "hello").await;
        assert!(status == 200 && body.ends_with(" 127.0.0.1 5"), "{status} {body}");
    }
    assert_eq!((a.served.load(Ordering::SeqCst), b.served.load(Ordering::SeqCst)), (5, 5));
    // One that fails its checks gets nothing, until it is well again.
    a.well.store(false, Ordering::SeqCst);
    let ill = rig.until(|balancer| healthy(balancer) == 1).await;
    let target = ill.targets.iter().find(|target| target.instance_id == a.id).unwrap();
    assert!(target.reason.as_ref().unwrap().contains("status 500"), "{target:?}");
    for _ in 0..4 {
        assert!(ask(&balancer, "GET /", "").await.1.starts_with("2 "));
    }
    a.well.store(true, Ordering::SeqCst);
    rig.until(|balancer| healthy(balancer) == 2).await;
    let activity = rig.balancers.activities().remove(0);
    assert_eq!((activity.requests, activity.refused), (14, 0));

    // A target that does not take connections is passed over, whatever the request.
    b.task.abort();
    for _ in 0..6 {
        let (status, body) = ask(&balancer, "POST /x", "hello").await;
        assert!(status == 200 && body == "1 127.0.0.1 5", "{status} {body}");
    }
    // There is none left.
    a.well.store(false, Ordering::SeqCst);
    rig.until(|balancer| healthy(balancer) == 0).await;
    assert_eq!(ask(&balancer, "GET /", "").await.0, 503);
    rig.balancers.delete("web").await.unwrap();
    let closed = async {
        while TcpStream::connect(balancer.listen).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.unwrap();
}

#[tokio::test]
async fn a_target_that_is_taken_away_ends_what_it_has_begun() {
    let rig = Rig::new().await;
    let (a, b) = (rig.guest(3).await, rig.guest(4).await);
    let more = serde_json::json!({"algorithm": "least-connections", "deregistration_delay_seconds": 20});
    let balancer = rig.create(&[&a, &b], more).await;
    assert_eq!(balancer.algorithm, Algorithm::LeastConnections);
    let slow = [(); 2].map(|()| {
        let balancer = balancer.clone();
        tokio::spawn(async move { ask(&balancer, "GET /slow", "").await })
    });
    while a.served.load(Ordering::SeqCst) + b.served.load(Ordering::SeqCst) == 0
        && rig.balancers.lock()[&balancer.id].targets.active(&a.id) == 0
    {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let only_b = serde_json::json!({"instance_ids": [b.id]});
    rig.balancers.modify("web", serde_json::from_value(only_b).unwrap()).await.unwrap();
    rig.until(|balancer| balancer.targets.iter().any(|target| target.state == TargetState::Draining)).await;
    assert!(ask(&balancer, "GET /", "").await.1.starts_with("4 "));
    let mut answers = Vec::new();
    for slow in slow {
        answers.push(slow.await.unwrap());
    }
    assert!(answers.iter().all(|(status, _)| *status == 200), "{answers:?}");
    assert!(answers.iter().any(|(_, body)| body.starts_with("3 ")), "{answers:?}");
    rig.until(|balancer| balancer.targets.len() == 1).await;
    // Connections to a target are used again.
    for _ in 0..4 {
        let (status, body) = ask(&balancer, "GET /keep", "").await;
        assert!(status == 200 && body.starts_with("4 "), "{status} {body}");
    }
}

#[tokio::test]
async fn connections_are_handed_on_whole_and_cut_in_the_end() {
    let rig = Rig::new().await;
    let (a, b) = (rig.guest(5).await, rig.guest(6).await);
    let more = serde_json::json!({"protocol": "tcp", "deregistration_delay_seconds": 0, "max_connections": 2,
        "health_check": {"interval_seconds": 1}});
    let balancer = rig.create(&[&a, &b], more).await;
    let mut held = TcpStream::connect(balancer.listen).await.unwrap();
    held.write_all(b"GET /keep HTTP/1.1\r\n\r\n").await.unwrap();
    let mut buffer = vec![0; 256];
    let read = tokio::time::timeout(PATIENCE, held.read(&mut buffer)).await.unwrap().unwrap();
    let first = String::from_utf8_lossy(&buffer[..read]).into_owned();
    assert!(first.contains("200 OK"), "{first}");
    // There is room for one more; the next has to wait until one ends.
    let second = TcpStream::connect(balancer.listen).await.unwrap();
    let mut third = TcpStream::connect(balancer.listen).await.unwrap();
    third.write_all(b"GET /3 HTTP/1.1\r\n\r\n").await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(100), third.read(&mut buffer)).await;
    assert!(waits.is_err());
    drop(second);
    let read = tokio::time::timeout(PATIENCE, third.read(&mut buffer)).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&buffer[..read]).contains("200 OK"));
    // Its time is up at once: the connection that is open is closed.
    let gone = if first.ends_with("5  0") { &a } else { &b };
    let stays = if first.ends_with("5  0") { &b } else { &a };
    let other = serde_json::json!({"instance_ids": [stays.id]});
    rig.balancers.modify("web", serde_json::from_value(other).unwrap()).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, held.read(&mut buffer)).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    assert!(rig.balancers.get("web").unwrap().targets.iter().all(|target| target.instance_id != gone.id));
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name() {
    let rig = Rig::new().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listener.local_addr().unwrap().to_string();
    let free = format!("127.0.0.1:{}", free_port());
    let id = {
        let request = serde_json::json!({"image": "tiny", "root_size_gib": 1});
        rig.service.run(serde_json::from_value(request).unwrap()).await.unwrap()[0].id.clone()
    };
    for (more, named) in [
        (serde_json::json!({"name": "a b"}), "name"),
        (serde_json::json!({"listen": taken}), "in use by a program"),
        (serde_json::json!({"listen": "203.0.113.77:80"}), "none of this host's"),
        (serde_json::json!({"listen": "127.0.0.1:0"}), "listen"),
        (serde_json::json!({"instance_ids": []}), "either group or instance_ids"),
        (serde_json::json!({"instance_ids": ["i-0"]}), "instance \"i-0\""),
        (serde_json::json!({"instance_ids": [], "group": "no"}), "group \"no\""),
        (serde_json::json!({"target_port": 0}), "target_port"),
        (serde_json::json!({"max_connections": 0}), "max_connections"),
        (serde_json::json!({"deregistration_delay_seconds": 3601}), "deregistration_delay_seconds"),
        (serde_json::json!({"health_check": {"path": "x"}}), "path"),
        (serde_json::json!({"health_check": {"interval_seconds": 0}}), "interval_seconds"),
    ] {
        let mut request =
            serde_json::json!({"name": "web", "protocol": "tcp", "listen": free, "instance_ids": [id]});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let refused = rig.balancers.create(serde_json::from_value(request).unwrap()).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(named), "{more}: {refused}");
    }
    assert!(rig.balancers.list().is_empty());
}
