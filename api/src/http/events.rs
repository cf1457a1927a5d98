//! What happens, as server-sent events: every change of the state of an instance, image, volume, snapshot, patch, group or
//! load balancer, and the progress of those that are being made.
//!
//! The last events are kept, so that a client that comes back with `Last-Event-ID` misses none. One that comes
//! back too late, or takes events more slowly than they happen, gets an event `lost`: it has to look at
//! everything again. An event's id is the store's revision that it is of, and its number within that.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event as Message, KeepAlive, Sse};
use serde::Serialize;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::{Stream, StreamExt as _};
use utoipa::ToSchema;

use super::Api;
use super::error::{ErrorBody, Refusal};
use crate::files::Progress;
use crate::model::{
    Group, Image, Instance, Kind, LoadBalancer, Patch, Snapshot, StateReason, StatusChecks, Volume,
};
use crate::records::{AnyRecord, RecordChange};
use crate::store::Revision;

/// Events kept for clients that come back.
const KEPT: usize = 4096;

/// A change of state, progress on the way to one, or a change of what an instance's status checks say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Event {
    /// Of the store; grows with every change.
    pub revision: Revision,
    /// `instance`, `image`, `volume`, `snapshot`, `patch`, `group` or `load_balancer`.
    #[schema(value_type = String)]
    pub kind: Kind,
    /// Of what has changed.
    pub id: String,
    /// Absent if it is new.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old_state: Option<String>,
    /// Absent if it is no longer kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
    /// Why, if somebody or something made it so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<StateReason>,
    /// How far it is with becoming what it is to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// An instance's status checks, if they have changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<StatusChecks>,
    /// Number among the events of this revision.
    #[serde(skip)]
    index: u32,
}

impl Event {
    fn place(&self) -> (Revision, u32) {
        (self.revision, self.index)
    }

    /// The change of state, progress or status in a change of a record, if there is one.
    fn of(change: &RecordChange) -> Option<Self> {
        let (kind, old, new) = match &change.record {
            AnyRecord::Instance { old, new } => {
                (Kind::Instance, old.as_deref().map(instance), new.as_deref().map(instance))
            }
            AnyRecord::Image { old, new } => {
                (Kind::Image, old.as_deref().map(image), new.as_deref().map(image))
            }
            AnyRecord::Volume { old, new } => {
                (Kind::Volume, old.as_deref().map(volume), new.as_deref().map(volume))
            }
            AnyRecord::Snapshot { old, new } => {
                (Kind::Snapshot, old.as_deref().map(snapshot), new.as_deref().map(snapshot))
            }
            AnyRecord::Patch { old, new } => {
                (Kind::Patch, old.as_deref().map(patch), new.as_deref().map(patch))
            }
            AnyRecord::Group { old, new } => {
                (Kind::Group, old.as_deref().map(group), new.as_deref().map(group))
            }
            AnyRecord::LoadBalancer { old, new } => {
                (Kind::LoadBalancer, old.as_deref().map(load_balancer), new.as_deref().map(load_balancer))
            }
            _ => return None,
        };
        let state = |look: &Option<Look>| look.as_ref().map(|look| look.state.to_owned());
        let before = old.as_ref().and_then(|look| look.progress);
        let progress = new.as_ref().and_then(|look| look.progress).filter(|now| before != Some(*now));
        // What a new instance's say is nothing yet.
        let before = old.as_ref().and_then(|look| look.status);
        let status = new.as_ref().and_then(|look| look.status);
        let status = status.filter(|now| before.is_some_and(|before| before != *now));
        let event = Event {
            revision: change.revision,
            kind,
            id: change.id.clone(),
            old_state: state(&old),
            state: state(&new),
            reason: new.and_then(|look| look.reason),
            progress,
            status,
            index: 0,
        };
        let tells = event.old_state != event.state || event.progress.is_some() || event.status.is_some();
        tells.then_some(event)
    }

    fn message(&self) -> Message {
        let name = match (self.old_state == self.state, &self.progress) {
            (false, _) => "state",
            (true, Some(_)) => "progress",
            (true, None) => "status",
        };
        let data = serde_json::to_string(self).unwrap_or_default();
        Message::default().event(name).id(format!("{}-{}", self.revision, self.index)).data(data)
    }
}

/// What of a record events are about.
struct Look {
    state: &'static str,
    reason: Option<StateReason>,
    progress: Option<Progress>,
    status: Option<StatusChecks>,
}

fn instance(of: &Instance) -> Look {
    let (state, reason) = (of.state.name(), of.state_reason.clone());
    Look { state, reason, progress: None, status: Some(of.status) }
}

fn patch(of: &Patch) -> Look {
    Look { state: of.state.name(), reason: None, progress: None, status: None }
}

fn image(of: &Image) -> Look {
    let code = of.state_code.clone().unwrap_or_else(|| "Server.ImportFailed".into());
    let reason = of.state_reason.clone().map(|message| StateReason { code, message });
    Look { state: of.state.name(), reason, progress: of.progress, status: None }
}

fn volume(of: &Volume) -> Look {
    Look { state: of.state.name(), reason: of.state_reason.clone(), progress: of.progress, status: None }
}

fn snapshot(of: &Snapshot) -> Look {
    Look { state: of.state.name(), reason: of.state_reason.clone(), progress: of.progress, status: None }
}

fn group(of: &Group) -> Look {
    Look { state: of.state.name(), reason: of.state_reason.clone(), progress: None, status: None }
}

fn load_balancer(of: &LoadBalancer) -> Look {
    Look { state: of.state.name(), reason: of.state_reason.clone(), progress: None, status: None }
}

/// Tells a client that it has missed something.
fn lost() -> Message {
    Message::default().event("lost").data("events are missing here: look at everything again")
}

/// The events kept, and those who wait for more.
#[derive(Debug)]
pub struct Events(Mutex<Kept>);

#[derive(Debug)]
struct Kept {
    events: VecDeque<Arc<Event>>,
    /// All events behind this place are in `events`.
    complete_after: (Revision, u32),
    /// None once the daemon ends.
    sender: Option<broadcast::Sender<Arc<Event>>>,
}

impl Events {
    /// None yet, of a store at `revision`.
    pub fn new(revision: Revision) -> Self {
        Events(Mutex::new(Kept {
            events: VecDeque::new(),
            complete_after: (revision, u32::MAX),
            sender: Some(broadcast::Sender::new(KEPT)),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a change of a record. Those of one revision must come after those of the ones before.
    pub fn take(&self, change: &RecordChange) {
        let Some(mut event) = Event::of(change) else { return };
        let mut kept = self.lock();
        let before = kept.events.back().filter(|before| before.revision == event.revision);
        event.index = before.map_or(0, |before| before.index.saturating_add(1));
        if kept.events.len() == KEPT
            && let Some(oldest) = kept.events.pop_front()
        {
            kept.complete_after = oldest.place();
        }
        let event = Arc::new(event);
        kept.events.push_back(event.clone());
        // Nobody may be listening.
        let _ = kept.sender.as_ref().map(|sender| sender.send(event));
    }

    /// Some changes could not be told: everybody has to look again.
    pub fn miss(&self, revision: Revision) {
        let mut kept = self.lock();
        kept.events.clear();
        kept.complete_after = (revision, u32::MAX);
        // Who waits sees the end of the stream, comes back, and is told that there is a gap.
        if kept.sender.is_some() {
            kept.sender = Some(broadcast::Sender::new(KEPT));
        }
    }

    /// Whether all streams have ended, for good.
    pub fn is_closed(&self) -> bool {
        self.lock().sender.is_none()
    }

    /// Ends all streams.
    pub fn close(&self) {
        self.lock().sender = None;
    }

    /// Events behind a place (only new ones if None), and whether some are missing before them.
    fn subscribe(
        &self,
        after: Option<(Revision, u32)>,
    ) -> (bool, Vec<Arc<Event>>, broadcast::Receiver<Arc<Event>>) {
        let kept = self.lock();
        // Under the lock: no event is missed or told twice.
        let receiver = match &kept.sender {
            Some(sender) => sender.subscribe(),
            None => broadcast::Sender::new(1).subscribe(),
        };
        let Some(after) = after else { return (false, Vec::new(), receiver) };
        let behind = kept.events.iter().filter(|event| event.place() > after).cloned().collect();
        (after < kept.complete_after, behind, receiver)
    }
}

/// Follow what happens: a stream of server-sent events, one for every change of the state of an instance, image,
/// volume, snapshot, group or load balancer.
///
/// `event: state` has an `Event` as data; so has `event: progress`, whose state is the same as before. A client that sends the id of the last event it has seen as
/// `Last-Event-ID` gets those it has missed first; `event: lost` says that they are no longer kept.
#[utoipa::path(get, path = "/v1/events", tag = "host",
    params(("Last-Event-ID" = Option<String>, Header, description = "Id of the last event seen: `REVISION` or `REVISION-NUMBER`.")),
    responses((status = 200, description = "Events, as they happen.", content_type = "text/event-stream", body = Event),
        (status = "default", description = "Refused.", body = ErrorBody)))]
pub async fn follow(
    State(api): State<Arc<Api>>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Message, Infallible>>>, Refusal> {
    let after = match headers.get("last-event-id") {
        None => None,
        Some(id) => Some(id.to_str().ok().and_then(place).ok_or_else(|| {
            Refusal::malformed("Last-Event-ID: must be the id of an event, such as 17-0, or a revision")
        })?),
    };
    let permit = api.long_lived()?;
    let (gap, missed, receiver) = api.events.subscribe(after);
    let first = gap.then(lost).into_iter().chain(missed.into_iter().map(|event| event.message()));
    let coming = BroadcastStream::new(receiver).map(move |event| {
        let _held_as_long_as_the_stream = &permit;
        event.map_or_else(|_| lost(), |event| event.message())
    });
    let stream = tokio_stream::iter(first.collect::<Vec<_>>()).chain(coming).map(Ok);
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()))
}

/// The place that an event's id names. A revision alone stands for all of its events.
fn place(id: &str) -> Option<(Revision, u32)> {
    match id.split_once('-') {
        Some((revision, index)) => Some((revision.parse().ok()?, index.parse().ok()?)),
        None => Some((id.parse().ok()?, u32::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ImageState;

    fn change(revision: Revision, old: Option<ImageState>, new: Option<ImageState>) -> RecordChange {
        let image = |state| {
            let image = serde_json::json!({"id": "img-1", "name": "x", "state": state, "created": "2026-01-01T00:00:00Z"});
            Arc::new(serde_json::from_value::<Image>(image).unwrap())
        };
        let record = AnyRecord::Image { old: old.map(image), new: new.map(image) };
        RecordChange { revision, id: "img-1".into(), record }
    }

    #[test]
    fn who_comes_back_gets_what_was_missed_or_is_told_that_it_is_gone() {
        let events = Events::new(4);
        events.take(&change(5, None, Some(ImageState::Pending)));
        events.take(&change(5, None, Some(ImageState::Pending)));
        events.take(&change(6, Some(ImageState::Pending), Some(ImageState::Pending)));
        events.take(&change(7, Some(ImageState::Pending), Some(ImageState::Available)));
        let places = |after| {
            let (gap, events, _) = events.subscribe(after);
            (gap, events.iter().map(|event| event.place()).collect::<Vec<_>>())
        };
        assert_eq!(places(None), (false, vec![]));
        assert_eq!(places(place("4")), (false, vec![(5, 0), (5, 1), (7, 0)]));
        assert_eq!(places(place("5-0")), (false, vec![(5, 1), (7, 0)]));
        assert_eq!(places(place("5")), (false, vec![(7, 0)]));
        assert!(places(place("3-0")).0, "something may have happened that is not known here");
        for revision in 8..8 + KEPT as Revision {
            events.take(&change(revision, None, Some(ImageState::Pending)));
        }
        assert!(places(place("5")).0);
        assert_eq!((places(place("7-0")).0, places(place("7-0")).1.len()), (false, KEPT));
        events.miss(9000);
        assert_eq!((places(place("8999")).0, places(place("9000"))), (true, (false, vec![])));
    }

    #[tokio::test]
    async fn those_who_wait_are_told_and_let_go_at_the_end() {
        let events = Events::new(0);
        let (_, _, mut receiver) = events.subscribe(None);
        events.take(&change(1, Some(ImageState::Pending), Some(ImageState::Failed)));
        let event = receiver.recv().await.unwrap();
        assert_eq!((event.old_state.as_deref(), event.state.as_deref()), (Some("pending"), Some("failed")));
        events.close();
        assert!(receiver.recv().await.is_err());
        assert!(events.subscribe(None).2.recv().await.is_err());
    }
}
