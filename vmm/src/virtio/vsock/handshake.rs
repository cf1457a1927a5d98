//! The line a host client opens a connection with: `CONNECT <port>\n`, as Firecracker's vsock device
//! takes it. What follows the line belongs to the stream and is left in the socket.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;

use super::socket;

/// Longest line taken, with its end.
const MAX_LINE: usize = 32;

/// How far a handshake has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line is not complete yet.
    Waiting,
    /// The client asks for this port of the guest.
    Port(u32),
    /// Not a handshake, or the client left.
    Failed,
}

/// Looks at what the client sent so far, and takes the line when it is complete.
pub fn read(stream: &mut UnixStream) -> Progress {
    let mut buffer = [0; MAX_LINE];
    let len = match socket::peek(stream, &mut buffer) {
        Ok(len) => len,
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            return Progress::Waiting;
        }
        Err(_) => return Progress::Failed,
    };
    let Some(end) = buffer[..len].iter().position(|b| *b == b'\n') else {
        // Nothing at all is the end of the stream.
        return if (1..MAX_LINE).contains(&len) { Progress::Waiting } else { Progress::Failed };
    };
    match (parse(&buffer[..end]), stream.read_exact(&mut [0; MAX_LINE][..=end])) {
        (Some(port), Ok(())) => Progress::Port(port),
        _ => Progress::Failed,
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_whitespace();
    let command = words.next()?;
    let port = words.next()?;
    (command.eq_ignore_ascii_case("connect") && words.next().is_none()).then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn after(sent: &[&[u8]]) -> (Progress, UnixStream, UnixStream) {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        let mut progress = Progress::Waiting;
        for part in sent {
            client.write_all(part).unwrap();
            progress = read(&mut server);
        }
        (progress, client, server)
    }

    #[test]
    fn a_line_may_come_in_parts_and_what_follows_stays() {
        let (progress, _client, mut server) = after(&[b"CONN", b"ECT 10", b"24\nhello"]);
        assert_eq!(progress, Progress::Port(1024));
        let mut rest = [0; 5];
        server.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
        assert_eq!(after(&[b"connect 4294967295\r\n"]).0, Progress::Port(u32::MAX));
    }

    #[test]
    fn anything_else_fails() {
        for line in [
            &b"CONNECT\n"[..],
            b"\n",
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"GET / HTTP/1.1\r\n",
            b"CONNECT \xff\n",
            b"CONNECT 00000000000000000000000000000001\n",
        ] {
            assert_eq!(after(&[line]).0, Progress::Failed, "{line:?}");
        }
        assert_eq!(after(&[b"CONNECT 1"]).0, Progress::Waiting);
        let (_, client, mut server) = after(&[b"x"]);
        drop(client);
        server.read_exact(&mut [0]).unwrap();
        assert_eq!(read(&mut server), Progress::Failed);
    }
}
