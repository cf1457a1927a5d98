//! The vsock device with host programs at the other end: clients that connect, half say what they want,
//! write, read, and leave; and a listener for the guest.

#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use libfuzzer_sys::fuzz_target;
use pulau_vmm::virtio::vsock::Vsock;
use pulau_vmm_fuzz::{Guest, Host, Input, devices};
use tempfile::TempDir;

/// Guests that mean this port of the host find somebody there.
const PORT: u32 = 1;
const MAX_CLIENTS: usize = 8;

thread_local! {
    static PLACE: (TempDir, UnixListener) = {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join(format!("v_{PORT}"))).expect("a socket");
        listener.set_nonblocking(true).expect("non-blocking");
        (dir, listener)
    };
}

fuzz_target!(|data: &[u8]| PLACE.with(|(dir, listener)| {
    let input = &mut Input(data);
    let path = dir.path().join("v");
    let mut vsock = Vsock::new(3, &path).expect("the path is free");
    let mut host = Host::new(&mut vsock);
    let mut clients: Vec<UnixStream> = Vec::new();
    let add = |clients: &mut Vec<UnixStream>, client: UnixStream| {
        client.set_nonblocking(true).expect("non-blocking");
        clients.truncate(MAX_CLIENTS - 1);
        clients.push(client);
    };
    let mut guest = Guest::new(input, &mut vsock);
    let other = |_: &mut Guest, vsock: &mut Vsock, input: &mut Input| {
        let opcode = input.u8();
        let index = usize::from(opcode >> 4);
        match (opcode % 16, clients.get_mut(index % MAX_CLIENTS)) {
            (0..=2, _) => {
                if let Ok(mut client) = UnixStream::connect(&path) {
                    if opcode % 16 != 2 {
                        let _ = client.write_all(format!("CONNECT {}\n", input.u8()).as_bytes());
                    }
                    add(&mut clients, client);
                }
            }
            (3..=5, Some(client)) => {
                let (count, repeat) = (input.u8(), input.u8());
                let _ = client.write(&input.bytes(count.into()).repeat(1 + usize::from(repeat)));
            }
            (6, Some(client)) => _ = client.read(&mut [0; 4096]),
            (7, Some(client)) => _ = client.shutdown(Shutdown::Write),
            (8, Some(client)) => _ = client.shutdown(Shutdown::Read),
            (9, Some(_)) => drop(clients.remove(index % MAX_CLIENTS)),
            (10, _) => {
                if let Ok((client, _)) = listener.accept() {
                    add(&mut clients, client);
                }
            }
            (11, _) => vsock.reset_connections(),
            _ => {}
        }
        host.turn(vsock);
        assert!(vsock.connections() <= 1024);
    };
    guest.run(input, &mut vsock, other, |guest, vsock| {
        assert_eq!(vsock.connections(), 0);
        devices::vsock_works(guest, vsock);
    });
    assert_eq!(vsock.connections(), 0);
    // What nobody accepted.
    while listener.accept().is_ok() {}
}));
