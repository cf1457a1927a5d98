use super::*;

const LIMITS: Limits = Limits { head: 512, body: 100 };

fn head(bytes: &[u8]) -> Result<Option<Head<'_>>, ParseError> {
    Head::parse(bytes, LIMITS)
}

fn complete(bytes: &[u8]) -> Head<'_> {
    head(bytes).unwrap().unwrap()
}

#[test]
fn reads_a_request_as_curl_sends_it() {
    let bytes = b"PUT /machine-config HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/7.88.1\r\n\
        Accept: application/json\r\nContent-Length: 5\r\n\r\nhello";
    let head = complete(bytes);
    assert_eq!((head.method, head.path), ("PUT", "/machine-config"));
    assert_eq!((head.content_length, &bytes[head.len..]), (5, &b"hello"[..]));
    assert!(head.keep_alive && !head.expects_continue);
    assert_eq!(head.header("accept"), Some("application/json"));
    assert_eq!(head.header("X-None"), None);
}

#[test]
fn every_prefix_of_a_head_is_incomplete() {
    let bytes = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    for len in 0..bytes.len() {
        assert!(head(&bytes[..len]).unwrap().is_none(), "{len}");
    }
    assert!(!complete(bytes).keep_alive);
}

#[test]
fn keep_alive_follows_version_and_header() {
    for (request, keep) in [
        ("GET / HTTP/1.1\r\n\r\n", true),
        ("GET / HTTP/1.0\r\n\r\n", false),
        ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", true),
        ("GET / HTTP/1.1\r\nconnection: TE, close\r\n\r\n", false),
    ] {
        assert_eq!(complete(request.as_bytes()).keep_alive, keep, "{request}");
    }
}

#[test]
fn absolute_targets_lose_scheme_and_host() {
    for (target, path) in
        [("/", "/"), ("/drives/a", "/drives/a"), ("http://localhost/vm", "/vm"), ("http://localhost", "/")]
    {
        assert_eq!(complete(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes()).path, path);
    }
    for target in ["*", "localhost:80", "https://a/b"] {
        let bytes = format!("GET {target} HTTP/1.1\r\n\r\n");
        assert!(matches!(head(bytes.as_bytes()), Err(ParseError::Malformed(_))), "{target}");
    }
}

#[test]
fn refuses_lengths_that_are_not_one_number() {
    for value in ["", "-1", "+1", "1 1", "0x1", "1.0", "99999999999999999999", "5\r\nContent-Length: 6"] {
        let bytes = format!("PUT / HTTP/1.1\r\nContent-Length: {value}\r\n\r\n");
        assert!(matches!(head(bytes.as_bytes()), Err(ParseError::Malformed(_))), "{value}");
    }
    let twice = b"PUT / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n";
    assert_eq!(complete(twice).content_length, 5);
}

#[test]
fn limits_are_exact() {
    let put = |n: u64| format!("PUT / HTTP/1.1\r\nContent-Length: {n}\r\n\r\n");
    assert_eq!(complete(put(100).as_bytes()).content_length, 100);
    let error = head(put(101).as_bytes()).unwrap_err();
    assert_eq!(error, ParseError::BodyTooLarge { size: 101, limit: 100 });
    assert_eq!(error.status().code(), 413);
    assert!(matches!(head(put(u64::MAX).as_bytes()), Err(ParseError::BodyTooLarge { .. })));

    let long = |n: usize| format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(n));
    let fits = 512 - long(0).len();
    assert_eq!(complete(long(fits).as_bytes()).len, 512);
    let error = head(long(fits + 1).as_bytes()).unwrap_err();
    assert_eq!((error.status().code(), error), (431, ParseError::HeadTooLarge { limit: 512 }));
}

#[test]
fn refuses_what_it_cannot_frame() {
    let chunked = b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(head(chunked).unwrap_err().status().code(), 411);
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
    for bytes in [
        "GET / HTTP/2.0\r\n\r\n",
        "GET /\r\n\r\n",
        "\0\0\0\0",
        "GET / HTTP/1.1\r\nbad header: x\r\n\r\n",
        "GET / HTTP/1.1\r\nx: \0\r\n\r\n",
        &many,
    ] {
        let error = head(bytes.as_bytes()).unwrap_err();
        assert_eq!(error.status().code(), 400, "{bytes:?}");
    }
}

#[test]
fn writes_responses() {
    let mut out = Vec::new();
    Response::json(Status::Ok, "{}".into()).write(&mut out, "s", true);
    let text = "HTTP/1.1 200 OK\r\nServer: s\r\nConnection: keep-alive\r\n\
        Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    assert_eq!(std::str::from_utf8(&out).unwrap(), text);
    out.clear();
    let response = Response::empty(Status::NoContent).with_header("Deprecation", "true");
    response.write(&mut out, "s", false);
    let text = "HTTP/1.1 204 No Content\r\nServer: s\r\nConnection: close\r\nDeprecation: true\r\n\r\n";
    assert_eq!(std::str::from_utf8(&out).unwrap(), text);
}
