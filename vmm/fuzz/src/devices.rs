//! What a device that works does, asked by a well-behaved driver. Each fails where it does not do it.

use std::time::{Duration, Instant};

use pulau_vmm::virtio::VirtioDevice;

use crate::{Buffer::*, Guest};

/// Where buffers are.
const A: u64 = 0x1000;
const B: u64 = 0x2000;
const C: u64 = 0x3000;

/// A block device reads its sector 3, which holds nothing but `content`.
pub fn block_works(guest: &mut Guest, device: &mut dyn VirtioDevice, content: u8) {
    let mut header = [0; 16];
    header[8] = 3;
    guest.offer(0, &[Out(A, &header), In(B, 512), In(C, 1)]);
    let start = Instant::now();
    // The machine may be busy.
    while start.elapsed() < Duration::from_secs(20) {
        guest.notify(device, 0);
        if let Some(len) = guest.used(0) {
            assert_eq!((len, guest.read(C), guest.read(B)), (513, [0], [content; 512]));
            return;
        }
        // An io_uring may take a moment.
        std::thread::sleep(Duration::from_micros(50));
    }
    panic!("no answer to a read");
}

/// An entropy device fills a buffer.
pub fn rng_works(guest: &mut Guest, device: &mut dyn VirtioDevice) {
    guest.offer(0, &[In(A, 64)]);
    guest.notify(device, 0);
    assert_eq!(guest.used(0), Some(64));
    assert_ne!(guest.read(A), [0; 64]);
}

/// A balloon takes a page.
pub fn balloon_works(guest: &mut Guest, device: &mut dyn VirtioDevice) {
    guest.offer(0, &[Out(A, &5u32.to_le_bytes()), Out(0x5000, &[7])]);
    guest.notify(device, 0);
    assert_eq!((guest.used(0), guest.read(0x5000)), (Some(0), [0]));
}

/// A persistent memory device flushes.
pub fn pmem_works(guest: &mut Guest, device: &mut dyn VirtioDevice) {
    guest.offer(0, &[Out(A, &[0; 4]), In(C, 4)]);
    guest.notify(device, 0);
    assert_eq!((guest.used(0), guest.read(C)), (Some(4), [0; 4]));
}

/// A network interface sends a frame. Whether it arrives is for the caller to see.
pub fn net_works(guest: &mut Guest, device: &mut dyn VirtioDevice, frame: &[u8]) {
    guest.offer(1, &[Out(A, &[0; 12]), Out(B, frame)]);
    guest.notify(device, 1);
    assert_eq!(guest.used(1), Some(0));
}

/// A vsock device refuses a connection to a port where nobody listens.
pub fn vsock_works(guest: &mut Guest, device: &mut dyn VirtioDevice) {
    let mut request = [0; 44];
    (request[0], request[8]) = (3, 2); // from, to
    request[16..24].copy_from_slice(&[9, 0, 0, 0, 99, 0, 0, 0]); // ports
    (request[28], request[30]) = (1, 1); // stream, request
    guest.offer(0, &[In(B, 44 + 64)]);
    guest.offer(1, &[Out(A, &request)]);
    guest.notify(device, 1);
    assert_eq!((guest.used(1), guest.used(0)), (Some(0), Some(44)));
    let answer: [u8; 44] = guest.read(B);
    assert_eq!((answer[0], answer[8], answer[30]), (2, 3, 3));
    assert_eq!(answer[16..24], [99, 0, 0, 0, 9, 0, 0, 0]);
}
