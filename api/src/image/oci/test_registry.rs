//! A registry that misbehaves on demand. The real one is in `registry_tests`.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// What the registry does besides answering.
#[derive(Clone, Default)]
pub struct Manners {
    /// Closes the connection after this many bytes of a blob.
    pub dies_after: Option<usize>,
    /// Answers requests for a part with the whole.
    pub no_ranges: bool,
    /// Wants this for `Authorization`, else answers 401 with the challenge.
    pub wants: Option<(String, String)>,
    /// Answers so many requests with 500 first.
    pub failures: usize,
}

#[derive(Default)]
struct State {
    paths: HashMap<String, Vec<u8>>,
    manners: Manners,
    /// Requests, as `path range authorization`.
    seen: Vec<String>,
}

#[derive(Clone)]
pub struct TestRegistry {
    pub address: String,
    state: Arc<Mutex<State>>,
}

impl TestRegistry {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        // Ends with the test program.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = shared.clone();
                std::thread::spawn(move || drop(answer(stream.unwrap(), &state)));
            }
        });
        TestRegistry { address, state }
    }

    pub fn put(&self, path: &str, body: &[u8]) {
        self.state.lock().unwrap().paths.insert(path.to_owned(), body.to_owned());
    }

    pub fn be(&self, manners: Manners) {
        self.state.lock().unwrap().manners = manners;
    }

    pub fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut authorization) = (None, String::new());
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                range = value
                    .strip_prefix("bytes=")
                    .and_then(|v| v.strip_suffix('-'))
                    .and_then(|v| v.parse().ok())
            }
            "authorization" => authorization = value.to_owned(),
            _ => {}
        }
    }
    let (body, manners) = {
        let mut state = state.lock().unwrap();
        state.seen.push(format!("{path} {} {authorization}", range.unwrap_or(0usize)));
        let manners = state.manners.clone();
        state.manners.failures = manners.failures.saturating_sub(1);
        (state.paths.get(path.split('?').next().unwrap_or_default()).cloned(), manners)
    };
    let mut head = |status: &str, more: &str, length: usize| {
        write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n")
    };
    if manners.failures > 0 {
        return head("500 Internal Server Error", "", 0);
    }
    let asks = manners.wants.filter(|(wants, _)| path.starts_with("/v2/") && authorization != *wants);
    if let Some((_, challenge)) = asks {
        return head("401 Unauthorized", &format!("WWW-Authenticate: {challenge}\r\n"), 0);
    }
    let Some(body) = body else { return head("404 Not Found", "", 0) };
    let start = range.filter(|_| !manners.no_ranges).unwrap_or(0);
    let rest = &body[start.min(body.len())..];
    head(if start > 0 { "206 Partial Content" } else { "200 OK" }, "", rest.len())?;
    let most = if path.contains("/blobs/") { manners.dies_after } else { None };
    stream.write_all(&rest[..rest.len().min(most.unwrap_or(usize::MAX))])
}
