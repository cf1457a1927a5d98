//! The memory balloon (virtio 1.2, section 5.5): takes memory back from the guest.
//!
//! | queue | the driver |
//! | --- | --- |
//! | inflate | names pages it gives up, until there are as many as the host wants |
//! | deflate | names pages it takes back; they are simply used again |
//! | statistics | leaves a buffer of numbers, which is handed back when new ones are wanted |
//! | hinting | names memory that is free now, when the host asks ([`hinting`]) |
//! | reporting | names memory as it becomes free |
//!
//! What is named is given back to the host at once ([`pages`]); the guest gets it anew when it touches it. The
//! queues after the second are there only where the driver accepted the feature, and then in this
//! order.
//!
//! A range that is not guest memory is passed over, counted, and logged once; it hurts nobody. A ring or a chain
//! that cannot be read ends in `DEVICE_NEEDS_RESET`.

mod hinting;
mod pages;
mod stats;

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use log::warn;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use self::hinting::Hinting;
use super::buffers::{BadChain, check_length};
use super::{ActivateError, Activation, FIRST_DEVICE_TOKEN, Interrupt, VirtioDevice, read_config_space};
use crate::config::{BalloonConfig, BalloonHintingStatus, BalloonStats};
use crate::event_loop::{EventSet, Events, Subscriber};
use crate::memory::Memory;
use crate::metrics;

const QUEUE_SIZE: u16 = 256;
/// Some queue has more than one turn allowed, or was passed over while paused.
const WAKE: u32 = FIRST_DEVICE_TOKEN;
/// New statistics are wanted.
const TIMER: u32 = FIRST_DEVICE_TOKEN + 1;

/// Ranges and chains of one queue before others have their turn.
const BUDGET: usize = 4096;
/// Most pages one inflating chain may name: 256 MiB of them. Linux names 256 at a time.
const MAX_FRAMES: usize = 65536;

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_HINTING: u64 = 1 << 3;
const F_REPORTING: u64 = 1 << 5;

/// Pages in a MiB.
const PAGES_PER_MIB: u32 = 256;

metrics::group! {
    /// What the balloon has done, under the names Firecracker's metrics use.
    pub struct BalloonMetrics {
        /// Chains of pages given up.
        inflate_count: Counter,
        /// Chains of pages taken back.
        deflate_count: Counter,
        /// Statistics received.
        stats_updates_count: Counter,
        /// Ranges given up that could not be given back.
        event_fails: Counter,
        /// Ranges reported.
        free_page_report_count: Counter,
        /// Bytes of them given back.
        free_page_report_freed: Counter,
        /// Ranges reported that could not be given back.
        free_page_report_fails: Counter,
        /// Ranges hinted.
        free_page_hint_count: Counter,
        /// Bytes of them given back.
        free_page_hint_freed: Counter,
        /// Ranges hinted that could not be given back.
        free_page_hint_fails: Counter,
    }
}

/// The balloon.
pub struct Balloon {
    offered: u64,
    queue_sizes: Vec<u16>,
    /// Pages the balloon should hold.
    target: u32,
    /// Pages the driver says it holds.
    actual: u32,
    interval: Duration,
    timer: TimerFd,
    latest: BalloonStats,
    hinting: Hinting,
    wake: EventFd,
    events: Option<Events>,
    active: Option<Active>,
    paused: bool,
    metrics: Arc<BalloonMetrics>,
    /// What the first activation after a restore begins with.
    stats_chain: Option<u16>,
}

/// What a balloon has to remember besides its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    actual: u32,
    stats_chain: Option<u16>,
    hinting: Hinting,
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hinting,
    Reporting,
}

struct Active {
    memory: Arc<Memory>,
    queues: Vec<(Role, Queue)>,
    interrupt: Interrupt,
    /// The chain with statistics that the driver gets back when new ones are wanted.
    stats_chain: Option<u16>,
    /// The driver broke the protocol; nothing happens until a reset.
    broken: bool,
    /// A range that could not be given back has been logged.
    complained: bool,
    /// Ranges and chains dealt with in this turn.
    work: usize,
    /// Space for page frame numbers.
    frames: Vec<u32>,
}

#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("ring: {0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("chain: {0}")]
    Chain(#[from] io::Error),
    #[error("chain: {0}")]
    Long(#[from] BadChain),
    #[error("a chain of more than {MAX_FRAMES} pages")]
    TooManyFrames,
}

impl Balloon {
    /// The balloon `config` describes. Fails only where the host gives no descriptors.
    pub fn new(config: &BalloonConfig) -> io::Result<Self> {
        let interval = Duration::from_secs(config.stats_polling_interval_s.into());
        let optional = [
            (config.deflate_on_oom, F_DEFLATE_ON_OOM),
            (!interval.is_zero(), F_STATS),
            (config.free_page_hinting, F_HINTING),
            (config.free_page_reporting, F_REPORTING),
        ];
        let offered = optional.iter().filter(|(on, _)| *on).map(|(_, feature)| feature).sum();
        let metrics = Arc::new(BalloonMetrics::new());
        metrics::register("balloon", None, metrics.clone());
        Ok(Self {
            offered,
            queue_sizes: vec![QUEUE_SIZE; roles(offered).count()],
            target: pages(config.amount_mib),
            actual: 0,
            interval,
            timer: TimerFd::new()?,
            latest: BalloonStats::default(),
            hinting: Hinting::default(),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            events: None,
            active: None,
            paused: false,
            metrics,
            stats_chain: None,
        })
    }

    /// What it has to remember besides its queues.
    pub fn save(&self) -> BalloonState {
        let stats_chain = self.active.as_ref().and_then(|active| active.stats_chain);
        BalloonState { actual: self.actual, stats_chain, hinting: self.hinting.clone() }
    }

    /// Remembers what another one did. Called before it is activated.
    pub fn restore(&mut self, saved: &BalloonState) {
        self.actual = saved.actual;
        self.stats_chain = saved.stats_chain;
        self.hinting = saved.hinting.clone();
    }

    /// Sets how much the balloon should hold.
    pub fn set_target(&mut self, amount_mib: u32) {
        self.target = pages(amount_mib);
        self.config_changed();
    }

    /// Sets the time between statistics, of a balloon that has them.
    pub fn set_stats_interval(&mut self, seconds: u16) {
        self.interval = Duration::from_secs(seconds.into());
        self.start_timer();
    }

    /// Where the balloon stands, and the driver's last statistics.
    pub fn stats(&self) -> BalloonStats {
        BalloonStats {
            target_pages: self.target,
            actual_pages: self.actual,
            target_mib: self.target / PAGES_PER_MIB,
            actual_mib: self.actual / PAGES_PER_MIB,
            ..self.latest
        }
    }

    /// Begins a free page hinting run, of a balloon that has it.
    pub fn start_hinting(&mut self, acknowledge_on_stop: bool) {
        self.hinting.start(acknowledge_on_stop);
        self.config_changed();
    }

    /// Where the free page hinting run stands.
    pub fn hinting_status(&self) -> BalloonHintingStatus {
        self.hinting.status()
    }

    /// Ends a free page hinting run.
    pub fn stop_hinting(&mut self) {
        self.hinting.stop();
        self.config_changed();
    }

    /// What the balloon has done so far.
    pub fn metrics(&self) -> &Arc<BalloonMetrics> {
        &self.metrics
    }

    fn config_changed(&self) {
        if let Some(active) = &self.active {
            active.interrupt.config(&self.config_space());
        }
    }

    /// The configuration space (5.5.4), and behind it the command of free page hinting.
    fn config_space(&self) -> [u8; 12] {
        let fields = [self.target, self.actual, self.hinting.command()];
        let mut space = [0; 12];
        for (bytes, field) in space.chunks_exact_mut(4).zip(fields) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
        space
    }

    fn start_timer(&mut self) {
        let on = self.active.as_ref().is_some_and(|a| a.queues.iter().any(|q| q.0 == Role::Stats));
        // A duration of zero stops the timer. It is set anew each time it has expired, as an interval of the
        // kernel's would have to be read, and a timer that was changed meanwhile has nothing to read.
        let duration = if on { self.interval } else { Duration::ZERO };
        if let Err(e) = self.timer.reset(duration, None) {
            warn!("balloon: cannot set the timer of its statistics: {e}");
        }
    }

    /// Serves the queues that `which` chooses.
    fn run(&mut self, which: impl Fn(usize, Role) -> bool) {
        let Some(mut active) = self.active.take() else { return };
        for index in 0..active.queues.len() {
            let role = active.queues[index].0;
            if active.broken || !which(index, role) {
                continue;
            }
            if let Err(e) = self.serve(&mut active, index, role) {
                warn!("balloon: {e}; stopped until the driver resets the device");
                active.broken = true;
                active.interrupt.needs_reset();
            }
        }
        self.active = Some(active);
    }

    fn serve(&mut self, active: &mut Active, index: usize, role: Role) -> Result<(), Broken> {
        let memory = active.memory.clone();
        let mut answered = false;
        active.work = 0;
        while active.work < BUDGET {
            active.work += 1;
            let queue = &mut active.queues[index].1;
            let Some(chain) = queue.iter(&*memory)?.next() else {
                if queue.enable_notification(&*memory)? {
                    continue;
                }
                return active.notify(index, answered);
            };
            check_length(&chain)?;
            let head = chain.head_index();
            match role {
                Role::Inflate => self.inflate(active, chain)?,
                Role::Deflate => self.metrics.deflate_count.inc(),
                Role::Hinting => self.hint(active, chain)?,
                Role::Reporting => self.report(active, chain),
                Role::Stats => {
                    self.latest = stats::parse(chain.reader(&*memory)?);
                    self.metrics.stats_updates_count.inc();
                    // One is kept; a driver that leaves more gets them back at once.
                    let Some(before) = active.stats_chain.replace(head) else { continue };
                    active.queues[index].1.add_used(&*memory, before, 0)?;
                    answered = true;
                    continue;
                }
            }
            active.queues[index].1.add_used(&*memory, head, 0)?;
            answered = true;
        }
        let _ = self.wake.write(1);
        active.notify(index, answered)
    }

    fn inflate(&self, active: &mut Active, chain: DescriptorChain<&Memory>) -> Result<(), Broken> {
        self.metrics.inflate_count.inc();
        let memory = active.memory.clone();
        let mut reader = chain.reader(&*memory)?;
        if reader.available_bytes() > MAX_FRAMES * 4 {
            return Err(Broken::TooManyFrames);
        }
        let mut frames = std::mem::take(&mut active.frames);
        frames.clear();
        let mut frame = [0; 4];
        while reader.available_bytes() >= frame.len() {
            reader.read_exact(&mut frame)?;
            frames.push(u32::from_le_bytes(frame));
        }
        for (first, count) in pages::ranges(&mut frames) {
            let start = pages::address(first).raw_value();
            if active.discard(start, count * pages::PAGE).is_none() {
                self.metrics.event_fails.inc();
            }
        }
        active.frames = frames;
        Ok(())
    }

    fn report(&self, active: &mut Active, chain: DescriptorChain<&Memory>) {
        for range in chain.filter(Descriptor::is_write_only) {
            self.metrics.free_page_report_count.inc();
            match active.discard(range.addr().raw_value(), range.len().into()) {
                Some(freed) => self.metrics.free_page_report_freed.add(freed),
                None => self.metrics.free_page_report_fails.inc(),
            }
        }
    }

    fn hint(&mut self, active: &mut Active, chain: DescriptorChain<&Memory>) -> Result<(), Broken> {
        for descriptor in chain {
            if !descriptor.is_write_only() {
                let mut command = [0; 4];
                let read = active.memory.read_slice(&mut command, descriptor.addr());
                read.map_err(io::Error::other)?;
                if self.hinting.guest_said(u32::from_le_bytes(command)) {
                    active.interrupt.config(&self.config_space());
                }
            } else if self.hinting.takes_ranges() {
                self.metrics.free_page_hint_count.inc();
                match active.discard(descriptor.addr().raw_value(), descriptor.len().into()) {
                    Some(freed) => self.metrics.free_page_hint_freed.add(freed),
                    None => self.metrics.free_page_hint_fails.inc(),
                }
            }
        }
        Ok(())
    }

    /// Hands the statistics' buffer back, so that the driver fills it anew.
    fn want_stats(&mut self) {
        let Some(active) = self.active.as_mut().filter(|a| !a.broken) else { return };
        let Some(index) = active.queues.iter().position(|q| q.0 == Role::Stats) else { return };
        let Some(chain) = active.stats_chain.take() else { return };
        let memory = active.memory.clone();
        let result = active.queues[index].1.add_used(&*memory, chain, 0).map_err(Broken::from);
        if let Err(e) = result.and_then(|()| active.notify(index, true)) {
            warn!("balloon: {e}; stopped until the driver resets the device");
            active.broken = true;
            active.interrupt.needs_reset();
        }
    }
}

impl Active {
    fn notify(&mut self, index: usize, answered: bool) -> Result<(), Broken> {
        if answered && self.queues[index].1.needs_notification(&*self.memory)? {
            self.interrupt.queue();
        }
        Ok(())
    }

    /// Gives a range back to the host; how much, or `None` if that failed.
    fn discard(&mut self, start: u64, len: u64) -> Option<u64> {
        self.work += 1;
        match pages::discard(&self.memory, start, len) {
            Ok(freed) => Some(freed),
            Err(e) => {
                if !std::mem::replace(&mut self.complained, true) {
                    warn!("balloon: a range was not given back: {e} (further ones not logged)");
                }
                None
            }
        }
    }
}

/// The queues there are with these features, in their order.
fn roles(features: u64) -> impl Iterator<Item = Role> {
    let all = [
        (Role::Inflate, 0),
        (Role::Deflate, 0),
        (Role::Stats, F_STATS),
        (Role::Hinting, F_HINTING),
        (Role::Reporting, F_REPORTING),
    ];
    all.into_iter().filter(move |(_, feature)| features & feature == *feature).map(|(role, _)| role)
}

fn pages(mib: u32) -> u32 {
    mib.saturating_mul(PAGES_PER_MIB)
}

impl Subscriber for Balloon {
    fn process(&mut self, token: u32, _: EventSet) {
        if self.paused {
            return;
        }
        match token {
            // Statistics wait for the timer, but are taken when they come.
            WAKE => self.run(|_, _| true),
            TIMER => {
                self.want_stats();
                self.start_timer();
            }
            queue => self.run(|index, _| index == queue as usize),
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn attach(&mut self, events: Events) {
        self.events = Some(events);
    }

    /// `num_pages`, `actual` and `free_page_hint_cmd_id` (5.5.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    /// The driver writes `actual` and nothing else.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(bytes)) = (offset, data.try_into()) {
            self.actual = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt } = activation;
        let queues: Vec<_> = roles(features).zip(queues).collect();
        if let Some(index) = queues.iter().position(|(_, queue)| !queue.ready()) {
            return Err(ActivateError::QueueMissing(index));
        }
        if let Some(events) = &self.events {
            let error = |e| ActivateError::Host("epoll", e);
            let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
            events.add(&self.wake, WAKE, edge).map_err(error)?;
            events.add(&self.timer, TIMER, edge).map_err(|e| {
                events.remove(&self.wake);
                error(e)
            })?;
        }
        self.active = Some(Active {
            memory,
            queues,
            interrupt,
            stats_chain: self.stats_chain.take(),
            broken: false,
            complained: false,
            work: 0,
            frames: Vec::new(),
        });
        self.start_timer();
        Ok(())
    }

    fn queues(&self) -> Vec<QueueState> {
        let Some(active) = self.active.as_ref().filter(|active| !active.broken) else { return Vec::new() };
        active.queues.iter().map(|(_, queue)| queue.state()).collect()
    }

    fn pause(&mut self) {
        self.paused = true;
    }

    fn resume(&mut self) {
        self.paused = false;
        self.start_timer();
        let _ = self.wake.write(1);
    }

    fn reset(&mut self) {
        self.active = None;
        self.start_timer();
        self.hinting.forget_driver();
        self.actual = 0;
        if let Some(events) = &self.events {
            events.remove(&self.wake);
            events.remove(&self.timer);
        }
    }
}

#[cfg(test)]
mod tests;
