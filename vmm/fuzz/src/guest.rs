//! The guest: see the crate's text.

use std::sync::Arc;

use pulau_vmm::event_loop::EventSet;
use pulau_vmm::memory::Memory;
use pulau_vmm::virtio::{Activation, F_RING_EVENT_IDX, FIRST_DEVICE_TOKEN, Interrupt, VirtioDevice};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::Input;
use crate::watch::Watch;

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

/// A buffer of a well-formed chain: its address, and what the device reads there or how much it may write.
pub enum Buffer<'a> {
    /// For the device to read.
    Out(u64, &'a [u8]),
    /// For the device to write.
    In(u64, u32),
}

/// See the crate's text.
pub struct Guest {
    memory: Arc<Memory>,
    watch: Watch,
    interrupt: Interrupt,
    features: u64,
    sizes: Vec<u16>,
    /// Next descriptor of each queue.
    next: Vec<u16>,
    available: Vec<u16>,
    /// Entries of each used ring looked at by [`Guest::used`].
    taken: Vec<u16>,
}

impl Guest {
    /// A guest for `device`, which it activates. The first byte of `input` chooses queue sizes, the next eight
    /// the features it takes.
    pub fn new(input: &mut Input, device: &mut dyn VirtioDevice) -> Self {
        let mut guest = Self::over(new_memory(), input, device);
        guest.activate(device);
        guest
    }

    /// The same over memory that is there, and without activating the device.
    pub fn over(memory: Arc<Memory>, input: &mut Input, device: &mut dyn VirtioDevice) -> Self {
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"));
        let size = 1 << (input.u8() % 9);
        let sizes: Vec<u16> = device.queue_sizes().iter().map(|max| size.min(*max)).collect();
        let queues = sizes.len();
        Self {
            memory,
            watch: Watch::new(RINGS..LOW),
            interrupt,
            features: input.u64() & device.features(),
            sizes,
            next: vec![0; queues],
            available: vec![0; queues],
            taken: vec![0; queues],
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What watches over it.
    pub fn watch(&mut self) -> &mut Watch {
        &mut self.watch
    }

    /// Does what `input` says until it is empty; `other` is called for what only this device can do. Then the
    /// device is reset, and `works` sees whether it still does its work on fresh rings.
    pub fn run<D: VirtioDevice>(
        &mut self,
        input: &mut Input,
        device: &mut D,
        mut other: impl FnMut(&mut Self, &mut D, &mut Input),
        works: impl FnOnce(&mut Self, &mut D),
    ) {
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            let opcode = input.u8();
            if opcode % 16 == 15 {
                self.look();
                other(self, device, input);
            } else {
                self.step(opcode, input, device);
            }
        }
        // What was offered and not notified yet may be seen now.
        self.look();
        device.resume();
        device.reset();
        // What was notified before the reset may be seen after it.
        device.process(0, EventSet::IN);
        self.watch.check(&self.memory);
        self.features = device.features() & !F_RING_EVENT_IDX;
        self.sizes = device.queue_sizes().to_vec();
        self.activate(device);
        works(self, device);
    }

    fn step(&mut self, opcode: u8, input: &mut Input, device: &mut dyn VirtioDevice) {
        let queue = usize::from(opcode >> 4) % self.sizes.len();
        match opcode % 16 {
            // A chain of buffers, made available; the kick comes most of the time.
            0..=3 => {
                self.chain(queue, opcode % 16 == 1, input);
                if opcode % 16 != 3 {
                    self.notify(device, queue);
                }
            }
            4 => self.notify(device, queue),
            5 => {
                self.look();
                device.process(FIRST_DEVICE_TOKEN + u32::from(input.u8()), EventSet::IN);
            }
            // Bytes anywhere, rings included.
            6 => {
                let (address, count) = (input.address(), input.u8());
                self.write(address, input.bytes(count.into()));
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
            13 => {
                self.look();
                device.resume();
            }
            _ => {
                self.look();
                device.reset();
                self.activate(device);
            }
        }
    }

    fn look(&mut self) {
        let tables = self.sizes.iter().enumerate().map(|(queue, size)| (table(queue), *size));
        self.watch.look(&self.memory, tables);
    }

    /// Notifies the device of a queue.
    pub fn notify(&mut self, device: &mut dyn VirtioDevice, queue: usize) {
        self.look();
        device.process(queue as u32, EventSet::IN);
    }

    /// Writes as much as is memory.
    fn write(&mut self, address: u64, bytes: &[u8]) {
        let room = [(0, LOW), (HIGH, HIGH_LEN)].into_iter().find_map(|(start, len)| {
            let at = address.checked_sub(start)?;
            len.checked_sub(at)
        });
        let count = room.unwrap_or(0).min(bytes.len() as u64) as usize;
        if count > 0 {
            self.memory.write_slice(&bytes[..count], GuestAddress(address)).expect("it is memory");
            self.watch.wrote(address, &bytes[..count]);
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
                self.write(address, input.bytes(len.min(64) as usize));
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

    /// Offers a well-formed chain.
    pub fn offer(&mut self, queue: usize, buffers: &[Buffer]) {
        let head = self.next[queue];
        for (i, buffer) in buffers.iter().enumerate() {
            let (address, len, mut flags) = match buffer {
                Buffer::Out(address, bytes) => {
                    self.write(*address, bytes);
                    (*address, bytes.len() as u32, 0)
                }
                Buffer::In(address, len) => (*address, *len, WRITE),
            };
            if i + 1 < buffers.len() {
                flags |= NEXT;
            }
            let index = self.next[queue];
            self.next[queue] = (index + 1) % self.sizes[queue];
            self.descriptor(table(queue) + 16 * u64::from(index), address, len, flags, self.next[queue]);
        }
        self.publish(queue, head);
    }

    /// Bytes written into the next chain the device used, if there is one.
    pub fn used(&mut self, queue: usize) -> Option<u32> {
        let read = |at| self.memory.read_obj::<u16>(GuestAddress(at)).expect("it is memory");
        if read(used(queue) + 2) == self.taken[queue] {
            return None;
        }
        let slot = u64::from(self.taken[queue] % self.sizes[queue]);
        self.taken[queue] = self.taken[queue].wrapping_add(1);
        let at = GuestAddress(used(queue) + 4 + 8 * slot);
        let [head, len] = self.memory.read_obj::<[u32; 2]>(at).expect("it is memory");
        assert!(head < u32::from(self.sizes[queue]), "used chain {head}");
        Some(len)
    }

    /// `N` bytes at `address`.
    pub fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).expect("it is memory");
        bytes
    }

    fn descriptor(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let bytes =
            [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.write(at, &bytes.concat());
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let slot = self.available[queue] % self.sizes[queue];
        self.write(available(queue) + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.store_index(queue);
    }

    fn store_index(&mut self, queue: usize) {
        self.write(available(queue) + 2, &self.available[queue].to_le_bytes());
    }

    /// Starts the device on fresh rings, as the transport does.
    pub fn activate(&mut self, device: &mut dyn VirtioDevice) {
        let mut queues = Vec::new();
        for (index, size) in self.sizes.clone().into_iter().enumerate() {
            let mut queue = Queue::new(256).expect("a power of two");
            queue.set_size(size);
            queue.set_desc_table_address(Some(table(index) as u32), Some(0));
            queue.set_avail_ring_address(Some(available(index) as u32), Some(0));
            queue.set_used_ring_address(Some(used(index) as u32), Some(0));
            queue.set_event_idx(self.features & F_RING_EVENT_IDX != 0);
            queue.set_ready(true);
            queues.push(queue);
            self.next[index] = 0;
            self.available[index] = 0;
            self.taken[index] = 0;
            self.write(available(index), &[0; 4]);
            self.write(used(index), &[0; 4]);
            self.watch.allow(used(index), 4 + 8 * u64::from(size) + 2);
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

/// Zeroed guest memory.
pub fn new_memory() -> Arc<Memory> {
    let ranges = [(GuestAddress(0), LOW as usize), (GuestAddress(HIGH), HIGH_LEN as usize)];
    Arc::new(Memory::from_ranges(&ranges).expect("a few pages"))
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
