//! Limits on how much a device moves: token buckets for operations and for bytes.
//!
//! A bucket holds at most `size` tokens and is refilled evenly, from empty to full in `refill_time`. It
//! starts full, with `one_time_burst` tokens on top that are spent first and never come back (Firecracker's
//! semantics). What one request takes beyond `size` is taken as a debt: the request passes when the bucket
//! is full, and what follows waits until the debt is paid.
//!
//! Buckets count in token-nanoseconds, so no fraction of a token is ever lost or gained whatever the
//! rate and however often they are asked. They are refilled by arithmetic when asked; a timer is armed only
//! when something had to wait, for exactly the time until that can pass.
//!
//! Time is passed in, so tests move the clock as they like.

use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::timerfd::TimerFd;

use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::event_loop::{EventSet, Events};

/// One limit. See the module's text.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Most tokens it holds, which is also what `refill_ns` brings.
    size: u64,
    /// From empty to full, in ns.
    refill_ns: u64,
    /// Tokens left of the one-time burst.
    burst: u64,
    /// What it holds, in token-nanoseconds: a token is `refill_ns` of them, and each nanosecond that
    /// passes brings `size`. Negative while in debt.
    level: i128,
    /// When `level` was right.
    at: Instant,
}

/// Keeps every product of a size and a time within `i128`.
const MAX: u64 = i64::MAX as u64;

impl TokenBucket {
    /// A full bucket; `None`, which limits nothing, where `size` or `refill_time` is zero.
    pub fn new(size: u64, one_time_burst: u64, refill_time: Duration, now: Instant) -> Option<Self> {
        let refill_ns = u64::try_from(refill_time.as_nanos()).unwrap_or(MAX).min(MAX);
        let size = size.min(MAX);
        (size != 0 && refill_ns != 0).then(|| Self {
            size,
            refill_ns,
            burst: one_time_burst,
            level: full(size, refill_ns),
            at: now,
        })
    }

    /// The bucket a client configured.
    pub fn from_config(config: &TokenBucketConfig, now: Instant) -> Option<Self> {
        let refill_time = Duration::from_millis(config.refill_time);
        Self::new(config.size, config.one_time_burst.unwrap_or(0), refill_time, now)
    }

    /// Takes `tokens`, or says how long from `now` until they can be taken and takes none.
    pub fn take(&mut self, tokens: u64, now: Instant) -> Result<(), Duration> {
        self.wait(tokens, now)?;
        self.spend(tokens);
        Ok(())
    }

    /// Refills for the time passed and says how long `tokens` have to wait, if they have to.
    fn wait(&mut self, tokens: u64, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.at);
        let ns = u64::try_from(passed.as_nanos()).unwrap_or(MAX).min(MAX);
        let full = full(self.size, self.refill_ns);
        self.level = self.level.saturating_add(i128::from(ns) * i128::from(self.size)).min(full);
        self.at = self.at.max(now);

        let needed =
            i128::from(tokens.saturating_sub(self.burst).min(self.size)) * i128::from(self.refill_ns);
        let missing = needed.saturating_sub(self.level);
        // Nothing of the bucket is needed while the burst lasts, whatever its debt.
        if needed == 0 || missing <= 0 {
            return Ok(());
        }
        let ns = (missing - 1) / i128::from(self.size) + 1;
        Err(Duration::from_nanos(u64::try_from(ns).unwrap_or(MAX)))
    }

    fn spend(&mut self, tokens: u64) {
        let burst = tokens.min(self.burst);
        self.burst -= burst;
        let rest = (tokens - burst).min(MAX);
        self.level = self.level.saturating_sub(i128::from(rest) * i128::from(self.refill_ns));
    }

    /// Whole tokens it holds now, those of the burst included; none while in debt.
    pub fn available(&self) -> u64 {
        let whole = self.level.max(0) / i128::from(self.refill_ns);
        u64::try_from(whole).unwrap_or(u64::MAX).saturating_add(self.burst)
    }
}

fn full(size: u64, refill_ns: u64) -> i128 {
    i128::from(size) * i128::from(refill_ns)
}

/// Limits the operations and the bytes of one direction of a device.
#[derive(Debug)]
pub struct RateLimiter {
    ops: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
    timer: TimerFd,
    blocked: bool,
}

impl RateLimiter {
    /// Limits by the buckets given. Fails only where the host gives no timer.
    pub fn new(ops: Option<TokenBucket>, bytes: Option<TokenBucket>) -> std::io::Result<Self> {
        Ok(Self { ops, bytes, timer: TimerFd::new()?, blocked: false })
    }

    /// Limits as a client configured; `None` limits nothing until an update does.
    pub fn from_config(config: Option<&RateLimiterConfig>) -> std::io::Result<Self> {
        let now = Instant::now();
        let bucket = |b: Option<TokenBucketConfig>| b.and_then(|b| TokenBucket::from_config(&b, now));
        Self::new(config.and_then(|c| bucket(c.ops)), config.and_then(|c| bucket(c.bandwidth)))
    }

    /// Has `events` report with `token` when what was blocked may be tried again; the subscriber then
    /// calls [`RateLimiter::unblock`].
    ///
    /// The timer is edge-triggered and never read: an expiry is an edge, and reading one that a change
    /// of limits has just disarmed would block the loop.
    pub fn register(&self, events: &Events, token: u32) -> std::io::Result<()> {
        events.add(&self.timer, token, EventSet::IN | EventSet::EDGE_TRIGGERED)
    }

    /// Undoes [`RateLimiter::register`].
    pub fn unregister(&self, events: &Events) {
        events.remove(&self.timer);
    }

    /// Whether one operation that moves `bytes` bytes may happen now. If so it is counted; if not
    /// nothing is, the limiter is blocked and the timer reports when it may be tried again.
    pub fn admit(&mut self, bytes: u64) -> bool {
        if self.ops.is_none() && self.bytes.is_none() {
            return true;
        }
        !self.blocked && self.admit_at(bytes, Instant::now())
    }

    fn admit_at(&mut self, bytes: u64, now: Instant) -> bool {
        let wait = |bucket: &mut Option<TokenBucket>, tokens| {
            bucket.as_mut().and_then(|b| b.wait(tokens, now).err()).unwrap_or_default()
        };
        let longest = wait(&mut self.ops, 1).max(wait(&mut self.bytes, bytes));
        // If there is no timer to wake it up again, the device is better unlimited than dead.
        if longest.is_zero() || !self.arm(longest) {
            self.ops.iter_mut().for_each(|b| b.spend(1));
            self.bytes.iter_mut().for_each(|b| b.spend(bytes));
            return true;
        }
        self.blocked = true;
        false
    }

    fn arm(&mut self, wait: Duration) -> bool {
        self.timer.reset(wait, None).inspect_err(|e| warn!("rate limiter: cannot arm its timer: {e}")).is_ok()
    }

    /// Whether something was refused and the timer has not reported since.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// To call when the timer reports. Calling it without need does no harm.
    pub fn unblock(&mut self) {
        self.blocked = false;
    }

    /// Changes the limits at once: a bucket that is absent from `config` stays as it is with what it
    /// holds, one that is given takes its place (full), and one that limits nothing removes it. What is
    /// blocked is tried again under the new limits: the timer reports.
    pub fn update(&mut self, config: &RateLimiterConfig) {
        let now = Instant::now();
        if let Some(bucket) = &config.ops {
            self.ops = TokenBucket::from_config(bucket, now);
        }
        if let Some(bucket) = &config.bandwidth {
            self.bytes = TokenBucket::from_config(bucket, now);
        }
        if self.blocked {
            self.arm(Duration::from_nanos(1));
        }
    }
}

#[cfg(test)]
#[path = "rate_limiter_tests.rs"]
mod tests;
