//! A device behind its MMIO transport, in the shape of a device, so that a [`Guest`](crate::Guest) drives all
//! of it through the registers, as a guest's kernel would.

use std::sync::{Arc, Mutex};

use pulau_vmm::bus::Bus;
use pulau_vmm::event_loop::{EventLoop, EventSet, Events, Subscriber};
use pulau_vmm::memory::Memory;
use pulau_vmm::virtio::mmio::{MmioTransport, WINDOW};
use pulau_vmm::virtio::{
    ActivateError, Activation, F_VERSION_1, FIRST_DEVICE_TOKEN, Interrupt, VirtioDevice,
};
use virtio_queue::{QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::Input;

/// Where the registers are.
const BASE: u64 = 0xc000_1000;

/// See the module's text.
pub struct Behind {
    device: Arc<Mutex<dyn VirtioDevice>>,
    queue_sizes: Vec<u16>,
    transport: Arc<MmioTransport>,
    bus: Bus,
    event_loop: EventLoop,
}

impl Behind {
    /// Puts `device` behind a transport.
    pub fn new(device: Arc<Mutex<dyn VirtioDevice>>, memory: Arc<Memory>) -> Self {
        let mut event_loop = EventLoop::new().expect("an epoll descriptor");
        let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"));
        let queue_sizes = device.lock().expect("one thread").queue_sizes().to_vec();
        let transport = MmioTransport::new(device.clone(), memory, interrupt, &mut event_loop);
        let transport = Arc::new(transport.expect("descriptors"));
        let mut bus = Bus::default();
        bus.insert(BASE, WINDOW, transport.clone()).expect("it is the only one");
        Self { device, queue_sizes, transport, bus, event_loop }
    }

    /// Lets the event loop do what is to do.
    pub fn turn(&mut self) {
        // Whoever wakes itself up has its turn again, though not for ever.
        for _ in 0..4 {
            self.event_loop.run_once(0).expect("epoll works");
        }
    }

    /// An access of any width anywhere in the window, or just beside it. Whether it may have moved a queue.
    pub fn access(&mut self, input: &mut Input) -> bool {
        let (how, place) = (input.u8(), input.u16());
        let width = usize::from(how & 7) + 1;
        // Mostly at registers.
        let offset = match place >> 14 {
            0 => u64::from(place & 0xfff),
            1 => u64::from(place & 0x3f) * 4,
            2 => 0x100 + u64::from(place & 0x3f),
            _ => u64::from(place & 0x3fff),
        };
        if how & 8 == 0 {
            self.bus.read(BASE + offset, &mut vec![0; width]);
            return false;
        }
        let mut bytes = [0; 8];
        let given = input.bytes(width);
        bytes[..given.len()].copy_from_slice(given);
        self.bus.write(BASE + offset, &bytes[..width]);
        (0x38..=0xa4).contains(&offset)
    }

    fn get(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        assert!(self.bus.read(BASE + offset, &mut word));
        u32::from_le_bytes(word)
    }

    fn set(&self, offset: u64, value: u32) {
        assert!(self.bus.write(BASE + offset, &value.to_le_bytes()));
    }
}

impl Subscriber for Behind {
    fn process(&mut self, token: u32, events: EventSet) {
        if token < FIRST_DEVICE_TOKEN {
            if let Some(notifier) = self.transport.notifiers().get(token as usize) {
                notifier.write(1).expect("an eventfd has room");
            }
            self.turn();
        } else {
            // Events may come late, and for nothing.
            self.device.lock().expect("one thread").process(token, events);
        }
    }
}

impl VirtioDevice for Behind {
    fn device_type(&self) -> u32 {
        self.get(0x08)
    }

    fn features(&self) -> u64 {
        let half = |page| {
            self.set(0x14, page);
            u64::from(self.get(0x10))
        };
        half(0) | half(1) << 32
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn attach(&mut self, _: Events) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.bus.read(BASE + 0x100 + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.bus.write(BASE + 0x100 + offset, data);
    }

    /// As a driver does it; whatever came before, it must succeed.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        assert_eq!((self.get(0x00), self.get(0x04)), (0x7472_6976, 2));
        self.set(0x70, 1);
        self.set(0x70, 3);
        let features = activation.features | F_VERSION_1;
        for page in 0..2 {
            self.set(0x24, page);
            self.set(0x20, (features >> (32 * page)) as u32);
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11, "features not taken");
        for (index, queue) in activation.queues.iter().enumerate() {
            self.set(0x30, index as u32);
            assert_eq!(self.get(0x34), u32::from(self.queue_sizes[index]));
            self.set(0x38, queue.size().into());
            for (register, address) in
                [(0x80, queue.desc_table()), (0x90, queue.avail_ring()), (0xa0, queue.used_ring())]
            {
                self.set(register, address as u32);
                self.set(register + 4, (address >> 32) as u32);
            }
            self.set(0x44, 1);
            assert_eq!(self.get(0x44), 1, "queue {index} not ready");
        }
        self.set(0x70, 15);
        assert_eq!(self.get(0x70), 15, "not started");
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        self.device.lock().expect("one thread").queues()
    }

    fn pause(&mut self) {
        self.device.lock().expect("one thread").pause();
    }

    fn resume(&mut self) {
        self.device.lock().expect("one thread").resume();
        self.turn();
    }

    fn reset(&mut self) {
        self.set(0x70, 0);
        assert_eq!((self.get(0x70), self.get(0x60)), (0, 0), "status and interrupts after a reset");
        for index in 0..self.queue_sizes.len() {
            self.set(0x30, index as u32);
            assert_eq!(self.get(0x44), 0, "queue {index} is ready after a reset");
        }
    }
}
