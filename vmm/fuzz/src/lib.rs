//! What the fuzz targets share: a guest without CPUs that does to a virtio device whatever a string of bytes
//! says, well-formed or not.
//!
//! The bytes are a list of actions, each an opcode and its operands (little endian; see [`Guest::step`]). When
//! the bytes run out, so do the actions. Numbers are taken as they come; only addresses are folded so
//! that most of them meet memory, and counts so that a run stays short.
//!
//! A target makes a device, lets a [`Guest`] drive it, and checks what must hold however bad the guest was. That
//! nothing panics, overflows, or touches what it must not is checked by the build.

use std::sync::{Arc, Mutex};

use pulau_vmm::event_loop::{EventLoop, EventSet, Subscriber};
use pulau_vmm::memory::Memory;
use pulau_vmm::virtio::{Activation, F_RING_EVENT_IDX, FIRST_DEVICE_TOKEN, Interrupt, VirtioDevice};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of guest memory: two regions with a hole between.
pub const LOW: u64 = 0x4_0000;
/// Start of the second region.
pub const HIGH: u64 = 0x8_0000;
/// Length of the second region.
pub const HIGH_LEN: u64 = 0x2_0000;

/// Most actions of a run.
const MAX_STEPS: usize = 256;
/// Most buffers of a chain.
const MAX_BUFFERS: u8 = 24;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Takes numbers off a string of bytes. What is not there is zero, and [`Input::is_empty`] tells.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether everything is taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let given = self.bytes(N);
        bytes[..given.len()].copy_from_slice(given);
        bytes
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        now
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// An address: mostly in low memory, sometimes at one of the borders, sometimes anything.
    pub fn address(&mut self) -> u64 {
        let raw = self.u16();
        let offset = u64::from(raw & 0xfff);
        match raw >> 12 {
            0..=11 => u64::from(raw) * 4,
            12 => LOW.wrapping_sub(offset),
            13 => HIGH + offset * 8,
            14 => (HIGH + HIGH_LEN).wrapping_sub(offset),
            _ => self.u64(),
        }
    }
}

/// See the crate's text.
pub struct Guest {
    memory: Arc<Memory>,
    interrupt: Interrupt,
    features: u64,
    sizes: Vec<u16>,
    /// Next descriptor of each queue.
    next: Vec<u16>,
    available: Vec<u16>,
}

impl Guest {
    /// A guest for `device`, which it activates. The first byte of `input` chooses queue sizes, the next eight
    /// the features it takes.
    pub fn new(input: &mut Input, device: &mut dyn VirtioDevice) -> Self {
        let ranges = [(GuestAddress(0), LOW as usize), (GuestAddress(HIGH), HIGH_LEN as usize)];
        let memory = Memory::from_ranges(&ranges).expect("a few pages");
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"));
        let size = 1 << (input.u8() % 9);
        let sizes: Vec<u16> = device.queue_sizes().iter().map(|max| size.min(*max)).collect();
        let queues = sizes.len();
        let mut guest = Self {
            memory: Arc::new(memory),
            interrupt,
            features: input.u64() & device.features(),
            sizes,
            next: vec![0; queues],
            available: vec![0; queues],
        };
        guest.activate(device);
        guest
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Does what `input` says until it is empty; `other` is called for what only this device can do.
    pub fn run<D: VirtioDevice>(
        &mut self,
        input: &mut Input,
        device: &mut D,
        mut other: impl FnMut(&mut D, &mut Input),
    ) {
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            let opcode = input.u8();
            if opcode % 16 == 15 {
                other(device, input);
            } else {
                self.step(opcode, input, device);
            }
        }
        device.reset();
        device.process(0, EventSet::IN);
    }

    fn step(&mut self, opcode: u8, input: &mut Input, device: &mut dyn VirtioDevice) {
        let queue = usize::from(opcode >> 4) % self.sizes.len();
        match opcode % 16 {
            // A chain of buffers, made available; the kick comes most of the time.
            0..=3 => {
                self.chain(queue, opcode % 16 == 1, input);
                if opcode % 16 != 3 {
                    device.process(queue as u32, EventSet::IN);
                }
            }
            4 => device.process(queue as u32, EventSet::IN),
            5 => device.process(FIRST_DEVICE_TOKEN + u32::from(input.u8()), EventSet::IN),
            // Bytes anywhere, rings included.
            6 => {
                let (address, count) = (input.address(), input.u8());
                let _ = self.memory.write_slice(input.bytes(count.into()), GuestAddress(address));
            }
            // One descriptor, and one entry of the ring, as they please.
            7 => {
                let index = input.u16();
                let (address, len) = (input.address(), input.u32());
                let (flags, next) = (input.u16(), input.u16());
                self.descriptor(table(queue) + 16 * u64::from(index % 256), address, len, flags, next);
            }
            8 => self.publish(queue, input.u16()),
            9 => {
                self.available[queue] = input.u16();
                self.store_index(queue);
            }
            10 => {
                let (offset, len) = (input.u16(), usize::from(input.u8() % 17));
                device.read_config(offset.into(), &mut vec![0; len]);
            }
            11 => {
                let (offset, count) = (input.u16(), input.u8());
                device.write_config(offset.into(), input.bytes(count.into()));
            }
            12 => device.pause(),
            13 => device.resume(),
            _ => {
                device.reset();
                self.activate(device);
            }
        }
    }

    /// Offers a chain: its buffers' contents are written first where there are any.
    fn chain(&mut self, queue: usize, indirect: bool, input: &mut Input) {
        let count = input.u8() % MAX_BUFFERS;
        let head = self.next[queue];
        let at = if indirect { INDIRECT_TABLE } else { table(queue) };
        let mut index = if indirect { 0 } else { head };
        for i in 0..count {
            let shape = input.u8();
            let address = input.address();
            let len = if shape & 2 != 0 { input.u32() } else { input.u16().into() };
            if shape & 4 != 0 {
                let content = input.bytes(len.min(64) as usize);
                let _ = self.memory.write_slice(content, GuestAddress(address));
            }
            let next = if indirect { index + 1 } else { (index + 1) % self.sizes[queue] };
            let mut flags = if shape & 1 != 0 { WRITE } else { 0 };
            if i + 1 < count {
                flags |= NEXT;
            }
            self.descriptor(at + 16 * u64::from(index), address, len, flags, next);
            index = next;
        }
        if indirect {
            self.descriptor(table(queue) + 16 * u64::from(head), at, 16 * u32::from(count), INDIRECT, 0);
            index = (head + 1) % self.sizes[queue];
        }
        self.next[queue] = index;
        self.publish(queue, head);
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let bytes = [
            &address.to_le_bytes()[..],
            &len.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        let _ = self.memory.write_slice(&bytes.concat(), GuestAddress(at));
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let slot = self.available[queue] % self.sizes[queue];
        let _ = self.memory.write_obj(head, GuestAddress(available(queue) + 4 + 2 * u64::from(slot)));
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.store_index(queue);
    }

    fn store_index(&self, queue: usize) {
        let _ = self.memory.write_obj(self.available[queue], GuestAddress(available(queue) + 2));
    }

    /// Starts the device on fresh rings, as the transport does.
    fn activate(&mut self, device: &mut dyn VirtioDevice) {
        let mut queues = Vec::new();
        for (index, size) in self.sizes.iter().enumerate() {
            let mut queue = Queue::new(256).expect("a power of two");
            queue.set_size(*size);
            queue.set_desc_table_address(Some(table(index) as u32), Some(0));
            queue.set_avail_ring_address(Some(available(index) as u32), Some(0));
            queue.set_used_ring_address(Some(used(index) as u32), Some(0));
            queue.set_event_idx(self.features & F_RING_EVENT_IDX != 0);
            queue.set_ready(true);
            queues.push(queue);
            self.next[index] = 0;
            self.available[index] = 0;
            let _ = self.memory.write_obj(0u32, GuestAddress(available(index)));
            let _ = self.memory.write_obj(0u32, GuestAddress(used(index)));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            features: self.features,
            interrupt: self.interrupt.clone(),
        };
        device.activate(activation).expect("all queues are there");
    }
}

/// Rings lie at the end of low memory, where chains reach them too.
const RINGS: u64 = LOW - 0x1_4000;
const INDIRECT_TABLE: u64 = LOW - 0x2000;

fn table(queue: usize) -> u64 {
    RINGS + 0x3000 * queue as u64
}

fn available(queue: usize) -> u64 {
    table(queue) + 0x1000
}

fn used(queue: usize) -> u64 {
    table(queue) + 0x1800
}

/// The host's side of a device with descriptors of its own: an event loop that only notes what happened.
pub struct Host {
    event_loop: EventLoop,
    seen: Arc<Mutex<Seen>>,
}

struct Seen(Vec<(u32, EventSet)>);

impl Subscriber for Seen {
    fn process(&mut self, token: u32, events: EventSet) {
        self.0.push((token, events));
    }
}

impl Host {
    /// A host for `device`, which it attaches.
    pub fn new(device: &mut dyn VirtioDevice) -> Self {
        let mut event_loop = EventLoop::new().expect("an epoll descriptor");
        let seen = Arc::new(Mutex::new(Seen(Vec::new())));
        device.attach(event_loop.subscribe(seen.clone()));
        Self { event_loop, seen }
    }

    /// Lets the device deal with what happened so far.
    pub fn turn(&mut self, device: &mut dyn VirtioDevice) {
        self.event_loop.run_once(0).expect("epoll works");
        let seen = std::mem::take(&mut self.seen.lock().expect("one thread").0);
        for (token, events) in seen {
            device.process(token, events);
        }
    }
}
