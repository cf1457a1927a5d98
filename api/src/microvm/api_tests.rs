//! The client against servers that answer well, badly, late and not at all.

use std::path::PathBuf;

use pulau_vmm::config::{ActionConfig, ActionType, InstanceInfo, VmState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::*;

/// A server that reads one request for each answer, and keeps what it read.
struct Server {
    dir: tempfile::TempDir,
    requests: tokio::task::JoinHandle<Vec<String>>,
}

impl Server {
    fn start(answers: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("api.sock")).unwrap();
        let answers: Vec<String> = answers.iter().map(|a| (*a).to_owned()).collect();
        let requests = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut requests = Vec::new();
            for answer in answers {
                let mut buffer = vec![0; 4096];
                let length = stream.read(&mut buffer).await.unwrap();
                requests.push(String::from_utf8(buffer[..length].to_vec()).unwrap());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            requests
        });
        Server { dir, requests }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    async fn connect(&self) -> Api {
        Api::connect(&self.socket(), Duration::from_millis(500)).await.unwrap()
    }
}

const NO_CONTENT: &str = "HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n";

fn with_body(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn several_requests_share_one_connection() {
    let info = r#"{"id":"a","state":"Paused","vmm_version":"1","app_name":"x"}"#;
    let server = Server::start(&[NO_CONTENT, &with_body("200 OK", info)]);
    let mut api = server.connect().await;
    api.put("/actions", &ActionConfig { action_type: ActionType::InstanceStart }).await.unwrap();
    let info: InstanceInfo = api.get("/").await.unwrap();
    assert_eq!(info.state, VmState::Paused);
    let requests = server.requests.await.unwrap();
    assert!(requests[0].starts_with("PUT /actions HTTP/1.1\r\n"), "{}", requests[0]);
    assert!(requests[0].ends_with(r#"{"action_type":"InstanceStart"}"#), "{}", requests[0]);
    assert!(requests[1].starts_with("GET / HTTP/1.1\r\n"), "{}", requests[1]);
}

#[tokio::test]
async fn a_refusal_carries_its_reason() {
    let server = Server::start(&[
        &with_body("400 Bad Request", r#"{"fault_message":"boot-source: no such file"}"#),
        &with_body("500 Internal Server Error", "oops"),
    ]);
    let mut api = server.connect().await;
    let error = api.put("/boot-source", &()).await.unwrap_err();
    assert_eq!(error.to_string(), "boot-source: no such file");
    let error = api.put("/boot-source", &()).await.unwrap_err();
    assert!(matches!(&error, ApiError::Refused { status, .. } if status.as_u16() == 500));
    assert!(error.to_string().contains("without a reason"));
}

#[tokio::test]
async fn silence_is_bounded() {
    let server = Server::start(&["", "never read"]);
    let error = server.connect().await.get::<InstanceInfo>("/").await.unwrap_err();
    assert!(matches!(error, ApiError::TimedOut { .. }), "{error}");
}

#[tokio::test]
async fn a_broken_connection_and_a_foreign_answer_are_told_apart() {
    let server = Server::start(&[""]);
    let error = server.connect().await.put("/vm", &()).await.unwrap_err();
    assert!(matches!(error, ApiError::Broken { .. }), "{error}");
    let server = Server::start(&[&with_body("200 OK", "[1]")]);
    let error = server.connect().await.get::<InstanceInfo>("/").await.unwrap_err();
    assert!(matches!(error, ApiError::Answer { .. }), "{error}");
}

#[tokio::test]
async fn a_flood_is_bounded() {
    let flood = with_body("200 OK", &" ".repeat(MAX_ANSWER + 1));
    let server = Server::start(&[&flood]);
    let error = server.connect().await.get::<InstanceInfo>("/").await.unwrap_err();
    assert!(matches!(error, ApiError::Answer { .. }), "{error}");
}

#[tokio::test]
async fn no_socket_no_connection() {
    let dir = tempfile::tempdir().unwrap();
    let error = Api::connect(&dir.path().join("none"), Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(error, ApiError::Connect(e) if e.kind() == io::ErrorKind::NotFound));
}
