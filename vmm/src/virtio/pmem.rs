//! The persistent memory device (virtio 1.2, section 5.19): a file of the host as memory of the guest, which
//! reads and writes it without asking anybody, and asks the device only to flush.
//!
//! The file's pages in the host's page cache are the guest's memory: read-only files, such as root file
//! systems, are held once for all microVMs. Guest addresses come in units of 2 MiB; what the file lacks to
//! the last one reads as zeroes, and what is written there is forgotten. The device never touches the
//! memory itself.
//!
//! A flush is one `fdatasync` for all flushes asked for until then. What has been flushed is never lost.
//!
//! A guest's access to memory cannot fail. So a file that it may write gets all its space on the disk before
//! the guest runs: a hole that a full disk could not fill would leave the guest waiting for ever. The same
//! happens where somebody cuts the file short.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use log::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT, Writer};
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{BadChain, check_length};
use super::disk::{Disk, DiskError};
use super::{
    ActivateError, Activation, F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, FIRST_DEVICE_TOKEN, Interrupt,
    VirtioDevice, read_config_space,
};
use crate::config::{PmemConfig, PmemUpdate};
use crate::event_loop::{EventSet, Events, Subscriber};
use crate::memory::Memory;
use crate::metrics;
use crate::rate_limiter::RateLimiter;

mod mapping;

pub use mapping::{ALIGNMENT, Mapping};

const QUEUE_SIZE: u16 = 64;
/// There is more in the queue.
const WAKE: u32 = FIRST_DEVICE_TOKEN;
/// The rate limiter lets go.
const LIMITER: u32 = FIRST_DEVICE_TOKEN + 1;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`, the one request there is.
const REQUEST_FLUSH: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_OK`.
const RESPONSE_OK: u32 = 0;
/// `VIRTIO_PMEM_RESP_TYPE_EIO`.
const RESPONSE_EIO: u32 = 1;

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// Its file cannot be used.
    #[error("pmem: device {id}: path_on_host: {source}")]
    Disk { id: String, source: DiskError },
    /// Its file has holes that the disk has no room for.
    #[error("pmem: device {id}: path_on_host: cannot fill the holes of {}: {source}", path.display())]
    Reserve { id: String, path: std::path::PathBuf, source: io::Error },
    /// Its file cannot be mapped.
    #[error("pmem: device {id}: path_on_host: cannot map {}: {source}", path.display())]
    Map { id: String, path: std::path::PathBuf, source: io::Error },
    /// Something else of the host failed.
    #[error("pmem: device {id}: {what}: {source}")]
    Host { id: String, what: &'static str, source: io::Error },
}

metrics::group! {
    /// What a persistent memory device has done.
    pub struct PmemMetrics {
        /// Passes of the queue.
        queue_event_count: Counter,
        /// Flushes made, each for one or more that were asked for.
        flush_count: Counter,
        /// Flushes that failed.
        event_fails: Counter,
        /// Times the rate limiter made flushes wait.
        rate_limiter_throttled_events: Counter,
    }
}

/// A persistent memory device.
pub struct Pmem {
    id: String,
    read_only: bool,
    disk: Disk,
    mapping: Mapping,
    /// Guest physical address of the first byte, once it has one.
    start: u64,
    limiter: RateLimiter,
    wake: EventFd,
    events: Option<Events>,
    active: Option<Active>,
    paused: bool,
    metrics: Arc<PmemMetrics>,
}

struct Active {
    memory: Arc<Memory>,
    queue: Queue,
    interrupt: Interrupt,
    /// The driver broke the protocol; nothing happens until a reset.
    broken: bool,
}

#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("a chain without room for request or answer")]
    TooShort,
    #[error("chain: {0}")]
    Chain(#[from] BadChain),
}

impl Pmem {
    /// Opens and maps the file `config` names. The device has to be [placed](Pmem::place) before the
    /// guest runs.
    pub fn new(config: &PmemConfig) -> Result<Self, PmemError> {
        let id = || config.id.clone();
        let host = |what, source| PmemError::Host { id: id(), what, source };
        let disk = Disk::open(&config.path_on_host, config.read_only)
            .map_err(|source| PmemError::Disk { id: id(), source })?;
        if !config.read_only {
            disk.reserve().map_err(|source| PmemError::Reserve {
                id: id(),
                path: config.path_on_host.clone(),
                source,
            })?;
        }
        let mapping = Mapping::new(disk.as_raw_fd(), disk.size(), config.read_only)
            .map_err(|source| PmemError::Map { id: id(), path: config.path_on_host.clone(), source })?;
        let limiter = RateLimiter::from_config(config.rate_limiter.as_ref()).map_err(|e| host("timer", e))?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e| host("eventfd", e))?;
        let metrics = Arc::new(PmemMetrics::new());
        metrics::register("pmem", Some(&config.id), metrics.clone());
        Ok(Self {
            id: id(),
            read_only: config.read_only,
            disk,
            mapping,
            start: 0,
            limiter,
            wake,
            events: None,
            active: None,
            paused: false,
            metrics,
        })
    }

    /// What is to be put into the guest's address space at a multiple of [`ALIGNMENT`], and stay there
    /// while this device lives.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Says where [`Pmem::mapping`] was put: the guest physical address of its first byte.
    pub fn place(&mut self, start: u64) {
        self.start = start;
    }

    /// Its name in the API.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it has done so far.
    pub fn metrics(&self) -> &Arc<PmemMetrics> {
        &self.metrics
    }

    /// Changes its limits.
    pub fn update(&mut self, update: &PmemUpdate) {
        if let Some(limits) = &update.rate_limiter {
            self.limiter.update(limits);
        }
    }

    fn run(&mut self) {
        if self.paused || self.limiter.is_blocked() {
            return;
        }
        let Some(mut active) = self.active.take() else { return };
        if !active.broken
            && let Err(e) = self.pass(&mut active)
        {
            warn!("pmem {}: {e}; stopped until the driver resets the device", self.id);
            active.broken = true;
            active.interrupt.needs_reset();
        }
        self.active = Some(active);
    }

    /// Takes all that is asked for, flushes once, and answers.
    fn pass(&mut self, active: &mut Active) -> Result<(), Broken> {
        self.metrics.queue_event_count.inc();
        let memory = active.memory.clone();
        let mut asked = Vec::new();
        while asked.len() < usize::from(QUEUE_SIZE) {
            let Some(chain) = active.queue.iter(&*memory)?.next() else {
                if asked.is_empty() && active.queue.enable_notification(&*memory)? {
                    continue;
                }
                break;
            };
            // The whole file, since how much of it is dirty is not known (as Firecracker counts).
            if asked.is_empty() && !self.limiter.admit(self.disk.size()) {
                self.metrics.rate_limiter_throttled_events.inc();
                active.queue.go_to_previous_position();
                return Ok(());
            }
            asked.push(parse(&memory, chain)?);
        }
        if asked.is_empty() {
            return Ok(());
        }
        let flushed = self.flush();
        for (head, request, mut answer) in asked {
            let response = if request == REQUEST_FLUSH && flushed { RESPONSE_OK } else { RESPONSE_EIO };
            answer.write_obj(response.to_le()).map_err(|_| Broken::TooShort)?;
            active.queue.add_used(&*memory, head, 4)?;
        }
        if active.queue.needs_notification(&*memory)? {
            active.interrupt.queue();
        }
        // Others have their turn before what came meanwhile.
        if active.queue.enable_notification(&*memory)? {
            let _ = self.wake.write(1);
        }
        Ok(())
    }

    /// Makes what the guest has written durable; whether that succeeded.
    fn flush(&self) -> bool {
        if self.read_only {
            return true;
        }
        self.metrics.flush_count.inc();
        let result = self.disk.flush();
        if let Err(e) = &result {
            self.metrics.event_fails.inc();
            warn!("pmem {}: cannot flush {}: {e}", self.id, self.disk.path().display());
        }
        result.is_ok()
    }
}

/// A request: its chain's head, what it asks for, and room for the answer.
fn parse<'a>(
    memory: &'a Memory,
    chain: DescriptorChain<&'a Memory>,
) -> Result<(u16, u32, Writer<'a>), Broken> {
    check_length(&chain)?;
    let head = chain.head_index();
    let mut request = chain.clone().reader(memory)?;
    let answer = chain.writer(memory)?;
    if answer.available_bytes() < 4 {
        return Err(Broken::TooShort);
    }
    let kind: u32 = request.read_obj().map_err(|_| Broken::TooShort)?;
    Ok((head, u32::from_le(kind), answer))
}

impl Subscriber for Pmem {
    fn process(&mut self, token: u32, _: EventSet) {
        if token == LIMITER {
            self.limiter.unblock();
        }
        self.run();
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        F_RING_EVENT_IDX | F_RING_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn attach(&mut self, events: Events) {
        self.events = Some(events);
    }

    /// Address and length of the memory (5.19.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 16];
        space[..8].copy_from_slice(&self.start.to_le_bytes());
        space[8..].copy_from_slice(&self.mapping.len().to_le_bytes());
        read_config_space(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let queue = queues.into_iter().next().filter(QueueT::ready).ok_or(ActivateError::QueueMissing(0))?;
        if let Some(events) = &self.events {
            let error = |e| ActivateError::Host("epoll", e);
            events.add(&self.wake, WAKE, EventSet::IN | EventSet::EDGE_TRIGGERED).map_err(error)?;
            self.limiter.register(events, LIMITER).map_err(|e| {
                events.remove(&self.wake);
                error(e)
            })?;
        }
        self.active = Some(Active { memory, queue, interrupt, broken: false });
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        self.active.iter().filter(|active| !active.broken).map(|active| active.queue.state()).collect()
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        let _ = self.wake.write(1);
    }

    fn reset(&mut self) {
        self.active = None;
        if let Some(events) = &self.events {
            events.remove(&self.wake);
            self.limiter.unregister(events);
        }
        self.limiter.unblock();
    }
}

#[cfg(test)]
#[path = "pmem/tests.rs"]
mod tests;
