//! What host and guest say to each other, read by each: frames cut out of bytes in any pieces, the messages in
//! them, a host's client at the mercy of a guest, and the options on a guest's kernel command line.
//!
//! The first byte says what is read, the second in what pieces.

#![no_main]

use std::io::{self, Read, Write};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use pulau_agent_protocol::client::{Connection, Stream};
use pulau_agent_protocol::frame::{self, Decoder, Kind};
use pulau_agent_protocol::message::{
    AgentHello, ClientHello, CopyIn, ErrorReply, ExecControl, ExecEvent, ExecRequest, Reply, Request,
};
use pulau_agent_protocol::network::NetworkConfig;
use pulau_agent_protocol::{BootOptions, FrameError};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The other side: says what it was given, in pieces, and takes anything.
#[derive(Clone)]
struct Other<'a> {
    says: &'a [u8],
    piece: usize,
}

impl Read for Other<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.piece.min(self.says.len()).min(buf.len());
        let (now, later) = self.says.split_at(count);
        buf[..count].copy_from_slice(now);
        self.says = later;
        Ok(count)
    }
}

impl Write for Other<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Other<'_> {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { says: &[], piece: 1 })
    }

    fn shutdown(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

/// Takes what was written up to a bound no honest run of a fuzzer gets near.
struct Bounded(usize);

impl Write for Bounded {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0 += buf.len();
        assert!(self.0 <= 1 << 20, "more comes out than went in");
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let [how, piece, says @ ..] = data else { return };
    let other = Other { says, piece: usize::from(*piece).max(1) };
    match how % 6 {
        0 => frames(other),
        1 => command_line(says),
        2 => {
            let Ok(client) = Connection::new(other, None) else { return };
            let request = ExecRequest { argv: vec!["true".into()], ..ExecRequest::default() };
            let Ok(exec) = client.exec(&request) else { return };
            let _ = exec.run(&[][..], &mut Bounded(0), &mut Bounded(0));
        }
        3 => {
            let Ok(client) = Connection::new(other, None) else { return };
            if let Ok(info) = client.copy_out("/file", &mut Bounded(0)) {
                assert!(info.size <= says.len() as u64);
            }
        }
        4 => {
            let Ok(client) = Connection::new(other, None) else { return };
            let request =
                CopyIn { path: "/file".into(), size: 4, mode: 0, owner: None, parents: false, sync: false };
            let _ = client.copy_in(&request, &b"data"[..]);
        }
        _ => {
            let Ok(mut client) = Connection::new(other, None) else { return };
            while client.health().is_ok() {}
        }
    }
});

/// All frames and how they ended.
fn read_all(mut from: Other) -> (Vec<(Kind, Vec<u8>)>, Option<FrameError>) {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    loop {
        match decoder.read(&mut from) {
            Ok(Some((kind, payload))) => frames.push((kind, payload.to_vec())),
            Ok(None) => return (frames, None),
            Err(e) => {
                let why = e.get_ref().and_then(|e| e.downcast_ref()).cloned();
                return (frames, Some(why.expect("the stream itself never fails")));
            }
        }
    }
}

fn frames(other: Other) {
    let said = other.says;
    let (frames, end) = read_all(other);
    // The pieces they come in change nothing, and what was read can be written.
    assert_eq!(read_all(Other { says: said, piece: usize::MAX }), (frames.clone(), end));
    let mut written = Vec::new();
    for (kind, payload) in &frames {
        frame::encode(&mut written, *kind, payload).expect("it was read");
    }
    assert!(said.starts_with(&written));
    for (kind, payload) in &frames {
        match kind {
            Kind::Hello => {
                message::<ClientHello>(payload);
                message::<AgentHello>(payload);
            }
            Kind::Request => message::<Request>(payload),
            Kind::Reply => message::<Reply>(payload),
            Kind::Error => message::<ErrorReply>(payload),
            Kind::Control => message::<ExecControl>(payload),
            Kind::Event => message::<ExecEvent>(payload),
            Kind::Stdin | Kind::Stdout | Kind::Stderr | Kind::FileData | Kind::FileEnd => {}
        }
    }
}

/// A message that can be read is the same after it was written and read again.
fn message<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(json: &[u8]) {
    let Ok(message) = serde_json::from_slice::<T>(json) else { return };
    let written = serde_json::to_vec(&message).expect("it is a plain tree");
    assert_eq!(message, serde_json::from_slice(&written).expect("it was written here"));
}

fn command_line(line: &[u8]) {
    let line = String::from_utf8_lossy(line);
    let (options, problems) = BootOptions::parse(&line);
    assert!(problems.len() <= line.split_ascii_whitespace().count());
    assert_eq!(BootOptions::parse(&options.to_string()), (options, Vec::new()));
    if let Ok(network) = line.parse::<NetworkConfig>() {
        assert_eq!(network.to_string().parse(), Ok(network));
    }
}
