//! The control API from the bytes of a client to a machine that is not there: the socket's server, HTTP, the
//! routes, JSON, and the controller in every state. The first byte says how the machine behaves and in what
//! pieces the bytes arrive; the rest is what the client sends.
//!
//! Files that requests name are looked at and not opened: seeds name one that every system has.
//!
//! Whatever it was, every response is well formed, the configuration the API shows can be given to another
//! microVM as it is, and the next client is served.

#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use pulau_vmm::api::{Action, Answer, ApiServer, ApiSocket, respond, route, serve};
use pulau_vmm::config::{
    BalloonHintingStart, BalloonHintingStatus, BalloonStats, DriveUpdate, FullVmConfig,
    NetworkInterfaceUpdate, PmemUpdate, SnapshotCreateConfig, SnapshotLoadConfig, VmConfig,
};
use pulau_vmm::control::{Controller, Machine, MachineBuilder, MachineError, StartError};
use pulau_vmm::event_loop::EventLoop;
use pulau_vmm::http::Response;
use pulau_vmm::mmds::Mmds;
use tempfile::TempDir;

/// Most bytes of a request's body, as small as makes sense here.
const MAX_BODY: usize = 4096;

thread_local! {
    static DIR: TempDir = tempfile::tempdir().expect("a directory");
}

/// A machine, or its builder, of whose calls every `n`th fails.
#[derive(Clone)]
struct Fake {
    n: u8,
    calls: u8,
}

impl Fake {
    fn call(&mut self) -> Result<(), MachineError> {
        self.calls = self.calls.wrapping_add(1);
        let fails = self.n != 0 && self.calls.is_multiple_of(self.n);
        if fails { Err(MachineError::failed("broken")) } else { Ok(()) }
    }
}

impl MachineBuilder for Fake {
    fn start(&mut self, config: &VmConfig) -> Result<Box<dyn Machine>, StartError> {
        assert!(config.check_bootable().is_ok());
        self.call().map_err(|e| StartError(e.into()))?;
        Ok(Box::new(self.clone()))
    }

    fn load(&mut self, request: &SnapshotLoadConfig) -> Result<(Box<dyn Machine>, VmConfig), StartError> {
        let mut config = VmConfig::default();
        request.apply(&mut config).map_err(|e| StartError(e.into()))?;
        self.call().map_err(|e| StartError(e.into()))?;
        Ok((Box::new(self.clone()), config))
    }
}

impl Machine for Fake {
    fn pause(&mut self) -> Result<(), MachineError> {
        self.call()
    }
    fn resume(&mut self) -> Result<(), MachineError> {
        self.call()
    }
    fn save(&mut self, _: &SnapshotCreateConfig, _: &VmConfig) -> Result<(), MachineError> {
        self.call()
    }
    fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError> {
        self.call()
    }
    fn update_drive(&mut self, update: &DriveUpdate) -> Result<(), MachineError> {
        assert!(update.path_on_host.is_some() || update.rate_limiter.is_some());
        self.call()
    }
    fn update_network_interface(&mut self, _: &NetworkInterfaceUpdate) -> Result<(), MachineError> {
        self.call()
    }
    fn update_pmem(&mut self, _: &PmemUpdate) -> Result<(), MachineError> {
        self.call()
    }
    fn set_balloon_target(&mut self, _: u32) -> Result<(), MachineError> {
        self.call()
    }
    fn set_balloon_stats_interval(&mut self, seconds: u16) -> Result<(), MachineError> {
        assert_ne!(seconds, 0);
        self.call()
    }
    fn balloon_stats(&mut self) -> Result<BalloonStats, MachineError> {
        self.call().map(|()| BalloonStats::default())
    }
    fn start_balloon_hinting(&mut self, _: &BalloonHintingStart) -> Result<(), MachineError> {
        self.call()
    }
    fn balloon_hinting_status(&mut self) -> Result<BalloonHintingStatus, MachineError> {
        self.call().map(|()| BalloonHintingStatus { host_cmd: 0, guest_cmd: None })
    }
    fn stop_balloon_hinting(&mut self) -> Result<(), MachineError> {
        self.call()
    }
}

/// Answers, but for the two requests that would have this process write to files of the request's choice.
fn answer(controller: &mut Controller, method: &str, path: &str, body: &[u8]) -> Response {
    let writes = route(method, path, body)
        .is_ok_and(|routed| matches!(routed.action, Action::SetLogger(_) | Action::SetMetrics(_)));
    if writes { respond(&Ok(Answer::Done)) } else { serve(controller, method, path, body) }
}

fn new_controller(n: u8) -> Controller {
    let mmds = Arc::new(Mutex::new(Mmds::new(1000)));
    Controller::new("fuzz".into(), mmds, Box::new(Fake { n, calls: 0 }))
}

fuzz_target!(|data: &[u8]| DIR.with(|dir| {
    let Some((how, sent)) = data.split_first() else { return };
    let mut controller = new_controller(how & 3);
    let piece = 1 << (how >> 2 & 15);

    let path = dir.path().join("api");
    let mut event_loop = EventLoop::new().expect("an epoll descriptor");
    let socket = ApiSocket::bind(&path).expect("the path is free");
    let mut server = ApiServer::new(socket, event_loop.own_events(), 7, MAX_BODY).expect("a watched socket");
    let mut handler = |method: &str, path: &str, body: &[u8]| {
        assert!(body.len() <= MAX_BODY);
        answer(&mut controller, method, path, body)
    };

    let mut received = Vec::new();
    let mut client = connect(&path);
    // A client that sends byte by byte takes its time: the first bytes tell as much as all.
    for bytes in sent.chunks(piece).take(256) {
        if client.write_all(bytes).is_err() {
            break;
        }
        turn(&mut event_loop, &mut server, &mut handler);
        receive(&mut client, &mut received);
    }
    client.shutdown(std::net::Shutdown::Write).expect("it is connected");
    let mut before = None;
    while before.replace(received.len()) != Some(received.len()) {
        turn(&mut event_loop, &mut server, &mut handler);
        receive(&mut client, &mut received);
    }
    check(&received);

    let mut received = Vec::new();
    let mut next = connect(&path);
    next.write_all(b"GET /vm/config HTTP/1.1\r\nConnection: close\r\n\r\n").expect("there is room");
    turn(&mut event_loop, &mut server, &mut handler);
    receive(&mut next, &mut received);
    check(&received);
    let body = received.windows(4).position(|w| w == b"\r\n\r\n").expect("a response") + 4;
    let shown: FullVmConfig = serde_json::from_slice(&received[body..]).expect("a configuration");
    if controller.config().boot_source.is_some() {
        let taken = VmConfig::try_from(shown.clone()).expect("it was taken before");
        assert_eq!(&taken, controller.config());
        new_controller(0).load(shown).expect("its files are there too");
    }
}));

fn connect(path: &std::path::Path) -> UnixStream {
    let client = UnixStream::connect(path).expect("somebody listens");
    client.set_nonblocking(true).expect("non-blocking");
    client
}

fn turn(
    event_loop: &mut EventLoop,
    server: &mut ApiServer,
    handler: &mut dyn FnMut(&str, &str, &[u8]) -> Response,
) {
    // The listener, then the connection with one read each time.
    for _ in 0..16 {
        let events = event_loop.run_once(0).expect("epoll works");
        if events.is_empty() {
            break;
        }
        events.iter().for_each(|event| server.process(event.token, handler));
    }
}

fn receive(client: &mut UnixStream, received: &mut Vec<u8>) {
    let mut chunk = [0; 4096];
    while let Ok(count @ 1..) = client.read(&mut chunk) {
        received.extend_from_slice(&chunk[..count]);
    }
}

/// One response after the other, each as long as it says.
fn check(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("the end of a head") + 4;
        let head = std::str::from_utf8(&bytes[..end]).expect("a head of text");
        assert!(head.starts_with("HTTP/1.1 "), "{head:?}");
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |text| text.parse().expect("a number"));
        let body = &bytes[end..end + length];
        if head.contains("Content-Type: application/json") {
            serde_json::from_slice::<serde_json::Value>(body).expect("JSON");
        }
        bytes = &bytes[end + length..];
    }
}
