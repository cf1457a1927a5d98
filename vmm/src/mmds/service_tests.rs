use super::*;
use std::time::Duration;

struct Guest {
    mmds: Mmds,
    now: Instant,
}

impl Guest {
    fn new(version: MmdsVersion, imds_compat: bool) -> Self {
        let mut mmds = Mmds::new(1000);
        mmds.put(serde_json::json!({"latest": {"meta-data": {"id": "i-1", "n": 1}}})).unwrap();
        mmds.configure(version, imds_compat);
        Self { mmds, now: Instant::now() }
    }

    /// Status and body of the answer.
    fn ask(&mut self, request: &str) -> (u16, String) {
        let text = self.ask_raw(request);
        let status = text.split(' ').nth(1).unwrap().parse().unwrap();
        (status, text.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    fn ask_raw(&mut self, request: &str) -> String {
        let request = request.replace('\n', "\r\n") + "\r\n\r\n";
        match self.mmds.serve(request.as_bytes(), self.now) {
            Served::Response { consumed, bytes, .. } => {
                assert_eq!(consumed, request.len());
                String::from_utf8(bytes).unwrap()
            }
            Served::Incomplete => panic!("incomplete"),
        }
    }

    fn token(&mut self) -> String {
        let (status, token) = self.ask("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: 60");
        assert_eq!(status, 200);
        token
    }
}

const ID: &str = "GET /latest/meta-data/id HTTP/1.1";

#[test]
fn version_1_needs_no_token() {
    let mut guest = Guest::new(MmdsVersion::V1, false);
    assert_eq!(guest.ask(ID), (200, "i-1".into()));
    assert_eq!(guest.ask(&format!("{ID}\nX-metadata-token: wrong")), (200, "i-1".into()));
    assert_eq!(guest.ask("GET /latest/meta-data/n HTTP/1.1").0, 501);
    let (status, body) = guest.ask("GET /no HTTP/1.1");
    assert_eq!((status, body.as_str()), (404, "Resource not found: /no."));
}

#[test]
fn version_2_needs_a_valid_token() {
    let mut guest = Guest::new(MmdsVersion::V2, false);
    assert_eq!(guest.ask(ID).0, 401);
    assert_eq!(guest.ask(&format!("{ID}\nX-metadata-token: wrong")).0, 401);
    let token = guest.token();
    for header in ["X-metadata-token", "x-aws-ec2-metadata-token"] {
        assert_eq!(guest.ask(&format!("{ID}\n{header}: {token}")), (200, "i-1".into()));
    }
    guest.now += Duration::from_secs(60);
    assert_eq!(guest.ask(&format!("{ID}\nX-metadata-token: {token}")).0, 401);
}

#[test]
fn format_follows_accept_unless_compatible_with_imds() {
    let mut guest = Guest::new(MmdsVersion::V1, false);
    let object = "GET /latest/meta-data/ HTTP/1.1";
    assert_eq!(guest.ask(object).1, "id\nn");
    assert_eq!(guest.ask(&format!("{object}\nAccept: */*")).1, "id\nn");
    let accept_json = format!("{object}\nAccept: text/html, Application/JSON;q=0.5");
    assert!(guest.ask_raw(&accept_json).contains("Content-Type: application/json\r\n"));
    assert_eq!(guest.ask(&accept_json).1, r#"{"id":"i-1","n":1}"#);
    let mut guest = Guest::new(MmdsVersion::V1, true);
    assert_eq!(guest.ask(&accept_json).1, "id\nn");
    assert!(guest.ask_raw(&accept_json).contains("Content-Type: text/plain\r\n"));
}

#[test]
fn tokens_need_a_lifetime_and_no_proxy() {
    let mut guest = Guest::new(MmdsVersion::V2, false);
    let put = "PUT /latest/api/token HTTP/1.1";
    assert_eq!(guest.ask(put).0, 400);
    for (ttl, status) in
        [("1", 200), ("21600", 200), ("0", 400), ("21601", 400), ("-1", 400), ("x", 400), ("", 400)]
    {
        let request = format!("{put}\nX-aws-ec2-metadata-token-ttl-seconds: {ttl}");
        assert_eq!(guest.ask(&request).0, status, "{ttl}");
        assert_eq!(guest.ask(&format!("{request}\nx-forwarded-for: a")).0, 400);
    }
    let answer = guest.ask_raw(&format!("{put}\nX-aws-ec2-metadata-token-ttl-seconds: 5"));
    assert!(answer.contains("X-aws-ec2-metadata-token-ttl-seconds: 5\r\n"), "{answer}");
    assert_eq!(guest.ask("PUT /latest/meta-data HTTP/1.1\nX-metadata-token-ttl-seconds: 5").0, 404);
}

#[test]
fn other_methods_are_refused() {
    let mut guest = Guest::new(MmdsVersion::V1, false);
    for method in ["POST", "PATCH", "DELETE", "HEAD", "OPTIONS"] {
        let answer = guest.ask_raw(&format!("{method} / HTTP/1.1"));
        assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("Allow: GET, PUT\r\n"));
    }
}

#[test]
fn requests_come_in_pieces_and_together() {
    let mut guest = Guest::new(MmdsVersion::V1, false);
    let one = format!("{ID}\r\nContent-Length: 3\r\n\r\nabc");
    for len in 0..one.len() {
        assert_eq!(guest.mmds.serve(&one.as_bytes()[..len], guest.now), Served::Incomplete);
    }
    let two = format!("{one}{ID}\r\nConnection: close\r\n\r\n");
    let Served::Response { consumed, keep_alive: true, .. } = guest.mmds.serve(two.as_bytes(), guest.now)
    else {
        panic!()
    };
    assert_eq!(consumed, one.len());
    let rest = &two.as_bytes()[consumed..];
    let served = guest.mmds.serve(rest, guest.now);
    assert!(matches!(served, Served::Response { keep_alive: false, consumed, .. } if consumed == rest.len()));
}

#[test]
fn garbage_ends_the_connection() {
    let mut guest = Guest::new(MmdsVersion::V1, false);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(5000));
    let big = "PUT / HTTP/1.1\r\nContent-Length: 1025\r\n\r\n";
    for (bytes, status) in [("\0\r\n", "400"), (long.as_str(), "431"), (big, "413")] {
        let Served::Response { consumed, bytes: answer, keep_alive: false } =
            guest.mmds.serve(bytes.as_bytes(), guest.now)
        else {
            panic!()
        };
        assert_eq!(consumed, bytes.len());
        assert_eq!(&answer[9..12], status.as_bytes());
    }
}
