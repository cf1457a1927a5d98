//! The block device proper. See the folder's text.
//!
//! One pass of [`Block::run`] takes what the driver has made available, starts or does it, answers what is
//! done, and interrupts once. It ends when the queue is empty, when the rate limiter or a full ring says so
//! (the timer or a completion starts the next pass), or when it has done so much that other devices
//! must have their turn (it then wakes itself up). The driver's notifications are off during a pass, and
//! stay off while something else is bound to start the next.
//!
//! A request that fails is answered with an error, and counted; the first since activation is logged. Only
//! a chain without a place for an answer, or a ring outside memory, ends in `DEVICE_NEEDS_RESET`.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use log::warn;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::request::{Limits, MAX_CLEAR_SECTORS, MAX_DESCRIPTORS, Operation, Request, SERIAL_LEN};
use super::uring::Uring;
use crate::config::{CacheType, DriveConfig, DriveUpdate, IoEngine};
use crate::event_loop::{EventSet, Events, Subscriber};
use crate::memory::Memory;
use crate::metrics;
use crate::rate_limiter::RateLimiter;
use crate::virtio::buffers::GuestBuffers;
use crate::virtio::disk::{Clear, Disk, DiskError, SECTOR};
use crate::virtio::{
    ActivateError, Activation, F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, FIRST_DEVICE_TOKEN, Interrupt,
    VirtioDevice, read_config_space,
};

const QUEUE_SIZE: u16 = 256;
/// Completions of the ring, and what is left of a pass that was long enough.
const WAKE: u32 = FIRST_DEVICE_TOKEN;
/// The rate limiter lets go.
const LIMITER: u32 = FIRST_DEVICE_TOKEN + 1;
/// Most bytes, or what is worth as much, and requests done in one pass.
const PASS_BYTES: u64 = 8 << 20;
const PASS_REQUESTS: u32 = 256;

/// Why there is no such drive.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Its file is no disk.
    #[error("drives: drive {id}: path_on_host: {source}")]
    Disk { id: String, source: DiskError },
    /// It has no file.
    #[error("drives: drive {id}: path_on_host is missing")]
    NoPath { id: String },
    /// There is no io_uring for it.
    #[error("drives: drive {id}: io_engine Async: {}: {source}", uring_remedy(.source))]
    Uring { id: String, source: io::Error },
    /// Something else of the host failed.
    #[error("drives: drive {id}: {what}: {source}")]
    Host { id: String, what: &'static str, source: io::Error },
}

fn uring_remedy(e: &io::Error) -> &'static str {
    match e.raw_os_error() {
        Some(libc::ENOSYS) => "the host's kernel has no io_uring; use io_engine Sync",
        Some(libc::EPERM | libc::EACCES) => {
            "the host does not permit io_uring (see /proc/sys/kernel/io_uring_disabled); use io_engine Sync"
        }
        Some(libc::EINVAL) => "the host's kernel is too old (5.10 is needed); use io_engine Sync",
        Some(libc::ENOMEM) => "not enough lockable memory for io_uring (ulimit -l)",
        _ => "cannot set up io_uring",
    }
}

metrics::group! {
    /// What a drive has done.
    pub struct BlockMetrics {
        /// Bytes read.
        read_bytes: Counter,
        /// Bytes written.
        write_bytes: Counter,
        /// Reads done.
        read_count: Counter,
        /// Writes done.
        write_count: Counter,
        /// Flushes done.
        flush_count: Counter,
        /// Requests that failed.
        execute_fails: Counter,
        /// Requests that were no valid ones.
        invalid_reqs_count: Counter,
        /// Passes of the queue.
        queue_event_count: Counter,
        /// Times the rate limiter made requests wait.
        rate_limiter_throttled_events: Counter,
        /// Times a full ring made requests wait.
        io_engine_throttled_events: Counter,
        /// Changes of the file behind the drive.
        update_count: Counter,
        /// Changes that failed.
        update_fails: Counter,
    }
}

/// A block device.
pub struct Block {
    id: String,
    cache: CacheType,
    read_only: bool,
    /// Before the disk: its end waits for what is in flight there.
    uring: Option<Uring>,
    disk: Disk,
    limiter: RateLimiter,
    wake: EventFd,
    events: Option<Events>,
    active: Option<Active>,
    paused: bool,
    metrics: Arc<BlockMetrics>,
}

struct Active {
    memory: Arc<Memory>,
    queue: Queue,
    interrupt: Interrupt,
    features: u64,
    /// The driver broke the protocol; nothing happens until a reset.
    broken: bool,
    /// A failure has been logged.
    complained: bool,
    /// Something was answered since the driver was last told.
    answered: bool,
    /// Lists of requests that are done, to be used again.
    spare: Vec<GuestBuffers>,
}

/// The driver broke the protocol.
struct Broken;

impl From<virtio_queue::Error> for Broken {
    fn from(_: virtio_queue::Error) -> Self {
        Self
    }
}

/// Why a pass ended.
enum End {
    /// Nothing is available; the driver will notify.
    Empty,
    /// The limiter's timer or a completion starts the next pass.
    Waits,
    /// It was long enough.
    Turn,
}

impl Block {
    /// Opens the drive `config` describes.
    pub fn new(config: &DriveConfig) -> Result<Self, BlockError> {
        let id = || config.drive_id.clone();
        let host = |what, source| BlockError::Host { id: id(), what, source };
        let path = config.path_on_host.as_deref().ok_or_else(|| BlockError::NoPath { id: id() })?;
        let disk =
            Disk::open(path, config.read_only()).map_err(|source| BlockError::Disk { id: id(), source })?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(|e| host("eventfd", e))?;
        let uring = match config.io_engine.unwrap_or_default() {
            IoEngine::Sync => None,
            IoEngine::Async => Some(
                Uring::new(disk.as_raw_fd(), &wake)
                    .map_err(|source| BlockError::Uring { id: id(), source })?,
            ),
        };
        let limiter = RateLimiter::from_config(config.rate_limiter.as_ref()).map_err(|e| host("timer", e))?;
        let metrics = Arc::new(BlockMetrics::new());
        metrics::register("block", Some(&config.drive_id), metrics.clone());
        Ok(Self {
            id: id(),
            cache: config.cache_type,
            read_only: config.read_only(),
            uring,
            disk,
            limiter,
            wake,
            events: None,
            active: None,
            paused: false,
            metrics,
        })
    }

    /// Puts another file behind the device, or changes its limits, or both. With an error, nothing has
    /// changed. The driver is told of a new size; what is in flight is completed on the old file first.
    pub fn update(&mut self, update: &DriveUpdate) -> Result<(), BlockError> {
        if let Some(path) = &update.path_on_host {
            let result = self.update_path(path);
            let metrics = &self.metrics;
            if result.is_ok() { &metrics.update_count } else { &metrics.update_fails }.inc();
            result?;
        }
        if let Some(limits) = &update.rate_limiter {
            self.limiter.update(limits);
        }
        Ok(())
    }

    fn update_path(&mut self, path: &Path) -> Result<(), BlockError> {
        let error = |source| BlockError::Disk { id: self.id.clone(), source };
        if let Some(disk) = self.disk.reopen(path).map_err(error)? {
            self.drain();
            if let Some(uring) = &mut self.uring {
                uring
                    .replace_file(disk.as_raw_fd())
                    .map_err(|source| BlockError::Uring { id: self.id.clone(), source })?;
            }
            self.disk = disk;
        }
        if let Some(active) = &self.active {
            active.interrupt.config(&self.config_space());
        }
        Ok(())
    }

    /// Its name in the API.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the drive has done so far.
    pub fn metrics(&self) -> &Arc<BlockMetrics> {
        &self.metrics
    }

    /// Waits for what is in flight and answers it.
    fn drain(&mut self) {
        while let Some(uring) = self.uring.as_mut().filter(|u| u.in_flight() > 0) {
            if let Err(e) = uring.wait() {
                warn!("drive {}: io_uring: {e}", self.id);
                break;
            }
            self.guarded(Self::reap);
            // Without a driver to answer to, or with a broken one, they are thrown away.
            while self.uring.as_mut().and_then(Uring::reap).is_some() {}
        }
        self.guarded(Self::notify);
    }

    /// Does what is to do.
    fn run(&mut self) {
        if !self.paused {
            self.metrics.queue_event_count.inc();
            self.guarded(Self::pass);
        }
    }

    /// Runs `work` on an activation that is whole, and marks it broken if that fails.
    fn guarded(&mut self, work: impl FnOnce(&mut Self, &mut Active) -> Result<(), Broken>) {
        let Some(mut active) = self.active.take() else { return };
        if !active.broken && work(self, &mut active).is_err() {
            warn!("drive {}: the driver broke the protocol; the device needs a reset", self.id);
            active.broken = true;
            active.interrupt.needs_reset();
        }
        self.active = Some(active);
    }

    fn pass(&mut self, active: &mut Active) -> Result<(), Broken> {
        self.reap(active)?;
        let (mut bytes, mut requests) = (0, 0);
        let end = loop {
            active.queue.disable_notification(&*active.memory)?;
            let end = self.take(active, &mut bytes, &mut requests);
            // Also after an error: what was started must be known to the kernel, or it never ends.
            self.submit(active);
            let end = end?;
            // Much is there already when submission returns, as it came from the page cache.
            self.reap(active)?;
            match end {
                End::Waits if !self.limiter.is_blocked() && self.has_room() => {}
                End::Empty if active.queue.enable_notification(&*active.memory)? => {}
                end => break end,
            }
        };
        if let End::Turn = end {
            let _ = self.wake.write(1);
        }
        self.notify(active)
    }

    fn has_room(&self) -> bool {
        self.uring.as_ref().is_none_or(Uring::has_room)
    }

    /// Takes requests off the queue until there is a reason to end.
    fn take(&mut self, active: &mut Active, bytes: &mut u64, requests: &mut u32) -> Result<End, Broken> {
        let memory = active.memory.clone();
        let limits = Limits { size: self.disk.size(), features: active.features, read_only: self.read_only };
        loop {
            if *bytes >= PASS_BYTES || *requests >= PASS_REQUESTS {
                return Ok(End::Turn);
            }
            if self.limiter.is_blocked() {
                return Ok(End::Waits);
            }
            if !self.has_room() {
                self.metrics.io_engine_throttled_events.inc();
                return Ok(End::Waits);
            }
            let Some(chain) = active.queue.iter(&*memory)?.next() else { return Ok(End::Empty) };
            let data = active.spare.pop().unwrap_or_else(|| GuestBuffers::new(memory.clone()));
            let request = Request::parse(&memory, chain, data, limits).map_err(|_| Broken)?;
            if !self.limiter.admit(request.bytes()) {
                self.metrics.rate_limiter_throttled_events.inc();
                active.queue.go_to_previous_position();
                active.spare.push(request.data);
                return Ok(End::Waits);
            }
            *bytes = bytes.saturating_add(request.cost());
            *requests += 1;
            self.start(active, request)?;
        }
    }

    /// Does a request, or has the ring do it.
    fn start(&mut self, active: &mut Active, request: Request) -> Result<(), Broken> {
        // The ring can punch holes in a file, but not tell a device to discard.
        let at_once =
            matches!(request.operation, Operation::Clear(_, Clear::Discard)) && self.disk.is_device();
        let request = match &mut self.uring {
            Some(uring) if !at_once => match uring.push(request) {
                Ok(()) => return Ok(()),
                Err(request) => request,
            },
            _ => request,
        };
        let result = match request.operation {
            Operation::Read => self.disk.read(&request.data, request.offset, 0),
            Operation::Write => self.disk.write(&request.data, request.offset, 0),
            Operation::Flush => self.disk.flush(),
            Operation::Clear(range, how) => self.disk.clear(range, how),
            Operation::GetId => {
                request.data.write_at(0, &self.serial());
                Ok(())
            }
            Operation::Refuse(_) => Ok(()),
        };
        self.finish(active, request, result)
    }

    fn submit(&mut self, active: &mut Active) {
        let Some(uring) = &mut self.uring else { return };
        match uring.submit() {
            Ok(()) => {}
            // The host is short of something for a moment: the next pass tries again.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                let _ = self.wake.write(1);
            }
            Err(e) => {
                warn!("drive {}: io_uring: {e}", self.id);
                active.broken = true;
                active.interrupt.needs_reset();
            }
        }
    }

    /// Answers what the ring has completed.
    fn reap(&mut self, active: &mut Active) -> Result<(), Broken> {
        while let Some((request, result)) = self.uring.as_mut().and_then(Uring::reap) {
            let result = self.outcome(&request, result);
            self.finish(active, request, result)?;
        }
        Ok(())
    }

    /// What `result`, the ring's answer to `request`, comes to; the rest of a transfer that was cut short
    /// is made here.
    fn outcome(&self, request: &Request, result: i32) -> io::Result<()> {
        let done = match usize::try_from(result) {
            Ok(done) => done,
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN) => 0,
            Err(_) => return Err(io::Error::from_raw_os_error(-result)),
        };
        match request.operation {
            Operation::Read => self.disk.read(&request.data, request.offset, done),
            Operation::Write => self.disk.write(&request.data, request.offset, done),
            Operation::Flush if result < 0 => self.disk.flush(),
            Operation::Clear(range, how) if result < 0 => self.disk.clear(range, how),
            _ => Ok(()),
        }
    }

    fn finish(
        &mut self,
        active: &mut Active,
        request: Request,
        result: io::Result<()>,
    ) -> Result<(), Broken> {
        let unsupported = |e: &io::Error| e.raw_os_error() == Some(libc::EOPNOTSUPP);
        let metrics = &self.metrics;
        let status = match (&result, request.operation) {
            (_, Operation::Refuse(status)) => {
                metrics.invalid_reqs_count.inc();
                status
            }
            // A driver that is told so falls back to writing zeroes, and gives up discarding.
            (Err(e), Operation::Clear(..)) if unsupported(e) => VIRTIO_BLK_S_UNSUPP as u8,
            (Err(_), _) => {
                metrics.execute_fails.inc();
                VIRTIO_BLK_S_IOERR as u8
            }
            (Ok(()), operation) => {
                match operation {
                    Operation::Read => {
                        metrics.read_count.inc();
                        metrics.read_bytes.add(request.bytes());
                    }
                    Operation::Write => {
                        metrics.write_count.inc();
                        metrics.write_bytes.add(request.bytes());
                    }
                    Operation::Flush => metrics.flush_count.inc(),
                    _ => {}
                }
                VIRTIO_BLK_S_OK as u8
            }
        };
        if let Err(e) = result
            && !std::mem::replace(&mut active.complained, true)
        {
            let (operation, offset, path) = (request.operation, request.offset, self.disk.path().display());
            warn!(
                "drive {}: {operation:?} at byte {offset} of {path}: {e} (further errors not logged)",
                self.id
            );
        }
        active.answered = true;
        let len = request.answer(&active.memory, status);
        active.spare.push(request.data);
        Ok(active.queue.add_used(&*active.memory, request.head, len)?)
    }

    /// Interrupts, if the driver wants to know of what was answered since the last time.
    fn notify(&mut self, active: &mut Active) -> Result<(), Broken> {
        if std::mem::take(&mut active.answered) && active.queue.needs_notification(&*active.memory)? {
            active.interrupt.queue();
        }
        Ok(())
    }

    fn serial(&self) -> [u8; SERIAL_LEN] {
        let mut serial = [0; SERIAL_LEN];
        let len = self.id.len().min(SERIAL_LEN);
        serial[..len].copy_from_slice(&self.id.as_bytes()[..len]);
        serial
    }

    /// The configuration space (5.2.4), up to and with the fields of `WRITE_ZEROES`.
    fn config_space(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / SECTOR).to_le_bytes()); // capacity
        put(12, &(MAX_DESCRIPTORS as u32 - 2).to_le_bytes()); // seg_max
        put(36, &MAX_CLEAR_SECTORS.to_le_bytes()); // max_discard_sectors
        put(40, &1u32.to_le_bytes()); // max_discard_seg
        put(44, &1u32.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_CLEAR_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[1]); // write_zeroes_may_unmap
        space
    }
}

impl Subscriber for Block {
    fn process(&mut self, token: u32, _: EventSet) {
        if token == LIMITER {
            self.limiter.unblock();
        }
        self.run();
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let mut features = F_RING_EVENT_IDX | F_RING_INDIRECT_DESC | 1 << VIRTIO_BLK_F_SEG_MAX;
        if self.read_only {
            return features | 1 << VIRTIO_BLK_F_RO;
        }
        features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        if self.cache == CacheType::Writeback {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn attach(&mut self, events: Events) {
        self.events = Some(events);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let queue = queues.into_iter().next().filter(QueueT::ready).ok_or(ActivateError::QueueMissing(0))?;
        if let Some(events) = &self.events {
            events
                .add(&self.wake, WAKE, EventSet::IN | EventSet::EDGE_TRIGGERED)
                .map_err(|e| ActivateError::Host("epoll", e))?;
            self.limiter.register(events, LIMITER).map_err(|e| {
                events.remove(&self.wake);
                ActivateError::Host("epoll", e)
            })?;
        }
        self.active = Some(Active {
            memory,
            queue,
            interrupt,
            features,
            broken: false,
            complained: false,
            answered: false,
            spare: Vec::new(),
        });
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        self.active.iter().filter(|active| !active.broken).map(|active| active.queue.state()).collect()
    }

    fn pause(&mut self) {
        self.paused = true;
        self.drain();
    }

    fn resume(&mut self) {
        self.paused = false;
        // A notification may have come and gone; the event loop does the work.
        let _ = self.wake.write(1);
    }

    fn reset(&mut self) {
        // The answers go to rings that are about to be forgotten, which they are not yet.
        self.drain();
        self.active = None;
        if let Some(events) = &self.events {
            events.remove(&self.wake);
            self.limiter.unregister(events);
        }
        self.limiter.unblock();
    }
}
