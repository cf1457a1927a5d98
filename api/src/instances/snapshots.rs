//! Snapshots: taken in the background, deleted when nothing is being made of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Error;
use super::jobs::Work;
use super::{Service, failure, find, idempotency};
use crate::fault;
use crate::model::{
    InstanceState, Kind, Snapshot, SnapshotState, StateReason, Volume, VolumeState, check_tags, id,
};
use crate::records::Tables;

/// Longest description, in bytes: EC2's limit.
const DESCRIPTION: usize = 255;

/// A request to take a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Of a volume that is detached, or attached to an instance that is stopped or running. A running one is paused while
    /// its disk is copied.
    pub volume_id: String,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// Makes the request safe to send again, with the same answer.
    #[serde(default)]
    pub client_token: Option<String>,
}

/// Refuses what is longer than EC2 allows.
pub(super) fn check_description(text: &str) -> Result<(), Error> {
    match text.len() <= DESCRIPTION && !text.chars().any(char::is_control) {
        true => Ok(()),
        false => Err(Error::invalid("description", "must be at most 255 bytes without control characters")),
    }
}

/// Refuses an instance whose disks are about to change hands: nobody could say what a copy would have.
pub(super) fn check_copyable(tables: &Tables, instance: &str) -> Result<(), Error> {
    let instance = find::instance(tables, instance)?;
    match instance.state {
        InstanceState::Running | InstanceState::Stopped => Ok(()),
        state => Err(Error::State {
            kind: Kind::Instance,
            id: instance.id.clone(),
            state: state.name().to_owned(),
            needed: "its disks can be copied while it is running or stopped",
        }),
    }
}

impl Service {
    /// Begins to take a snapshot, which is `pending` until that has been done.
    ///
    /// # Errors
    ///
    /// There is no such volume, or it or its instance is in a state in which it cannot be copied.
    pub async fn create_snapshot(&self, request: CreateSnapshot) -> Result<Arc<Snapshot>, Error> {
        check_tags(&request.tags)?;
        check_description(&request.description)?;
        self.host.volumes.check_room()?;
        let snapshot_id = id::new(id::SNAPSHOT);
        let token = request.client_token.as_deref();
        let made = self.host.records.update(|tables, changes| {
            let known = idempotency::find(tables, "create-snapshot", token, &request)?;
            if let Some(id) = known.and_then(|made| made.into_iter().next()) {
                return Ok(id);
            }
            let volume = find::volume(tables, &request.volume_id)?;
            match (volume.state, &volume.attachment) {
                (VolumeState::Available, _) => {}
                (VolumeState::InUse, Some(attachment)) => {
                    check_copyable(tables, &attachment.instance_id)?;
                }
                (state, _) => {
                    return Err(Error::State {
                        kind: Kind::Volume,
                        id: volume.id.clone(),
                        state: state.name().to_owned(),
                        needed: "snapshots are taken of available volumes and of those in use",
                    });
                }
            }
            // From when this is written down, the volume stays where it is.
            changes.expect_unchanged::<Volume>(tables, &volume.id);
            changes.create(&Snapshot {
                id: snapshot_id.clone(),
                volume_id: volume.id.clone(),
                size: volume.size,
                state: SnapshotState::Pending,
                state_reason: None,
                progress: None,
                description: request.description.clone(),
                created: self.host.now(),
                tags: request.tags.clone(),
            });
            let made = vec![snapshot_id.clone()];
            idempotency::remember(&self.host, changes, "create-snapshot", token, &request, made);
            Ok(snapshot_id.clone())
        });
        let id = made.await?;
        if id == snapshot_id {
            let (service, mut once) = (self.clone(), Some(id.clone()));
            self.jobs.run(&id, move |work| {
                let (service, id) = (service.clone(), once.take()?);
                Some(async move { service.take_snapshot(&id, work).await })
            });
        }
        find::snapshot(&self.host.records.read(), &id)
    }

    async fn take_snapshot(&self, id: &str, work: Work) {
        let taken = self.copy_volume(id, &work).await;
        fault::point("snapshot.taken");
        let modified = self.host.records.modify(id, |snapshot: &mut Snapshot| {
            snapshot.progress = None;
            snapshot.state = match &taken {
                Ok(()) => SnapshotState::Completed,
                Err(error) => {
                    snapshot.state_reason = Some(failure::reason(error));
                    SnapshotState::Error
                }
            };
            Ok::<_, Error>(())
        });
        match modified.await {
            Ok(Some(_)) => {}
            // It was deleted meanwhile.
            Ok(None) => self.remove_snapshot_file(id).await,
            Err(error) => tracing::error!(snapshot = id, "its end cannot be written down: {error}"),
        }
        if let Err(error) = taken {
            tracing::warn!(snapshot = id, "could not be taken: {error}");
        }
    }

    async fn copy_volume(&self, id: &str, work: &Work) -> Result<(), Error> {
        let (volume, instance) = {
            let tables = self.host.records.read();
            let volume = find::volume(&tables, &find::snapshot(&tables, id)?.volume_id)?;
            let instance = volume.attachment.as_ref().map(|attachment| attachment.instance_id.clone());
            (volume.id.clone(), instance)
        };
        let held = match &instance {
            Some(instance) => Some(self.hold(instance).await?),
            None => None,
        };
        let (volumes, snapshot) = (self.host.volumes.clone(), id.to_owned());
        let copying = work.blocking(move |task| volumes.snapshot(&volume, &snapshot, task));
        let note = |snapshot: &mut Snapshot, progress| {
            if snapshot.state == SnapshotState::Pending {
                snapshot.progress = Some(progress);
            }
        };
        let copied = work.noted(&self.host, id, note, copying).await;
        if let Some(held) = held {
            held.release().await;
        }
        copied.map(drop)
    }

    /// Deletes a snapshot. One that is being taken is given up. Volumes made of it stay.
    ///
    /// # Errors
    ///
    /// There is none, or a volume is just being made of it.
    pub async fn delete_snapshot(&self, id: &str) -> Result<(), Error> {
        let deleted = self.host.records.update(|tables, changes| {
            let snapshot = find::snapshot(tables, id)?;
            let user = tables.volumes.iter().find(|volume| {
                volume.state == VolumeState::Creating && volume.snapshot_id.as_deref() == Some(id)
            });
            if let Some(user) = user {
                let by = format!("volume {}, which is being made of it", user.id);
                return Err(Error::InUse { kind: Kind::Snapshot, id: id.to_owned(), by });
            }
            changes.delete::<Snapshot>(tables, &snapshot.id);
            Ok(())
        });
        deleted.await?;
        fault::point("snapshot.forgotten");
        self.jobs.cancel(id);
        self.remove_snapshot_file(id).await;
        Ok(())
    }

    /// Removes the file of a snapshot that has no record any more. What is left is removed at the next start.
    async fn remove_snapshot_file(&self, id: &str) {
        let (volumes, own) = (self.host.volumes.clone(), id.to_owned());
        let removed = tokio::task::spawn_blocking(move || volumes.delete_snapshot(&own)).await;
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(snapshot = id, "its file stays until the next start: {error}"),
            Err(error) => tracing::warn!(snapshot = id, "its file stays until the next start: {error}"),
        }
    }

    /// Snapshots that a daemon did not live to take are none: what they would have had is gone.
    pub(super) async fn fail_interrupted_snapshots(&self) -> Result<(), Error> {
        let pending: Vec<String> = {
            let tables = self.host.records.read();
            let pending = tables.snapshots.iter().filter(|s| s.state == SnapshotState::Pending);
            pending.map(|snapshot| snapshot.id.clone()).collect()
        };
        for id in pending {
            let failed = self.host.records.modify(&id, |snapshot: &mut Snapshot| {
                snapshot.state = SnapshotState::Error;
                snapshot.progress = None;
                snapshot.state_reason = Some(StateReason {
                    code: "Server.Interrupted".into(),
                    message: "the daemon ended while it was taken: delete it and take another".into(),
                });
                Ok::<_, Error>(())
            });
            failed.await?;
            // It may have been whole, and just not been written down; its time is unknown.
            self.remove_snapshot_file(&id).await;
        }
        Ok(())
    }
}
