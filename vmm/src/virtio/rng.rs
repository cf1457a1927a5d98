//! The entropy device (virtio 1.2, section 5.4): fills the guest's buffers with the host kernel's random
//! numbers, straight into place, as fast as its rate limiter lets it.
//!
//! It keeps no randomness of its own, so nothing about it has to be guarded or renewed on restore.

use std::io;
use std::sync::Arc;

use log::warn;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{BadChain, Direction, GuestBuffers};
use super::{ActivateError, Activation, F_RING_EVENT_IDX, FIRST_DEVICE_TOKEN, Interrupt, VirtioDevice};
use crate::config::RateLimiterConfig;
use crate::event_loop::{EventSet, Events, Subscriber};
use crate::memory::Memory;
use crate::rate_limiter::RateLimiter;

/// Device type (virtio 1.2, section 5).
pub const DEVICE_TYPE: u32 = 4;

/// Most bytes given for one request; the driver asks again if it wants more.
pub const MAX_REQUEST: usize = 64 << 10;

/// Requests before others in the event loop get their turn.
const BUDGET: usize = 16;

const QUEUE_SIZES: [u16; 1] = [256];
const QUEUE: u32 = 0;
const LIMITER: u32 = FIRST_DEVICE_TOKEN;
const CONTINUE: u32 = FIRST_DEVICE_TOKEN + 1;

/// See the module's text.
pub struct Rng {
    limiter: RateLimiter,
    events: Option<Events>,
    resume: EventFd,
    active: Option<Active>,
    paused: bool,
}

struct Active {
    queue: Queue,
    memory: Arc<Memory>,
    interrupt: Interrupt,
    buffers: GuestBuffers,
}

#[derive(Debug, thiserror::Error)]
enum RngError {
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("chain: {0}")]
    Chain(#[from] BadChain),
    #[error("getrandom: {0}")]
    Host(#[from] io::Error),
}

impl Rng {
    /// A device with these limits, in requests and bytes. Fails only where the host gives no descriptors.
    pub fn new(limits: Option<&RateLimiterConfig>) -> io::Result<Self> {
        Ok(Self {
            limiter: RateLimiter::from_config(limits)?,
            events: None,
            resume: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            active: None,
            paused: false,
        })
    }

    fn work(&mut self) -> Result<(), RngError> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let mut served = 0;
        while served < BUDGET {
            let Some(chain) = active.queue.iter(&*active.memory)?.next() else {
                if active.queue.enable_notification(&*active.memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            active.buffers.clear();
            active.buffers.push_chain(chain, Direction::Write)?;
            active.buffers.truncate(MAX_REQUEST);
            if !self.limiter.admit(active.buffers.len() as u64) {
                active.queue.go_to_previous_position();
                break;
            }
            fill(&active.buffers)?;
            active.queue.add_used(&*active.memory, head, active.buffers.len() as u32)?;
            served += 1;
        }
        if served == BUDGET {
            let _ = self.resume.write(1);
        }
        if served > 0 && active.queue.needs_notification(&*active.memory)? {
            active.interrupt.queue();
        }
        Ok(())
    }
}

fn fill(buffers: &GuestBuffers) -> io::Result<()> {
    for piece in buffers.pieces() {
        let mut done = 0;
        while done < piece.iov_len {
            // SAFETY: the piece is guest memory, writable, and kept alive by `buffers`.
            let count = unsafe { libc::getrandom(piece.iov_base.byte_add(done), piece.iov_len - done, 0) };
            match usize::try_from(count) {
                Ok(count) => done += count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
    Ok(())
}

impl Subscriber for Rng {
    fn process(&mut self, token: u32, _: EventSet) {
        if token == LIMITER {
            self.limiter.unblock();
        }
        if !matches!(token, QUEUE | LIMITER | CONTINUE) || self.limiter.is_blocked() || self.paused {
            return;
        }
        if let Err(e) = self.work() {
            warn!("entropy: {e}; stopped until the driver resets the device");
            if let Some(active) = self.active.take() {
                active.interrupt.needs_reset();
            }
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        F_RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn attach(&mut self, events: Events) {
        self.events = Some(events);
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let queue = queues.into_iter().next().filter(|q| q.ready()).ok_or(ActivateError::QueueMissing(0))?;
        if let Some(events) = &self.events {
            let host = |e| ActivateError::Host("entropy", e);
            self.limiter.unregister(events);
            events.remove(&self.resume);
            self.limiter.register(events, LIMITER).map_err(host)?;
            events.add(&self.resume, CONTINUE, EventSet::IN | EventSet::EDGE_TRIGGERED).map_err(host)?;
        }
        self.limiter.unblock();
        let buffers = GuestBuffers::new(memory.clone());
        self.active = Some(Active { queue, memory, interrupt, buffers });
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        self.active.iter().map(|active| active.queue.state()).collect()
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        let _ = self.resume.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TokenBucketConfig;
    use crate::virtio::testing::{Driver, MEMORY_SIZE};

    const BUFFER: u64 = 0x10_0000;

    fn device(limits: Option<&RateLimiterConfig>, driver: &Driver) -> Rng {
        let mut rng = Rng::new(limits).unwrap();
        rng.activate(driver.activation(F_RING_EVENT_IDX)).unwrap();
        rng
    }

    #[test]
    fn requests_are_filled_whole_up_to_the_cap() {
        let mut driver = Driver::new(&QUEUE_SIZES);
        let mut rng = device(None, &driver);
        driver.queues[0].offer(&[(BUFFER, 40, true), (BUFFER + 100, 24, true)]);
        driver.queues[0].offer_indirect(&[(BUFFER + 0x1_0000, 0x4_0000, true)]);
        driver.queues[0].offer(&[(BUFFER, 0, true)]);
        rng.process(QUEUE, EventSet::IN);
        assert_eq!(driver.queues[0].used_chain(), Some((0, 64)));
        assert_eq!(driver.queues[0].used_chain(), Some((2, MAX_REQUEST as u32)));
        assert_eq!(driver.queues[0].used_chain(), Some((3, 0)));
        assert!(driver.interrupted());
        assert_ne!(driver.read(BUFFER, 40), [0; 40]);
        assert_eq!(driver.read(BUFFER + 40, 60), [0; 60]);
        assert_ne!(driver.read(BUFFER + 100, 24), [0; 24]);
        let big = driver.read(BUFFER + 0x1_0000, MAX_REQUEST + 16);
        assert!(big[..MAX_REQUEST].chunks(64).all(|chunk| chunk != [0; 64]));
        assert_eq!(big[MAX_REQUEST..], [0; 16]);
    }

    #[test]
    fn the_limiter_delays_what_is_beyond_it() {
        let mut driver = Driver::new(&QUEUE_SIZES);
        let bucket = TokenBucketConfig { size: 2, one_time_burst: None, refill_time: 50 };
        let limits = RateLimiterConfig { ops: Some(bucket), bandwidth: None };
        let mut event_loop = crate::event_loop::EventLoop::new().unwrap();
        let rng = Arc::new(std::sync::Mutex::new(Rng::new(Some(&limits)).unwrap()));
        let events = event_loop.subscribe(rng.clone());
        crate::event_loop::lock(&rng).attach(events);
        crate::event_loop::lock(&rng).activate(driver.activation(F_RING_EVENT_IDX)).unwrap();
        for _ in 0..3 {
            driver.queues[0].offer(&[(BUFFER, 8, true)]);
        }
        crate::event_loop::lock(&rng).process(QUEUE, EventSet::IN);
        assert!(driver.queues[0].used_chain().is_some() && driver.queues[0].used_chain().is_some());
        assert_eq!(driver.queues[0].used_chain(), None);
        let start = std::time::Instant::now();
        while driver.queues[0].used_chain().is_none() {
            assert!(start.elapsed().as_secs() < 5, "the third request never comes");
            event_loop.run_once(100).unwrap();
        }
        assert!(start.elapsed().as_millis() >= 10);
    }

    #[test]
    fn many_requests_are_all_served() {
        let mut driver = Driver::new(&QUEUE_SIZES);
        let mut rng = device(None, &driver);
        for _ in 0..200 {
            driver.queues[0].offer(&[(BUFFER, 8, true)]);
        }
        let mut rounds = 0;
        rng.process(QUEUE, EventSet::IN);
        while rng.resume.read().is_ok() {
            rng.process(CONTINUE, EventSet::IN);
            rounds += 1;
        }
        assert!((200 / BUDGET..=200 / BUDGET + 1).contains(&rounds), "{rounds}");
        assert_eq!(std::iter::from_fn(|| driver.queues[0].used_chain()).count(), 200);
    }

    #[test]
    fn broken_chains_stop_it_until_reset() {
        for buffer in
            [(BUFFER, 8, false), (MEMORY_SIZE, 8, true), (MEMORY_SIZE - 4, 8, true), (0, u32::MAX, true)]
        {
            let mut driver = Driver::new(&QUEUE_SIZES);
            let mut rng = device(None, &driver);
            driver.queues[0].offer(&[buffer]);
            rng.process(QUEUE, EventSet::IN);
            assert!(driver.broken(), "{buffer:?}");
            driver.queues[0].offer(&[(BUFFER, 8, true)]);
            rng.process(QUEUE, EventSet::IN);
            assert_eq!(driver.queues[0].used_chain(), None);
            rng.reset();
            let mut driver = Driver::new(&QUEUE_SIZES);
            rng.activate(driver.activation(0)).unwrap();
            driver.queues[0].offer(&[(BUFFER, 8, true)]);
            rng.process(QUEUE, EventSet::IN);
            assert_eq!(driver.queues[0].used_chain(), Some((0, 8)));
        }
    }
}
