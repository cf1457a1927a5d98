use super::*;
use crate::http::Status;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

/// A client as the connection sees it.
#[derive(Default)]
struct Wire {
    /// What each read brings; an empty one is the end of the stream.
    incoming: VecDeque<Vec<u8>>,
    /// How many bytes are taken yet.
    room: usize,
    outgoing: Vec<u8>,
    finished: bool,
}

#[derive(Clone, Default)]
struct Client(Rc<RefCell<Wire>>);

impl Read for Client {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        let Some(mut bytes) = wire.incoming.pop_front() else {
            return Err(ErrorKind::WouldBlock.into());
        };
        let count = bytes.len().min(buffer.len());
        buffer[..count].copy_from_slice(&bytes[..count]);
        if count < bytes.len() {
            wire.incoming.push_front(bytes.split_off(count));
        }
        Ok(count)
    }
}

impl Write for Client {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        let count = bytes.len().min(wire.room);
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        wire.room -= count;
        wire.outgoing.extend_from_slice(&bytes[..count]);
        Ok(count)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Client {
    fn finish(&self) {
        self.0.borrow_mut().finished = true;
    }
}

const LIMITS: Limits = Limits { head: 1024, body: 100_000 };

struct Test {
    client: Client,
    connection: Connection<Client>,
    /// `METHOD path body` of each request that was handled.
    handled: Vec<String>,
    /// Length of the bodies to answer with.
    answer: usize,
}

impl Test {
    fn new() -> Self {
        let client = Client::default();
        client.0.borrow_mut().room = usize::MAX;
        Self { connection: Connection::new(client.clone()), client, handled: Vec::new(), answer: 2 }
    }

    fn advance(&mut self) -> Next {
        let (handled, answer) = (&mut self.handled, self.answer);
        self.connection.advance(LIMITS, &mut |method, path, body| {
            handled.push(format!("{method} {path} {}", String::from_utf8_lossy(body)));
            Response::json(Status::Ok, "x".repeat(answer))
        })
    }

    /// One read's worth of input.
    fn feed(&mut self, bytes: impl AsRef<[u8]>) -> Next {
        self.client.0.borrow_mut().incoming.push_back(bytes.as_ref().to_vec());
        self.advance()
    }

    /// What was sent since the last call.
    fn sent(&mut self) -> String {
        String::from_utf8(std::mem::take(&mut self.client.0.borrow_mut().outgoing)).unwrap()
    }

    fn statuses(&mut self) -> Vec<String> {
        self.sent().split("HTTP/1.1 ").skip(1).map(|answer| answer[..3].to_owned()).collect()
    }

    fn buffered(&self) -> usize {
        self.connection.input.capacity() + self.connection.output.capacity()
    }
}

fn put(body: &str) -> String {
    format!("PUT /a HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn a_request_at_once_is_answered_at_once() {
    let mut test = Test::new();
    assert_eq!(test.feed(put("hello")), Next::Read);
    assert_eq!(test.handled, ["PUT /a hello"]);
    assert_eq!(test.statuses(), ["200"]);
    assert!(test.connection.is_idle());
    assert_eq!(test.advance(), Next::Read);
}

#[test]
fn a_request_byte_by_byte_is_answered_once() {
    let mut test = Test::new();
    for byte in put("hello").as_bytes() {
        assert!(test.handled.is_empty());
        assert_eq!(test.feed([*byte]), Next::Read);
    }
    assert_eq!(test.handled, ["PUT /a hello"]);
}

#[test]
fn requests_can_be_split_anywhere() {
    let both = put("hello") + &put("you");
    for at in 1..both.len() {
        let mut test = Test::new();
        test.feed(&both[..at]);
        test.feed(&both[at..]);
        assert_eq!(test.handled, ["PUT /a hello", "PUT /a you"], "{at}");
        assert_eq!(test.statuses(), ["200", "200"]);
    }
}

#[test]
fn pipelined_requests_are_answered_in_order_until_one_closes() {
    let mut test = Test::new();
    let last = "GET /last HTTP/1.1\r\nConnection: close\r\n\r\n";
    let all = put("1") + &put("2") + last + &put("never");
    assert_eq!(test.feed(all), Next::Close);
    assert_eq!(test.handled, ["PUT /a 1", "PUT /a 2", "GET /last "]);
    let sent = test.sent();
    assert_eq!(sent.matches("Connection: keep-alive").count(), 2);
    assert_eq!(sent.matches("Connection: close").count(), 1);
}

#[test]
fn a_client_that_stops_sending_still_gets_its_answer() {
    let mut test = Test::new();
    test.client.0.borrow_mut().room = 0;
    assert_eq!(test.feed(put("a")), Next::Write);
    test.client.0.borrow_mut().incoming.push_back(vec![]);
    assert_eq!(test.advance(), Next::Write);
    test.client.0.borrow_mut().room = usize::MAX;
    assert_eq!(test.advance(), Next::Close);
    assert_eq!(test.statuses(), ["200"]);
}

#[test]
fn a_client_that_leaves_in_a_request_is_dropped() {
    let mut test = Test::new();
    test.feed(&put("hello")[..20]);
    assert_eq!(test.feed(""), Next::Close);
    assert!(test.handled.is_empty());
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let mut test = Test::new();
    test.answer = 40_000;
    test.client.0.borrow_mut().room = 100;
    let many = put("1").repeat(100);
    assert_eq!(test.feed(&many), Next::Write);
    // Two answers exceed what is kept ready; the other requests wait.
    assert_eq!(test.handled.len(), 2);
    for _ in 0..100 {
        assert_eq!(test.feed(&many), Next::Write);
    }
    assert_eq!(test.handled.len(), 2);
    assert!(test.buffered() < 200_000, "{}", test.buffered());
    test.client.0.borrow_mut().incoming.clear();
    test.client.0.borrow_mut().room = usize::MAX;
    assert_eq!(test.advance(), Next::Read);
    assert_eq!(test.handled.len(), 100);
    assert!(test.buffered() <= 2 * KEPT);
}

#[test]
fn expect_continue_is_answered_once_and_only_when_the_body_is_missing() {
    let head = "PUT /a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    let mut test = Test::new();
    test.feed(head);
    assert_eq!(test.statuses(), ["100"]);
    test.feed("ab");
    assert!(test.statuses().is_empty());
    test.feed("cd");
    assert_eq!(test.statuses(), ["200"]);
    test.feed(head);
    assert_eq!(test.statuses(), ["100"]);
    test.feed("abcd");
    test.statuses();
    test.feed(format!("{head}abcd"));
    assert_eq!(test.statuses(), ["200"]);
    let large = head.replace("4\r", "100001\r");
    test.feed(large);
    assert_eq!(test.statuses(), ["413"]);
}

#[test]
fn what_is_not_http_is_answered_and_then_thrown_away() {
    for (request, status) in [
        ("nonsense\r\n\r\n".to_owned(), "400"),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello".to_owned(), "411"),
        ("PUT / HTTP/1.1\r\nContent-Length: 100001\r\n\r\n".to_owned(), "413"),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(1024)), "431"),
        ("a".repeat(1024), "431"),
    ] {
        let mut test = Test::new();
        assert_eq!(test.feed(put("first") + &request), Next::Read, "{request}");
        assert!(test.client.0.borrow().finished);
        let sent = test.sent();
        assert!(sent.contains(&format!("HTTP/1.1 {status} ")), "{sent}");
        assert!(sent.contains("{\"fault_message\":\""), "{sent}");
        assert_eq!(test.feed(put("more")), Next::Read);
        assert_eq!(test.handled, ["PUT /a first"]);
        assert_eq!(test.connection.input.capacity(), 0);
        assert_eq!(test.feed(""), Next::Close);
    }
}

#[test]
fn throwing_away_ends() {
    let mut test = Test::new();
    test.feed("nonsense\r\n\r\n");
    let mut total = 0;
    while test.feed([0; CHUNK]) == Next::Read {
        total += CHUNK;
        assert!(total <= DRAIN_LIMIT);
    }
}

#[test]
fn a_slow_head_is_bounded() {
    let mut test = Test::new();
    for _ in 0..1023 {
        assert_eq!(test.feed("a"), Next::Read);
    }
    assert!(test.statuses().is_empty());
    test.feed("a");
    assert_eq!(test.statuses(), ["431"]);
}

#[test]
fn a_body_as_large_as_allowed_is_taken_in_pieces() {
    let mut test = Test::new();
    let body = "b".repeat(LIMITS.body);
    for piece in put(&body).as_bytes().chunks(700) {
        test.feed(piece);
    }
    assert_eq!(test.handled, [format!("PUT /a {body}")]);
    assert!(test.buffered() <= 2 * KEPT);
}
