use virtio_queue::{QueueState, QueueT};

use super::*;
use crate::memory;
use crate::virtio::{ActivateError, read_config_space};

#[derive(Default)]
struct Fake {
    activated: Option<(u64, Vec<u16>)>,
    resets: usize,
    seen: Vec<u32>,
    refuse: bool,
    working: Vec<QueueState>,
    config: [u8; 6],
}

impl Subscriber for Fake {
    fn process(&mut self, token: u32, _: EventSet) {
        self.seen.push(token);
    }
}

impl VirtioDevice for Fake {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        F_RING_EVENT_IDX | 1 << 5
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn attach(&mut self, _: Events) {}
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some(place) = self.config.get_mut(offset as usize..offset as usize + data.len()) {
            place.copy_from_slice(data);
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuse {
            return Err(ActivateError::QueueMissing(0));
        }
        let sizes = activation.queues.iter().map(|q| if q.ready() { q.size() } else { 0 }).collect();
        let event_idx = activation.features & F_RING_EVENT_IDX != 0;
        assert!(activation.queues.iter().all(|q| q.event_idx_enabled() == event_idx));
        self.activated = Some((activation.features, sizes));
        self.working = activation.queues.iter().map(|queue| queue.state()).collect();
        Ok(())
    }
    fn queues(&self) -> Vec<QueueState> {
        self.working.clone()
    }
    fn reset(&mut self) {
        self.resets += 1;
        self.activated = None;
    }
}

struct Fixture {
    event_loop: EventLoop,
    device: Arc<Mutex<Fake>>,
    transport: MmioTransport,
    interrupt: Interrupt,
}

fn fixture() -> Fixture {
    let mut event_loop = EventLoop::new().unwrap();
    let device = Arc::new(Mutex::new(Fake::default()));
    let interrupt = Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let memory = Arc::new(memory::create(2, false).unwrap());
    let transport = MmioTransport::new(device.clone(), memory, interrupt.clone(), &mut event_loop).unwrap();
    Fixture { event_loop, device, transport, interrupt }
}

impl Fixture {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn place_queue(&self, index: u32, size: u32, base: u32) {
        self.write(0x30, index);
        self.write(0x38, size);
        for (register, address) in
            [(0x80, base), (0x90, base.wrapping_add(0x1000)), (0xa0, base.wrapping_add(0x2000))]
        {
            self.write(register, address);
            self.write(register + 4, 0);
        }
        self.write(0x44, 1);
    }

    /// Those the driver accepted.
    fn features(&self) -> u64 {
        F_VERSION_1 | F_RING_EVENT_IDX | 1 << 5
    }

    fn negotiate(&self) {
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for page in 0..2 {
            self.write(0x24, page);
            self.write(0x20, u32::MAX);
        }
        self.write(STATUS, 11);
    }
}

#[test]
fn another_device_goes_on_from_a_saved_state() {
    let f = fixture();
    f.negotiate();
    f.place_queue(0, 128, 0x1_0000);
    f.place_queue(1, 16, 0x2_0000);
    f.write(STATUS, 15);
    f.interrupt.config(&[9; 6]);
    // As it would have gone on.
    lock(&f.device).working[0].next_avail = 77;
    let saved = f.transport.save();

    let other = fixture();
    other.transport.restore(&saved).unwrap();
    assert_eq!(lock(&other.device).activated, Some((f.features(), vec![128, 16])));
    assert_eq!(lock(&other.device).working[0].next_avail, 77);
    assert_eq!((other.read(STATUS), other.read(INTERRUPT_STATUS)), (15, 2));
    assert_eq!(other.read(CONFIG_GENERATION), f.read(CONFIG_GENERATION));
    assert_eq!(other.transport.save(), saved);
    assert!(other.interrupt.irqfd().read().is_err(), "nothing is raised yet");
    other.transport.interrupt_again();
    assert!(other.interrupt.irqfd().read().is_ok());
    other.write(STATUS, 0);
    assert_eq!((other.read(STATUS), lock(&other.device).resets), (0, 1));
}

#[test]
fn states_of_other_devices_are_refused() {
    let f = fixture();
    f.negotiate();
    f.place_queue(0, 128, 0x1_0000);
    f.place_queue(1, 16, 0x2_0000);
    f.write(STATUS, 15);
    let error = |change: fn(&mut TransportState)| {
        let mut saved = f.transport.save();
        change(&mut saved);
        let other = fixture();
        let error = other.transport.restore(&saved).unwrap_err();
        assert_eq!(lock(&other.device).activated, None);
        error
    };
    assert!(matches!(error(|s| s.device_type = 2), RestoreError::Type { found: 42, wanted: 2 }));
    assert!(matches!(error(|s| s.driver_features |= 1 << 7), RestoreError::Features(128)));
    assert!(matches!(error(|s| _ = s.queues.pop()), RestoreError::Queues));
    let outside = |s: &mut TransportState| {
        let queue =
            QueueState { size: 16, ready: true, desc_table: 1 << 40, max_size: 16, ..Default::default() };
        s.working[1] = queue.into();
    };
    assert!(matches!(error(outside), RestoreError::Queue(_)));
}

#[test]
fn a_driver_finds_negotiates_and_starts_the_device() {
    let mut f = fixture();
    assert_eq!([f.read(0), f.read(4), f.read(8)], [MAGIC, 2, 42]);
    assert_eq!(f.read(0x10), 1 << 5 | 1 << 29);
    f.write(0x14, 1);
    assert_eq!(f.read(0x10), 1, "VERSION_1 is always offered");
    f.write(0x14, 2);
    assert_eq!(f.read(0x10), 0);
    f.negotiate();
    assert_eq!(f.read(STATUS), 11);
    f.write(0x30, 0);
    assert_eq!(f.read(0x34), 256);
    f.write(0x30, 2);
    assert_eq!(f.read(0x34), 0, "there is no third queue");
    f.place_queue(0, 128, 0x10000);
    assert_eq!(f.read(0x44), 1);
    f.write(STATUS, 15);
    let (features, sizes) = lock(&f.device).activated.clone().unwrap();
    assert_eq!(features, 1 << 5 | F_RING_EVENT_IDX | F_VERSION_1);
    assert_eq!(sizes, [128, 0]);
    f.event_loop.run_once(1000).unwrap();
    assert_eq!(
        std::mem::take(&mut lock(&f.device).seen),
        [0, 1],
        "what was notified before the start is seen"
    );

    f.transport.notifiers()[1].write(1).unwrap();
    f.event_loop.run_once(1000).unwrap();
    f.event_loop.run_once(0).unwrap();
    assert_eq!(lock(&f.device).seen, [1], "one notification, seen once though its counter is never read");
    f.transport.notifiers()[1].write(1).unwrap();
    f.event_loop.run_once(1000).unwrap();
    assert_eq!(lock(&f.device).seen, [1, 1]);

    f.write(STATUS, 0);
    assert_eq!(lock(&f.device).resets, 1);
    assert_eq!(f.read(STATUS), 0);
    f.write(0x30, 0);
    assert_eq!(f.read(0x44), 0);
    f.write(STATUS, 0);
    assert_eq!(lock(&f.device).resets, 1, "an idle device is not reset again");
}

#[test]
fn interrupts_are_seen_and_acknowledged_bit_by_bit() {
    let f = fixture();
    f.interrupt.queue();
    f.interrupt.config(&[7, 8]);
    assert_eq!(f.interrupt.irqfd().read().unwrap(), 2);
    assert_eq!((f.read(0x60), f.read(0x100)), (3, 0x807));
    f.write(0x64, 1);
    assert_eq!(f.read(0x60), 2);
}

#[test]
fn skipped_steps_and_late_changes_are_ignored() {
    let f = fixture();
    for value in [15, 11, 3, 7, 0x40] {
        f.write(STATUS, value);
        assert_eq!(f.read(STATUS), 0, "{value}");
    }
    f.write(STATUS, 1);
    f.place_queue(0, 16, 0x10000);
    assert_eq!(f.read(0x44), 0, "no queue before the features are settled");
    f.write(STATUS, 3);
    f.write(STATUS, 11);
    assert_eq!(f.read(STATUS), 3, "a driver without VERSION_1 is refused");
    f.write(0x24, 1);
    f.write(0x20, 1);
    f.write(STATUS, 11);
    f.place_queue(0, 16, 0x10000);
    f.write(STATUS, 15);
    f.place_queue(1, 16, 0x20000);
    assert_eq!(f.read(0x44), 0, "no queue after the start");
    assert_eq!(f.read(STATUS), 15);
}

#[test]
fn queues_outside_memory_need_a_reset_instead_of_a_start() {
    for base in [0x1f_f000, 0xffff_f000] {
        let f = fixture();
        f.negotiate();
        f.place_queue(0, 256, base);
        f.write(STATUS, 15);
        assert_eq!(f.read(STATUS) & status::NEEDS_RESET, status::NEEDS_RESET, "{base:#x}");
        assert!(lock(&f.device).activated.is_none());
        f.write(STATUS, 0);
        assert_eq!(f.read(STATUS), 0);
    }
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let f = fixture();
    lock(&f.device).refuse = true;
    f.negotiate();
    f.place_queue(0, 256, 0x10000);
    f.write(STATUS, 15);
    assert_eq!(f.read(STATUS) & status::NEEDS_RESET, status::NEEDS_RESET);
    f.write(STATUS, 0);
    assert_eq!(lock(&f.device).resets, 0);
}

#[test]
fn odd_sizes_and_addresses_of_queues_are_ignored() {
    let f = fixture();
    f.negotiate();
    f.write(0x30, 0);
    for size in [0, 3, 257, 512, 0x1_0000, u32::MAX] {
        f.write(0x38, size);
    }
    f.place_queue(0, 5, 0x10000);
    f.write(STATUS, 15);
    assert_eq!(lock(&f.device).activated.as_ref().unwrap().1, [256, 0], "the size stays the largest");
}

#[test]
fn every_width_and_offset_is_survived_and_the_config_space_is_bounded() {
    let f = fixture();
    for offset in 0..WINDOW {
        for len in 1..=8 {
            if offset + len <= WINDOW {
                let mut data = vec![0xaa; len as usize];
                f.transport.read(offset, &mut data);
                f.transport.write(offset, &data);
            }
        }
    }
    f.transport.write(0x100, &[1, 2, 3, 4, 5, 6]);
    let mut data = [9; 8];
    f.transport.read(0x102, &mut data);
    assert_eq!(data, [3, 4, 5, 6, 0, 0, 0, 0]);
}
