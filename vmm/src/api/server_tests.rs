use super::*;
use crate::event_loop::EventLoop;
use crate::http::{Response, Status};
use std::io::{Read, Write};
use std::time::Duration;

struct Test {
    event_loop: EventLoop,
    server: ApiServer,
    dir: tempfile::TempDir,
    handled: usize,
}

impl Test {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = ApiSocket::bind(&dir.path().join("api")).unwrap();
        let event_loop = EventLoop::new().unwrap();
        let server = ApiServer::new(socket, event_loop.own_events(), 100, 51_200).unwrap();
        Self { event_loop, server, dir, handled: 0 }
    }

    fn connect(&self) -> UnixStream {
        let client = UnixStream::connect(self.dir.path().join("api")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    /// Lets the server work until it waits.
    fn run(&mut self) {
        loop {
            let events = self.event_loop.run_once(0).unwrap();
            if events.is_empty() {
                return;
            }
            for event in events {
                let handled = &mut self.handled;
                self.server.process(event.token, &mut |_, path, _| {
                    *handled += 1;
                    Response::json(Status::Ok, path.repeat(if path == "/big" { 1 << 18 } else { 1 }))
                });
            }
        }
    }

    fn open_connections(&self) -> usize {
        self.server.slots.iter().flatten().count()
    }
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\n\r\n")
}

/// Reads one response's head and body.
fn read_response(client: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).unwrap();
    let length = head.split("Content-Length: ").nth(1).unwrap().split('\r').next().unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    client.read_exact(&mut body).unwrap();
    head + &String::from_utf8(body).unwrap()
}

#[test]
fn clients_are_served_over_connections_that_stay_open() {
    let mut test = Test::new();
    let mut clients = [test.connect(), test.connect()];
    test.run();
    for path in ["/a", "/b"] {
        for client in &mut clients {
            client.write_all(get(path).as_bytes()).unwrap();
            test.run();
            assert!(read_response(client).ends_with(path));
        }
    }
    assert_eq!(test.open_connections(), 2);
    drop(clients);
    test.run();
    assert_eq!(test.open_connections(), 0);
}

#[test]
fn a_slow_reader_delays_nobody_and_loses_nothing() {
    let mut test = Test::new();
    let mut slow = test.connect();
    slow.write_all(get("/big").repeat(3).as_bytes()).unwrap();
    test.run();
    assert_eq!(test.handled, 1);
    let mut quick = test.connect();
    quick.write_all(get("/q").as_bytes()).unwrap();
    test.run();
    assert!(read_response(&mut quick).ends_with("/q"));
    let mut got = 0;
    let mut chunk = vec![0; 1 << 16];
    while got < 3 << 20 {
        test.run();
        got += slow.read(&mut chunk).unwrap();
    }
    test.run();
    assert_eq!(test.handled, 4);
    slow.write_all(get("/q").as_bytes()).unwrap();
    test.run();
    assert_eq!(test.handled, 5);
}

#[test]
fn an_eleventh_connection_takes_the_place_of_the_quietest_idle_one() {
    let mut test = Test::new();
    let mut clients: Vec<_> = (0..MAX_CONNECTIONS).map(|_| test.connect()).collect();
    test.run();
    assert_eq!(test.open_connections(), MAX_CONNECTIONS);
    // The first is in the middle of a request, the second has been heard of last.
    clients[0].write_all(b"GET /").unwrap();
    test.run();
    clients[1].write_all(get("/1").as_bytes()).unwrap();
    test.run();
    read_response(&mut clients[1]);
    let mut new = test.connect();
    new.write_all(get("/new").as_bytes()).unwrap();
    test.run();
    assert!(read_response(&mut new).ends_with("/new"));
    assert_eq!(clients[2].read(&mut [0]).unwrap(), 0);
    for client in &mut clients[..2] {
        client.write_all(b"GET /x HTTP/1.1\r\n\r\n").unwrap();
    }
    test.run();
    assert!(read_response(&mut clients[1]).ends_with("/x"));
    // Where every one is in the middle of a request, the quietest goes all the same.
    for client in &mut clients[3..] {
        client.write_all(b"GET /").unwrap();
    }
    test.run();
    for _ in 0..MAX_CONNECTIONS {
        let mut client = test.connect();
        client.write_all(get("/again").as_bytes()).unwrap();
        test.run();
        assert!(read_response(&mut client).ends_with("/again"));
        client.write_all(b"GET /").unwrap();
        clients.push(client);
        test.run();
    }
    assert_eq!(test.open_connections(), MAX_CONNECTIONS);
}

#[test]
fn a_socket_is_not_taken_from_another_and_not_left_behind() {
    let test = Test::new();
    let path = test.dir.path().join("api");
    let error = ApiSocket::bind(&path).unwrap_err();
    assert!(matches!(error, ServerError::Exists { .. }));
    assert!(error.to_string().contains("/api\" already exists"), "{error}");
    assert!(path.exists());
    let Test { server, dir, .. } = test;
    drop(server);
    assert!(!path.exists());

    let none = ApiSocket::bind(&dir.path().join("no/api")).unwrap_err().to_string();
    assert!(none.contains("No such file"), "{none}");
    let long = ApiSocket::bind(&dir.path().join("a".repeat(108))).unwrap_err();
    assert!(matches!(long, ServerError::TooLong { .. }));
}
