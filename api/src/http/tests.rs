//! The whole API over a simulated host, without sockets but where a connection is upgraded.

use axum::body::Body;
use axum::http::{Method, Request, header};
use axum::{Extension, Router};
use http_body_util::BodyExt as _;
use pulau_agent_protocol::client::Connection;
use pulau_agent_protocol::message::ExecRequest;
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::time::Duration;
use tower::Service as _;

use super::*;
use crate::client::{Client, Endpoint};
use crate::instances::tests::daemon;
use crate::microvm::sim::Simulation;

/// Longer than anything in here takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon without sockets.
struct Rig {
    _dir: tempfile::TempDir,
    api: Arc<Api>,
    /// For those on the Unix socket.
    local: Router,
    /// For those over TCP.
    remote: Router,
}

/// An answer.
struct Answer {
    status: StatusCode,
    headers: axum::http::HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Checks that this is a refusal of the form all have, and returns its code.
    fn code(&self) -> String {
        let body = self.json();
        let error = body["error"].as_object().unwrap_or_else(|| panic!("{body}"));
        assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
        assert_eq!(error.keys().collect::<Vec<_>>(), ["code", "message", "request_id"], "{body}");
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 5), "{body}");
        assert_eq!(self.headers["x-request-id"], error["request_id"].as_str().unwrap());
        assert_eq!(self.headers[header::CONTENT_TYPE], "application/json");
        error["code"].as_str().unwrap().to_owned()
    }
}

impl Rig {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let service = daemon(dir.path(), &Simulation::new()).await;
        let groups = crate::groups::Groups::start(service.clone(), Default::default());
        let balancers = crate::balancer::Balancers::start(service.clone());
        let api = Api::new(service, groups, balancers);
        let remote = router(api.clone());
        let local = remote.clone().layer(Extension(Door::UnixSocket));
        Rig { _dir: dir, api, local, remote }
    }

    async fn ask(router: &Router, request: Request<Body>) -> Answer {
        let response = tokio::time::timeout(PATIENCE, router.clone().call(request)).await.unwrap().unwrap();
        let (parts, body) = response.into_parts();
        let bytes = tokio::time::timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes();
        Answer {
            status: parts.status,
            headers: parts.headers,
            text: String::from_utf8(bytes.into()).unwrap(),
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let request = Request::builder().method(method).uri(path);
        let request = match body {
            Some(body) => {
                request.header(header::CONTENT_TYPE, "application/json").body(Body::from(body.to_string()))
            }
            None => request.body(Body::empty()),
        };
        Self::ask(&self.local, request.unwrap()).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(Method::POST, path, Some(body)).await
    }

    /// What is asked for, which has to be had.
    async fn ok(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let answer = self.send(method, path, body).await;
        assert!(answer.status.is_success(), "{path}: {} {}", answer.status, answer.text);
        if answer.text.is_empty() { Value::Null } else { answer.json() }
    }

    /// Ids of instances that run, of image `tiny`.
    async fn run(&self, more: Value) -> Vec<String> {
        let mut body = json!({"image": "tiny", "instance_type": "nano", "root_size_gib": 1});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let ran = self.ok(Method::POST, "/v1/instances", Some(body)).await;
        let ids: Vec<String> = ran["instances"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["id"].as_str().unwrap().to_owned())
            .collect();
        for id in &ids {
            self.ok(Method::GET, &format!("/v1/instances/{id}/wait?state=running&agent=true"), None).await;
        }
        ids
    }

    async fn token(&self, role: &str, more: Value) -> String {
        let mut body = json!({"name": role, "role": role});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let token = self.ok(Method::POST, "/v1/tokens", Some(body)).await;
        token["secret"].as_str().unwrap().to_owned()
    }

    async fn with_token(&self, method: Method, path: &str, header: Option<String>) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(value) = header {
            request = request.header(header::AUTHORIZATION, value);
        }
        Self::ask(&self.remote, request.body(Body::empty()).unwrap()).await
    }
}

#[tokio::test]
async fn every_refusal_has_its_status_and_code() {
    let rig = Rig::new().await;
    let get = |path: &str| (Method::GET, path.to_owned(), None);
    let post = |path: &str, body: Value| (Method::POST, path.to_owned(), Some(body));
    let delete = |path: &str| (Method::DELETE, path.to_owned(), None);
    let run = |more: Value| {
        let mut body = json!({"image": "tiny", "instance_type": "nano", "root_size_gib": 1});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        (Method::POST, "/v1/instances".to_owned(), Some(body))
    };
    let id = rig.run(json!({"client_token": "t", "termination_protection": true})).await.remove(0);
    let of = |rest: &str| format!("/v1/instances/{id}{rest}");
    let stopped = rig.run(json!({})).await.remove(0);
    let stop = Some(json!({"force": true}));
    rig.ok(Method::POST, &format!("/v1/instances/{stopped}/stop"), stop).await;
    rig.ok(Method::GET, &format!("/v1/instances/{stopped}/wait?state=stopped"), None).await;
    for name in ["key-pairs", "tokens", "security-groups", "networks"] {
        let mut body = json!({"name": "mine"});
        match name {
            "tokens" => body["role"] = "read".into(),
            "networks" => body["subnet"] = "10.80.0.0/16".into(),
            _ => {}
        }
        rig.ok(Method::POST, &format!("/v1/{name}"), Some(body)).await;
    }
    rig.ok(Method::POST, "/v1/images", Some(json!({"name": "broken", "root": "/nonexistent/root"}))).await;
    while rig.ok(Method::GET, "/v1/images/broken", None).await["state"] == "pending" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let groups = rig.ok(Method::GET, "/v1/security-groups", None).await;
    let used = groups["items"].as_array().unwrap().iter().find(|group| group["name"] == "default").unwrap();
    let used = format!("/v1/security-groups/{}", used["id"].as_str().unwrap());

    let volume = rig.ok(Method::POST, "/v1/volumes", Some(json!({"size_gib": 1}))).await;
    let volume = format!("/v1/volumes/{}", volume["id"].as_str().unwrap());
    while rig.ok(Method::GET, &volume, None).await["state"] == "creating" {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let root = rig.ok(Method::GET, &of(""), None).await["root_volume"].as_str().unwrap().to_owned();
    let root = format!("/v1/volumes/{root}");

    let nobody = "/v1/instances/i-00000000000000000";
    let cases = [
        (get("/v1/nothing"), 404, "InvalidAction"),
        ((Method::PUT, "/v1/instances".into(), None), 405, "InvalidMethod"),
        (get(nobody), 404, "InvalidInstanceID.NotFound"),
        (post(&format!("{nobody}/start"), json!({})), 404, "InvalidInstanceID.NotFound"),
        (get(&format!("{nobody}/console")), 404, "InvalidInstanceID.NotFound"),
        (get("/v1/images/none"), 404, "InvalidImageID.NotFound"),
        (run(json!({"instance_type": "huge"})), 404, "InvalidInstanceType"),
        (get("/v1/key-pairs/none"), 404, "InvalidKeyPair.NotFound"),
        (run(json!({"key_name": "none"})), 404, "InvalidKeyPair.NotFound"),
        (get("/v1/networks/none"), 404, "InvalidNetworkID.NotFound"),
        (get("/v1/security-groups/none"), 404, "InvalidGroup.NotFound"),
        (delete("/v1/tokens/none"), 404, "InvalidToken.NotFound"),
        (post("/v1/images", json!({"name": "tiny", "root": "/x"})), 409, "InvalidImageName.Duplicate"),
        (post("/v1/key-pairs", json!({"name": "mine"})), 409, "InvalidKeyPair.Duplicate"),
        (
            post("/v1/networks", json!({"name": "mine", "subnet": "10.90.0.0/16"})),
            409,
            "InvalidNetworkName.Duplicate",
        ),
        (post("/v1/security-groups", json!({"name": "mine"})), 409, "InvalidGroup.Duplicate"),
        (post("/v1/tokens", json!({"name": "mine", "role": "read"})), 409, "InvalidToken.Duplicate"),
        (delete("/v1/images/tiny"), 409, "InvalidImage.InUse"),
        (delete(&used), 409, "InvalidGroup.InUse"),
        (delete("/v1/networks/default"), 409, "DependencyViolation"),
        (post(&format!("/v1/instances/{stopped}/reboot"), json!({})), 409, "IncorrectInstanceState"),
        (get(&format!("/v1/instances/{stopped}/metrics")), 409, "IncorrectInstanceState"),
        (run(json!({"image": "broken"})), 409, "IncorrectState"),
        (run(json!({"min_count": 0})), 400, "InvalidParameterValue"),
        (get("/v1/instances?filter=colour=red"), 400, "InvalidParameterValue"),
        (get("/v1/instances?max_results=0"), 400, "InvalidParameterValue"),
        (get("/v1/instances?colour=red"), 400, "MalformedRequest"),
        (get(&of("/wait?state=flying")), 400, "MalformedRequest"),
        (get(&of("/wait?state=running&timeout_seconds=9999")), 400, "InvalidParameterValue"),
        (post(&of("/exec"), json!({"argv": []})), 400, "InvalidParameterValue"),
        (run(json!({"colour": "red"})), 400, "MalformedRequest"),
        (run(json!({"instance_type": "4xlarge"})), 507, "InsufficientInstanceCapacity"),
        (run(json!({"client_token": "t"})), 409, "IdempotentParameterMismatch"),
        (run(json!({"dry_run": true})), 412, "DryRunOperation"),
        (delete(&of("")), 409, "OperationNotPermitted"),
        (get(&format!("/v1/instances/{stopped}/wait?state=running")), 409, "IncorrectInstanceState"),
        (get(&of("/wait?state=stopped&timeout_seconds=1")), 504, "RequestTimeout"),
        (get(&of("/agent")), 400, "MalformedRequest"),
        (get("/v1/volumes/none"), 404, "InvalidVolume.NotFound"),
        (get("/v1/volumes?filter=hostname=x"), 400, "InvalidParameterValue"),
        (get("/v1/snapshots/none"), 404, "InvalidSnapshot.NotFound"),
        (delete("/v1/snapshots/none"), 404, "InvalidSnapshot.NotFound"),
        (post("/v1/volumes", json!({})), 400, "InvalidParameterValue"),
        (post("/v1/volumes", json!({"size_gib": 0})), 400, "InvalidParameterValue"),
        (post("/v1/volumes", json!({"snapshot_id": "none"})), 404, "InvalidSnapshot.NotFound"),
        (post("/v1/snapshots", json!({"volume_id": "none"})), 404, "InvalidVolume.NotFound"),
        (post(&format!("{volume}/attach"), json!({"instance_id": id})), 409, "IncorrectInstanceState"),
        (
            post(&format!("{volume}/attach"), json!({"instance_id": "none"})),
            404,
            "InvalidInstanceID.NotFound",
        ),
        (delete(&root), 409, "VolumeInUse"),
        (post(&format!("{root}/detach"), json!({})), 409, "OperationNotPermitted"),
        (post(&format!("{root}/attach"), json!({"instance_id": stopped})), 409, "VolumeInUse"),
        (
            (Method::PATCH, volume.clone(), Some(json!({"delete_on_termination": true}))),
            409,
            "IncorrectState",
        ),
        ((Method::PATCH, root.clone(), Some(json!({"size_gib": 9}))), 409, "IncorrectInstanceState"),
        (run(json!({"volumes": [{}]})), 400, "InvalidParameterValue"),
        (run(json!({"volumes": [{"volume_id": "none"}]})), 404, "InvalidVolume.NotFound"),
        (post("/v1/images", json!({"name": "x"})), 400, "InvalidParameterValue"),
        (post("/v1/images", json!({"name": "x", "reference": "A B"})), 400, "InvalidParameterValue"),
        (post("/v1/images", json!({"name": "x", "reference": "debian"})), 400, "InvalidParameterValue"),
        (post(&of("/images"), json!({"name": "tiny"})), 409, "InvalidImageName.Duplicate"),
        (post(&format!("{nobody}/images"), json!({"name": "x"})), 404, "InvalidInstanceID.NotFound"),
        (get(&of("/console/attach")), 400, "MalformedRequest"),
    ];
    for ((method, path, body), status, code) in cases {
        let answer = rig.send(method.clone(), &path, body).await;
        let got = (answer.status.as_u16(), answer.code());
        let allowed = answer.headers.get(header::ALLOW).is_some();
        assert_eq!(allowed, status == 405, "an answer 405 says which methods there are");
        assert_eq!(got, (status, code.to_owned()), "{method} {path}: {}", answer.text);
    }
}

#[tokio::test]
async fn a_subnet_whose_addresses_are_taken_has_none_left() {
    let rig = Rig::new().await;
    rig.ok(Method::POST, "/v1/networks", Some(json!({"name": "small", "subnet": "10.80.0.0/28"}))).await;
    let all = |count: u32| json!({"network": "small", "min_count": count});
    for id in rig.run(all(8)).await {
        let path = format!("/v1/instances/{id}");
        rig.ok(Method::POST, &format!("{path}/stop"), Some(json!({"force": true}))).await;
        rig.ok(Method::GET, &format!("{path}/wait?state=stopped"), None).await;
    }
    let mut body = all(4);
    body.as_object_mut()
        .unwrap()
        .extend([("image".into(), "tiny".into()), ("root_size_gib".into(), 1.into())]);
    let answer = rig.post("/v1/instances", body).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (507, "InsufficientFreeAddressesInSubnet"));
}

#[tokio::test]
async fn bodies_are_checked_before_they_are_read() {
    let rig = Rig::new().await;
    let send = async |content_type: Option<&str>, body: String| {
        let mut request = Request::builder().method(Method::POST).uri("/v1/instances");
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let answer = Rig::ask(&rig.local, request.body(Body::from(body)).unwrap()).await;
        (answer.status.as_u16(), answer.code())
    };
    let json = Some("application/json");
    assert_eq!(send(json, "{".into()).await, (400, "MalformedRequest".into()));
    assert_eq!(send(json, String::new()).await, (400, "MalformedRequest".into()));
    assert_eq!(send(json, "[]".into()).await, (400, "MalformedRequest".into()));
    let volume = rig.ok(Method::POST, "/v1/volumes", Some(json!({"size_gib": 1}))).await;
    let path = format!("/v1/volumes/{}", volume["id"].as_str().unwrap());
    // What serde would take for an object with no field set.
    let list =
        Request::builder().method(Method::PATCH).uri(&path).header(header::CONTENT_TYPE, "application/json");
    let list = list.body(Body::from("[null, null]")).unwrap();
    assert_eq!(Rig::ask(&rig.local, list).await.code(), "MalformedRequest");
    assert_eq!(send(Some("text/plain"), "{}".into()).await, (415, "UnsupportedMediaType".into()));
    assert_eq!(send(None, "{}".into()).await, (415, "UnsupportedMediaType".into()));
    let large = format!("{{\"image\": \"{}\"}}", "x".repeat(BODY));
    assert_eq!(send(json, large).await, (413, "RequestEntityTooLarge".into()));
}

#[tokio::test]
async fn over_tcp_a_token_is_needed_that_allows_what_is_asked() {
    let rig = Rig::new().await;
    let (read, operate) = (rig.token("read", json!({})).await, rig.token("operate", json!({})).await);
    let admin = rig.token("admin", json!({})).await;
    let short = rig.token("read", json!({"name": "short", "lifetime_seconds": 0})).await;
    let bearer = |token: &str| Some(format!("Bearer {token}"));
    for wrong in [
        None,
        Some("Basic YTpi".to_owned()),
        Some("Bearer ".to_owned()),
        bearer("pulau_wrong"),
        bearer(&read[..read.len() - 1]),
        bearer(&short),
    ] {
        for path in ["/v1/instances", "/metrics", "/v1/nothing"] {
            let answer = rig.with_token(Method::GET, path, wrong.clone()).await;
            assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "AuthFailure"), "{wrong:?}");
        }
    }
    let nobody = "/v1/instances/i-00000000000000000";
    for (method, path, needs) in [
        (Method::GET, "/v1/instances".to_owned(), 0),
        (Method::GET, "/metrics".to_owned(), 0),
        (Method::GET, "/v1/host".to_owned(), 0),
        (Method::DELETE, nobody.to_owned(), 1),
        (Method::GET, format!("{nobody}/agent"), 1),
        (Method::GET, format!("{nobody}/console/attach"), 1),
        (Method::GET, "/v1/tokens".to_owned(), 2),
        (Method::POST, "/v1/host/uncordon".to_owned(), 2),
    ] {
        for (has, token) in [&read, &operate, &admin].into_iter().enumerate() {
            let answer = rig.with_token(method.clone(), &path, bearer(token)).await;
            let refused = answer.status == StatusCode::FORBIDDEN;
            assert_eq!(refused, has < needs, "{method} {path} with role {has}: {}", answer.status);
            if refused {
                assert_eq!(answer.code(), "UnauthorizedOperation");
            }
        }
    }
    for path in ["/healthz", "/openapi.json"] {
        assert_eq!(rig.with_token(Method::GET, path, None).await.status, StatusCode::OK);
    }
    let tokens = rig.ok(Method::GET, "/v1/tokens", None).await;
    assert!(!tokens.to_string().contains(&read), "a secret is shown once");
    rig.ok(Method::DELETE, "/v1/tokens/read", None).await;
    assert_eq!(rig.with_token(Method::GET, "/v1/instances", bearer(&read)).await.status.as_u16(), 401);
}

#[tokio::test]
async fn more_requests_than_are_taken_on_are_refused() {
    let rig = Rig::new().await;
    let all = rig.api.under_way.clone().acquire_many_owned(UNDER_WAY as u32).await.unwrap();
    let answer = rig.get("/v1/instances").await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (429, "RequestLimitExceeded"));
    drop(all);
    assert_eq!(rig.get("/v1/instances").await.status, StatusCode::OK);
    let _all = rig.api.long_lived.clone().acquire_many_owned(LONG_LIVED as u32).await.unwrap();
    let answer = rig.get("/v1/events").await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (429, "RequestLimitExceeded"));
}

#[tokio::test]
async fn lists_are_filtered_and_come_in_pages() {
    let rig = Rig::new().await;
    let web = rig.run(json!({"min_count": 3, "tags": {"Name": "web", "env": "test"}})).await;
    let db = rig.run(json!({"instance_type": "micro", "tags": {"Name": "db"}})).await;
    let ids = async |query: &str| {
        let list = rig.ok(Method::GET, &format!("/v1/instances?{query}"), None).await;
        let items = list["items"].as_array().unwrap();
        let ids: Vec<String> = items.iter().map(|i| i["id"].as_str().unwrap().to_owned()).collect();
        (ids, list["next_token"].as_str().map(str::to_owned))
    };
    let sorted = |ids: &[String]| {
        let mut ids = ids.to_vec();
        ids.sort();
        ids
    };
    assert_eq!(ids("filter=tag:Name=web").await, (sorted(&web), None));
    assert_eq!(ids("filter=type=micro,state=running").await, (db.clone(), None));
    assert_eq!(ids("filter=tag:Name=w*%7Cd*,state=running").await.0.len(), 4);
    assert_eq!(ids("filter=state=stopped").await, (vec![], None));
    let (first, next) = ids("max_results=3").await;
    let (second, end) = ids(&format!("max_results=3&next_token={}", next.unwrap())).await;
    assert_eq!((first.len(), second.len(), end), (3, 1, None));
    assert_eq!([first, second].concat(), sorted(&[web, db].concat()));
}

#[tokio::test]
async fn the_same_token_runs_nothing_twice_and_a_dry_run_nothing_at_all() {
    let rig = Rig::new().await;
    let first = rig.run(json!({"client_token": "once", "min_count": 2})).await;
    assert_eq!(rig.run(json!({"client_token": "once", "min_count": 2})).await, first);
    let dry = json!({"image": "tiny", "dry_run": true});
    assert_eq!(rig.post("/v1/instances", dry).await.code(), "DryRunOperation");
    let wrong = json!({"image": "none", "dry_run": true});
    assert_eq!(rig.post("/v1/instances", wrong).await.code(), "InvalidImageID.NotFound");
    assert_eq!(rig.ok(Method::GET, "/v1/instances", None).await["items"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_cordoned_host_runs_nothing_new() {
    let rig = Rig::new().await;
    let id = rig.run(json!({})).await.remove(0);
    let host = rig.ok(Method::POST, "/v1/host/cordon", None).await;
    assert_eq!(
        (&host["cordoned"], &host["used"]["vcpus"], &host["instances"]["running"]),
        (&json!(true), &json!(1), &json!(1))
    );
    rig.ok(Method::POST, "/v1/host/cordon", None).await;
    let answer = rig.post("/v1/instances", json!({"image": "tiny"})).await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (507, "InsufficientInstanceCapacity"));
    assert!(answer.text.contains("pulau host uncordon"), "{}", answer.text);
    rig.ok(Method::POST, &format!("/v1/instances/{id}/reboot"), None).await;
    assert_eq!(rig.ok(Method::POST, "/v1/host/uncordon", None).await["cordoned"], json!(false));
    rig.run(json!({})).await;
}

#[tokio::test]
async fn metrics_tell_what_was_asked_and_what_is() {
    let rig = Rig::new().await;
    let id = rig.run(json!({})).await.remove(0);
    rig.get("/v1/nothing").await;
    let answer = rig.get("/metrics").await;
    assert!(
        answer.headers[header::CONTENT_TYPE].to_str().unwrap().starts_with("application/openmetrics-text")
    );
    for line in [
        "pulau_instances{state=\"running\"} 1",
        "pulau_instances{state=\"terminated\"} 0",
        "pulau_capacity_vcpus 8",
        "pulau_used_vcpus 1",
        "pulau_used_memory_bytes 134217728",
        "pulau_cordoned 0",
        "pulau_http_requests_total{route=\"/v1/instances\",method=\"POST\",status=\"201\"} 1",
        "pulau_http_requests_total{route=\"-\",method=\"GET\",status=\"404\"} 1",
        "pulau_boot_seconds_count{phase=\"agent\"} 1",
        "# EOF",
    ] {
        assert!(answer.text.lines().any(|known| known == line), "{line} in\n{}", answer.text);
    }
    for name in
        ["instance_memory_bytes", "instance_cpu_microseconds_total", "instance_network_sent_bytes_total"]
    {
        let line = format!("pulau_{name}{{instance=\"{id}\"}} ");
        assert!(answer.text.contains(&line), "{line} in\n{}", answer.text);
    }
}

#[tokio::test]
async fn events_tell_every_change_of_state_and_begin_where_one_left_off() {
    let rig = Rig::new().await;
    let follow = async |after: Option<&str>| {
        let mut request = Request::builder().uri("/v1/events");
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let response = rig.local.clone().call(request.body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        response.into_body()
    };
    // The next change of an instance's state; root disks and status checks have events of their own in between.
    let next = async |body: &mut Body| loop {
        let frame = tokio::time::timeout(PATIENCE, body.frame()).await.unwrap().unwrap().unwrap();
        let text = String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap();
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
        };
        let data: Value = serde_json::from_str(&field("data:").unwrap()).unwrap();
        match field("event:").as_deref() {
            _ if data["kind"] != "instance" => {}
            Some("state") => return (field("id:").unwrap(), data),
            Some("status") => {
                assert!(data["status"]["agent"].is_string() && data["old_state"] == data["state"])
            }
            other => panic!("{other:?}"),
        }
    };
    let mut live = follow(None).await;
    let id = rig.run(json!({})).await.remove(0);
    let (first, event) = next(&mut live).await;
    assert_eq!(
        (&event["kind"], &event["id"], &event["state"]),
        (&json!("instance"), &json!(id), &json!("pending"))
    );
    assert!(first.starts_with(&format!("{}-", event["revision"])), "{first}");
    let (second, event) = next(&mut live).await;
    assert_eq!((&event["old_state"], &event["state"]), (&json!("pending"), &json!("running")));
    let mut again = follow(Some(&first)).await;
    assert_eq!(next(&mut again).await.0, second);
    rig.ok(Method::DELETE, &format!("/v1/instances/{id}"), None).await;
    let (_, event) = next(&mut again).await;
    assert_eq!(
        (&event["state"], &event["reason"]["code"]),
        (&json!("shutting-down"), &json!("Client.UserInitiatedShutdown"))
    );
    let wrong = Request::builder().uri("/v1/events").header("last-event-id", "x").body(Body::empty());
    assert_eq!(Rig::ask(&rig.local, wrong.unwrap()).await.code(), "MalformedRequest");
    rig.api.end_streams();
    let rest = tokio::time::timeout(PATIENCE, live.collect()).await;
    assert!(rest.is_ok(), "the stream ends with the daemon");
}

#[tokio::test]
async fn a_client_talks_to_the_agent_and_the_console_of_a_guest() {
    let rig = Rig::new().await;
    let id = rig.run(json!({})).await.remove(0);
    let path = rig._dir.path().join("api.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    tokio::spawn(axum::serve(listener, rig.local.clone()).into_future());
    let client = Client(Endpoint::Socket(path));

    let stream = client.upgrade(&format!("/v1/instances/{id}/agent"), AGENT).await.unwrap();
    let run = tokio::task::spawn_blocking(move || {
        let agent = Connection::new(stream, None).unwrap();
        let request = ExecRequest { argv: vec!["exit".into(), "7".into()], ..Default::default() };
        agent.output(&request, &[b'x'; 300_000]).unwrap()
    });
    let output = tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap();
    assert_eq!(output.status.shell_code(), 7);
    assert_eq!(output.stdout.len(), "exit 7\n".len() + 300_000);

    let mut stream = client.upgrade(&format!("/v1/instances/{id}/console/attach"), CONSOLE).await.unwrap();
    let echo = tokio::task::spawn_blocking(move || {
        stream.write_all(b"hello").unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).unwrap();
        text
    });
    assert_eq!(&tokio::time::timeout(PATIENCE, echo).await.unwrap().unwrap(), b"hello");
    // Both are closed at their ends by now; what they took is given back.
    let closed = async {
        while rig.api.long_lived.available_permits() < LONG_LIVED {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.unwrap();

    let refused = client.upgrade(&format!("/v1/instances/{id}/agent"), CONSOLE).await.unwrap_err();
    assert!(refused.to_string().contains("Upgrade: pulau-agent"), "{refused}");
    let nobody = client.upgrade("/v1/instances/i-00000000000000000/agent", AGENT).await.unwrap_err();
    assert!(nobody.to_string().contains("InvalidInstanceID.NotFound"), "{nobody}");
}

#[test]
fn the_description_that_is_kept_is_the_one_that_is_served() {
    let kept: Value = serde_json::from_str(include_str!("../../openapi.json")).unwrap();
    let served = serde_json::to_value(openapi()).unwrap();
    assert!(kept == served, "renew it: cargo run -p pulau -- openapi > api/openapi.json");
}

#[test]
fn everything_in_the_description_is_described() {
    let document = serde_json::to_value(openapi()).unwrap();
    let said = |value: &Value| value.as_str().is_some_and(|text| text.len() > 3);
    let mut missing = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            if !said(&operation["summary"]) && !said(&operation["description"]) {
                missing.push(format!("{method} {path}"));
            }
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                if !said(&parameter["description"]) {
                    missing.push(format!("{method} {path}: {}", parameter["name"]));
                }
            }
            for (status, response) in operation["responses"].as_object().unwrap() {
                if !said(&response["description"]) {
                    missing.push(format!("{method} {path}: answer {status}"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "not described: {missing:#?}");
}

#[tokio::test]
async fn groups_and_load_balancers_are_made_changed_found_and_removed() {
    let rig = Rig::new().await;
    let post = async |path: &str, body: Value| rig.send(Method::POST, path, Some(body)).await;
    let template = json!({"image": "tiny", "instance_type": "nano", "root_size_gib": 1});
    let group = json!({"name": "web", "template": template, "desired_capacity": 1, "max_size": 2,
        "scaling": {"cpu_percent": 60}, "tags": {"env": "test"}});
    let made = post("/v1/groups", group.clone()).await;
    assert_eq!((made.status, &made.json()["desired_capacity"]), (StatusCode::ACCEPTED, &json!(1)));
    let id = made.json()["id"].as_str().unwrap().to_owned();
    let again = post("/v1/groups", group).await;
    assert_eq!(
        (again.status, again.code().as_str()),
        (StatusCode::CONFLICT, "InvalidAutoScalingGroup.Duplicate")
    );
    let listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let balancer = json!({"name": "lb", "protocol": "tcp", "listen": listen, "group": "web"});
    let made = post("/v1/load-balancers", balancer.clone()).await;
    assert_eq!((made.status, &made.json()["group_id"]), (StatusCode::ACCEPTED, &json!(id)));
    let taken = post(
        "/v1/load-balancers",
        json!({"name": "other", "protocol": "tcp", "listen": listen, "group": id}),
    );
    assert_eq!(taken.await.code(), "PortInUse");

    let found = async |path: &str| {
        let list = rig.send(Method::GET, path, None).await.json();
        list["items"].as_array().map_or(usize::MAX, Vec::len)
    };
    assert_eq!(found("/v1/groups?filter=name=w*,tag:env=test").await, 1);
    assert_eq!(found("/v1/groups?filter=name=x*").await, 0);
    assert_eq!(found("/v1/load-balancers?filter=name=lb").await, 1);
    let bad = rig.send(Method::GET, "/v1/groups?filter=colour=red", None).await;
    assert_eq!(bad.code(), "InvalidParameterValue");
    let changed =
        rig.send(Method::PATCH, "/v1/groups/web", Some(json!({"scaling": null, "desired_capacity": 2})));
    let changed = changed.await.json();
    assert_eq!((&changed["scaling"], &changed["desired_capacity"]), (&Value::Null, &json!(2)));
    assert_eq!(post("/v1/groups/web/rollback", json!({})).await.code(), "IncorrectGroupState");
    assert_eq!(post("/v1/groups/nope/roll", json!({})).await.code(), "InvalidAutoScalingGroup.NotFound");
    let paused = post("/v1/groups/web/pause", json!({})).await.json();
    assert_eq!(paused["paused"], true);
    let resumed = post("/v1/groups/web/resume", json!({})).await;
    assert_eq!(resumed.status, StatusCode::OK);
    let metrics = rig.send(Method::GET, "/metrics", None).await.text;
    assert!(metrics.contains("pulau_group_desired_capacity{group=\"web\"} 2"), "{metrics}");
    assert!(metrics.contains("pulau_load_balancer_connections_total{load_balancer=\"lb\"} 0"), "{metrics}");

    let in_use = rig.send(Method::DELETE, "/v1/groups/web", None).await;
    assert_eq!(in_use.code(), "DependencyViolation");
    let gone = rig.send(Method::DELETE, "/v1/load-balancers/lb", None).await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    let gone = rig.send(Method::GET, "/v1/load-balancers/lb", None).await;
    assert_eq!(gone.code(), "LoadBalancerNotFound");
    let gone = rig.send(Method::DELETE, "/v1/groups/web?keep_instances=true", None).await;
    assert_eq!(gone.status, StatusCode::ACCEPTED);
}
