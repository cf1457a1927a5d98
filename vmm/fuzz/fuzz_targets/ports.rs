//! Port I/O and the devices on it: serial port with a client that comes and goes, keyboard controller, power
//! and panic ports, boot timer; accesses of any width at any offset.

#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use pulau_vmm::arch::layout;
use pulau_vmm::bus::Bus;
use pulau_vmm::devices::boot_timer::{self, BootTimer};
use pulau_vmm::devices::i8042::{self, I8042};
use pulau_vmm::devices::power::{self, Power, PvPanic};
use pulau_vmm::devices::serial::{self, ConsoleSocket, Sink};
use pulau_vmm::event_loop::EventLoop;
use pulau_vmm::rate_limiter::TokenBucket;
use pulau_vmm::stop::StopSink;
use pulau_vmm_fuzz::Input;
use tempfile::TempDir;
use vmm_sys_util::eventfd::EventFd;

thread_local! {
    static DIR: TempDir = tempfile::tempdir().expect("a directory");
}

const PORTS: [(u64, u64); 5] = [
    (layout::PORT_SERIAL, serial::PORTS),
    (layout::PORT_I8042, i8042::PORTS),
    (layout::PORT_POWER, power::PORTS),
    (layout::PORT_PVPANIC, 1),
    (layout::BOOT_TIMER, boot_timer::WINDOW),
];

fuzz_target!(|data: &[u8]| DIR.with(|dir| {
    let input = &mut Input(data);
    let event = || EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd");
    let path = dir.path().join("console");
    let socket = ConsoleSocket::bind(&path).expect("the path is free");
    let bucket = TokenBucket::new(64, 16, Duration::from_secs(1000), Instant::now());
    let limit = bucket.filter(|_| input.u8() & 1 != 0);
    let irq = event();
    let line = irq.try_clone().expect("descriptors");
    let output = File::options().write(true).open("/dev/null").expect("it is always there");
    let sink = Sink { output, input: serial::Input::Client(socket) };
    let (port, console) = serial::create(irq, sink, limit, None).expect("descriptors");
    let console = Arc::new(Mutex::new(console));
    let mut event_loop = EventLoop::new().expect("an epoll descriptor");
    let events = event_loop.subscribe(console.clone());
    console.lock().expect("one thread").attach(events).expect("descriptors");
    let stop = StopSink::new().expect("an eventfd");
    let keyboard = Arc::new(I8042::new(event(), stop.clone()));
    let mut bus = Bus::default();
    let mut add = |index: usize, device| bus.insert(PORTS[index].0, PORTS[index].1, device).expect("apart");
    add(0, Arc::new(port));
    add(1, keyboard.clone());
    add(2, Arc::new(Power(stop.clone())));
    add(3, Arc::new(PvPanic(stop.clone())));
    add(4, Arc::new(BootTimer::start()));

    let mut client: Option<UnixStream> = None;
    let mut came = 0;
    for _ in 0..1024 {
        if input.is_empty() {
            break;
        }
        let opcode = input.u8();
        match (opcode >> 4, &mut client) {
            (action @ 0..=11, _) => {
                let (start, len) = PORTS[[0, 0, 0, 1, 1, 2, 3, 4][usize::from(opcode & 7)]];
                // One beyond, too.
                let address = start + u64::from(input.u8()) % (len + 1);
                if opcode & 8 == 0 {
                    let mut bytes = vec![0xff; if action == 0 { usize::from(input.u8() & 7) + 1 } else { 1 }];
                    bus.read(address, &mut bytes);
                } else {
                    let count = if action == 0 { usize::from(input.u8() & 7) + 1 } else { 1 };
                    bus.write(address, input.bytes(count));
                }
            }
            (12, None) => {
                client = UnixStream::connect(&path).ok();
                client.iter().for_each(|c| c.set_nonblocking(true).expect("non-blocking"));
            }
            (12, Some(stream)) => {
                let (count, repeat) = (input.u8(), input.u8());
                let _ = stream.write(&input.bytes(count.into()).repeat(1 + usize::from(repeat)));
            }
            (13, Some(stream)) => came += stream.read(&mut [0; 256]).unwrap_or(0),
            (14, _) => client = None,
            _ => {
                keyboard.ctrl_alt_del();
            }
        }
        event_loop.run_once(0).expect("epoll works");
    }
    // What is limited stays so. A client that comes anew is shown again what nobody took.
    assert!(came <= 1024 * 256);
    // The interrupt line is only ever raised a bounded number of times per access.
    let _ = line.read();
    // A reason once given stays.
    let reason = stop.reason();
    bus.write(layout::PORT_PVPANIC, &[1]);
    assert!(stop.reason().is_some() && (reason.is_none() || stop.reason() == reason));
    console.lock().expect("one thread").finish();
}));
