//! The loop that waits for file descriptors and hands what happened to whoever asked for it.
//!
//! One thread runs [`EventLoop::run_once`]; any thread may add or remove descriptors through an
//! [`Events`] handle. What waits is a [`Subscriber`], reached by its number; a descriptor carries a token
//! of the subscriber's own choosing. Everything is level-triggered: a subscriber that leaves something
//! unread is called again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

pub use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

/// Takes events of the descriptors registered under its number.
pub trait Subscriber: Send {
    /// Something happened on the descriptor that was added with `token`.
    fn process(&mut self, token: u32, events: EventSet);
}

/// Number of a subscriber in its loop.
pub type SubscriberId = u32;

/// Adds and removes descriptors of one subscriber; usable from any thread.
#[derive(Clone)]
pub struct Events {
    epoll: Arc<Epoll>,
    subscriber: SubscriberId,
}

impl Events {
    fn event(&self, token: u32, set: EventSet) -> EpollEvent {
        EpollEvent::new(set, u64::from(self.subscriber) << 32 | u64::from(token))
    }

    /// Waits for `set` on `fd`; events arrive with `token`.
    pub fn add(&self, fd: &impl AsRawFd, token: u32, set: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), self.event(token, set))
    }

    /// Changes what is waited for on `fd`.
    pub fn modify(&self, fd: &impl AsRawFd, token: u32, set: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd.as_raw_fd(), self.event(token, set))
    }

    /// Stops waiting for `fd`. A descriptor that is not there is no error: closing one removes it too.
    pub fn remove(&self, fd: &impl AsRawFd) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default());
    }
}

/// See the module's text.
pub struct EventLoop {
    epoll: Arc<Epoll>,
    subscribers: Vec<Arc<Mutex<dyn Subscriber>>>,
    ready: Box<[EpollEvent]>,
}

/// What one wait of the loop brought for the loop's owner itself.
pub struct OwnEvent {
    /// Token given when the descriptor was added.
    pub token: u32,
    /// What happened.
    pub events: EventSet,
}

/// Subscriber number of the loop's owner: its events come back from `run_once` instead of being dispatched.
const OWNER: SubscriberId = u32::MAX;
const BATCH: usize = 32;

impl EventLoop {
    /// An empty loop.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Arc::new(Epoll::new()?),
            subscribers: Vec::new(),
            ready: vec![EpollEvent::default(); BATCH].into_boxed_slice(),
        })
    }

    /// Descriptors added through this handle report to the caller of [`EventLoop::run_once`].
    pub fn own_events(&self) -> Events {
        Events { epoll: self.epoll.clone(), subscriber: OWNER }
    }

    /// Adds a subscriber and returns the handle through which its descriptors are added.
    pub fn subscribe(&mut self, subscriber: Arc<Mutex<dyn Subscriber>>) -> Events {
        self.subscribers.push(subscriber);
        Events { epoll: self.epoll.clone(), subscriber: (self.subscribers.len() - 1) as SubscriberId }
    }

    /// How many subscribers there are, for [`EventLoop::unsubscribe_from`].
    pub fn subscribers(&self) -> usize {
        self.subscribers.len()
    }

    /// Forgets the subscribers that came after the first `count`. Their descriptors are no longer waited for
    /// once they are closed, as they are when nobody else keeps the subscribers.
    pub fn unsubscribe_from(&mut self, count: usize) {
        self.subscribers.truncate(count);
    }

    /// Waits up to `timeout_ms` (-1: for ever), dispatches what happened, and returns the owner's events.
    pub fn run_once(&mut self, timeout_ms: i32) -> io::Result<Vec<OwnEvent>> {
        let count = match self.epoll.wait(timeout_ms, &mut self.ready) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        let mut own = Vec::new();
        for event in &self.ready[..count] {
            let (id, token) = ((event.data() >> 32) as SubscriberId, event.data() as u32);
            if id == OWNER {
                own.push(OwnEvent { token, events: event.event_set() });
            } else if let Some(subscriber) = self.subscribers.get(id as usize) {
                lock(subscriber).process(token, event.event_set());
            }
        }
        Ok(own)
    }
}

impl AsRawFd for EventLoop {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// Locks, also after a panic elsewhere: the VMM aborts on a panic, so no lock is ever left poisoned in use.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    struct Seen(Vec<u32>, EventFd);
    impl Subscriber for Seen {
        fn process(&mut self, token: u32, _: EventSet) {
            self.1.read().unwrap();
            self.0.push(token);
        }
    }

    #[test]
    fn events_reach_their_subscriber_until_removed() {
        let mut event_loop = EventLoop::new().unwrap();
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let seen = Arc::new(Mutex::new(Seen(vec![], fd.try_clone().unwrap())));
        let events = event_loop.subscribe(seen.clone());
        events.add(&fd, 7, EventSet::IN).unwrap();
        fd.write(1).unwrap();
        assert!(event_loop.run_once(1000).unwrap().is_empty());
        assert_eq!(lock(&seen).0, [7]);
        events.remove(&fd);
        events.remove(&fd);
        fd.write(1).unwrap();
        event_loop.run_once(0).unwrap();
        assert_eq!(lock(&seen).0, [7]);

        let own = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        event_loop.own_events().add(&own, 3, EventSet::IN).unwrap();
        own.write(1).unwrap();
        let got = event_loop.run_once(1000).unwrap();
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].token, 3);
    }
}
