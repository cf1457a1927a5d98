//! The host's side of a device.

use std::sync::{Arc, Mutex};

use pulau_vmm::event_loop::{EventLoop, EventSet, Subscriber};
use pulau_vmm::virtio::VirtioDevice;

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
