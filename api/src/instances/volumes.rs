//! Volumes: what users ask of disks. A request checks and writes down what is wanted; `keeper` makes and removes
//! the files.
//!
//! ```text
//!   create ─▶ creating ─▶ available ⇄ in-use      (attach, detach)
//!                 │            │         │
//!                 ▼            │         └ terminate, with delete_on_termination
//!               error ─────────┴─▶ deleting ─▶ (gone)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::Error;
use super::{Service, find, idempotency};
use crate::image::Root;
use crate::model::{
    Image, Instance, InstanceState, Kind, Snapshot, SnapshotState, Volume, VolumeAttachment, VolumeState,
    check_tags, id,
};
use crate::records::Tables;

const GIB: u64 = 1 << 30;
/// Largest volume: the largest file of ext4 with blocks of 4 KiB is a block short of 16 TiB.
const LARGEST_GIB: u64 = 16 * 1024 - 1;
/// Volumes of one instance besides its root disk: a microVM has interrupt lines for 19 devices.
pub(super) const MOST_ATTACHED: usize = 12;

/// A request to make a volume.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// 1 to 16383. Absent with a snapshot: as large as what it was taken of.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16383)]
    pub size_gib: Option<u64>,
    /// What is on it; nothing if absent.
    #[serde(default)]
    pub snapshot_id: Option<String>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// Makes the request safe to send again, with the same answer.
    #[serde(default)]
    pub client_token: Option<String>,
}

/// Where to attach a volume.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachVolume {
    /// A stopped instance.
    pub instance_id: String,
    /// Whether it goes when the instance is terminated.
    #[serde(default)]
    pub delete_on_termination: bool,
}

/// What of a volume is to be changed; the rest stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ModifyVolume {
    /// Larger than it is. Of a volume that is detached, or whose instance is stopped.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 16383)]
    pub size_gib: Option<u64>,
    /// Of an attached volume: whether it goes when its instance is terminated.
    #[serde(default)]
    pub delete_on_termination: Option<bool>,
    /// All of them.
    #[serde(default)]
    pub tags: Option<BTreeMap<String, String>>,
}

/// The bytes of a volume of so many GiB, or of one made of a snapshot.
pub(super) fn volume_size(gib: Option<u64>, snapshot: Option<&Snapshot>) -> Result<u64, Error> {
    let least = snapshot.map_or(0, |snapshot| snapshot.size);
    let Some(gib) = gib else {
        return match snapshot {
            Some(_) => Ok(least),
            None => Err(Error::invalid("size_gib", "give a size, or a snapshot to make it of")),
        };
    };
    if !(1..=LARGEST_GIB).contains(&gib) {
        return Err(Error::invalid("size_gib", format_args!("must be 1 to {LARGEST_GIB}")));
    }
    let size = gib.saturating_mul(GIB);
    if size < least {
        let least = least.div_ceil(GIB);
        return Err(Error::invalid("size_gib", format_args!("must be {least} at least, as the snapshot is")));
    }
    Ok(size)
}

/// A snapshot that volumes can be made of.
pub(super) fn usable_snapshot(tables: &Tables, id: &str) -> Result<Arc<Snapshot>, Error> {
    let snapshot = find::snapshot(tables, id)?;
    match snapshot.state {
        SnapshotState::Completed => Ok(snapshot),
        state => Err(Error::State {
            kind: Kind::Snapshot,
            id: id.to_owned(),
            state: state.name().to_owned(),
            needed: "volumes are made of completed ones",
        }),
    }
}

/// Whether anything may be done to a volume: not while it is copied.
fn check_not_copied(tables: &Tables, volume: &str) -> Result<(), Error> {
    let copying =
        |snapshot: &&Arc<Snapshot>| snapshot.volume_id == volume && snapshot.state == SnapshotState::Pending;
    match tables.snapshots.iter().find(copying) {
        None => Ok(()),
        Some(snapshot) => {
            let by = format!("snapshot {}, which is being taken of it: wait, or delete that", snapshot.id);
            Err(Error::InUse { kind: Kind::Volume, id: volume.to_owned(), by })
        }
    }
}

/// Refuses a volume that cannot be attached.
pub(super) fn check_free(tables: &Tables, volume: &Volume) -> Result<(), Error> {
    if let Some(attachment) = &volume.attachment {
        let by = format!("instance {}", attachment.instance_id);
        return Err(Error::InUse { kind: Kind::Volume, id: volume.id.clone(), by });
    }
    if volume.state != VolumeState::Available {
        return Err(wrong_state(volume, "only an available volume can be attached"));
    }
    check_not_copied(tables, &volume.id)
}

/// Checks that an instance's disks may be changed: only while there is no machine, which would not see it.
fn check_stopped(instance: &Instance, needed: &'static str) -> Result<(), Error> {
    match instance.state {
        InstanceState::Stopped => Ok(()),
        state => Err(Error::State {
            kind: Kind::Instance,
            id: instance.id.clone(),
            state: state.name().to_owned(),
            needed,
        }),
    }
}

fn wrong_state(volume: &Volume, needed: &'static str) -> Error {
    let state = volume.state.name().to_owned();
    Error::State { kind: Kind::Volume, id: volume.id.clone(), state, needed }
}

/// Where another volume of an instance goes: behind those it has.
fn next_index(tables: &Tables, instance: &str) -> Result<u8, Error> {
    let taken: BTreeSet<u8> = attachments(tables, instance).map(|attachment| attachment.index).collect();
    if taken.iter().filter(|index| **index > 0).count() >= MOST_ATTACHED {
        return Err(Error::AttachmentLimit { instance: instance.to_owned(), most: MOST_ATTACHED });
    }
    let behind = taken.last().and_then(|last| last.checked_add(1));
    // After 255 volumes came and went, one goes where there is a gap.
    let free = behind.or_else(|| (1..=u8::MAX).find(|index| !taken.contains(index)));
    free.ok_or_else(|| Error::AttachmentLimit { instance: instance.to_owned(), most: MOST_ATTACHED })
}

fn attachments<'a>(tables: &'a Tables, instance: &'a str) -> impl Iterator<Item = &'a VolumeAttachment> {
    let own = tables.volumes.iter().filter_map(|volume| volume.attachment.as_ref());
    own.filter(move |attachment| attachment.instance_id == instance)
}

/// The volumes of an instance besides its root disk, in the order in which its guest has them.
pub(super) fn data_volumes(tables: &Tables, instance: &Instance) -> Vec<Arc<Volume>> {
    let own = tables
        .volumes
        .iter()
        .filter(|volume| volume.is_attached_to(&instance.id) && volume.id != instance.root_volume);
    let mut own: Vec<_> = own.cloned().collect();
    own.sort_by_key(|volume| volume.attachment.as_ref().map(|attachment| attachment.index));
    own
}

impl Service {
    /// Begins to make a volume, which is `creating` until that has been done.
    ///
    /// # Errors
    ///
    /// The size cannot be, there is no such snapshot, or the disk is full.
    pub async fn create_volume(&self, request: CreateVolume) -> Result<Arc<Volume>, Error> {
        check_tags(&request.tags)?;
        self.host.volumes.check_room()?;
        let token = request.client_token.as_deref();
        let made = self.host.records.update(|tables, changes| {
            let known = idempotency::find(tables, "create-volume", token, &request)?;
            if let Some(id) = known.and_then(|made| made.into_iter().next()) {
                return Ok::<_, Error>(id);
            }
            let snapshot =
                request.snapshot_id.as_deref().map(|id| usable_snapshot(tables, id)).transpose()?;
            if let Some(snapshot) = &snapshot {
                changes.expect_unchanged::<Snapshot>(tables, &snapshot.id);
            }
            let volume = Volume {
                id: id::new(id::VOLUME),
                size: volume_size(request.size_gib, snapshot.as_deref())?,
                state: VolumeState::Creating,
                state_reason: None,
                progress: None,
                snapshot_id: request.snapshot_id.clone(),
                attachment: None,
                created: self.host.now(),
                tags: request.tags.clone(),
            };
            changes.create(&volume);
            let made = vec![volume.id.clone()];
            idempotency::remember(&self.host, changes, "create-volume", token, &request, made);
            Ok(volume.id)
        });
        let id = made.await?;
        find::volume(&self.host.records.read(), &id)
    }

    /// Attaches a volume to a stopped instance, behind the disks it has. Where it is attached already, nothing
    /// changes.
    ///
    /// # Errors
    ///
    /// There is no such volume or instance, the one is not available or the other not stopped, or it has as many as it
    /// can have.
    pub async fn attach_volume(&self, id: &str, request: &AttachVolume) -> Result<Arc<Volume>, Error> {
        let attached = self.host.records.update(|tables, changes| {
            let mut volume = (*find::volume(tables, id)?).clone();
            let instance = find::instance(tables, &request.instance_id)?;
            if volume.is_attached_to(&instance.id) {
                return Ok::<_, Error>(());
            }
            check_free(tables, &volume)?;
            check_stopped(
                &instance,
                "volumes are attached while it is stopped: a microVM finds its disks when it boots",
            )?;
            volume.attachment = Some(VolumeAttachment {
                instance_id: instance.id.clone(),
                index: next_index(tables, &instance.id)?,
                delete_on_termination: request.delete_on_termination,
            });
            volume.state = VolumeState::InUse;
            // It might be started, or given another volume, at the same time.
            changes.expect_unchanged::<Instance>(tables, &instance.id);
            changes.replace(tables, &volume);
            Ok(())
        });
        attached.await?;
        find::volume(&self.host.records.read(), id)
    }

    /// Takes a volume from its instance, which must be stopped. Where it is detached already, nothing changes.
    ///
    /// # Errors
    ///
    /// There is no such volume, its instance is not stopped, or it is that one's root disk.
    pub async fn detach_volume(&self, id: &str) -> Result<Arc<Volume>, Error> {
        let detached = self.host.records.update(|tables, changes| {
            let mut volume = (*find::volume(tables, id)?).clone();
            let Some(attachment) = &volume.attachment else {
                return match volume.state {
                    VolumeState::Available => Ok(()),
                    _ => Err(wrong_state(&volume, "only a volume in use can be detached")),
                };
            };
            let instance = find::instance(tables, &attachment.instance_id)?;
            if instance.root_volume == volume.id {
                let why =
                    format!("volume {id} is the root disk of instance {}, and stays with it", instance.id);
                return Err(Error::NotPermitted(why));
            }
            check_stopped(&instance, "volumes are detached while it is stopped: its guest may be writing")?;
            check_not_copied(tables, id)?;
            volume.attachment = None;
            if volume.state == VolumeState::InUse {
                volume.state = VolumeState::Available;
            }
            changes.expect_unchanged::<Instance>(tables, &instance.id);
            changes.replace(tables, &volume);
            Ok(())
        });
        detached.await?;
        find::volume(&self.host.records.read(), id)
    }

    /// Changes a volume. A larger size is there when this returns.
    ///
    /// # Errors
    ///
    /// There is no such volume, it would have to shrink, or its instance is not stopped.
    pub async fn modify_volume(&self, id: &str, request: &ModifyVolume) -> Result<Arc<Volume>, Error> {
        if let Some(tags) = &request.tags {
            check_tags(tags)?;
        }
        let size = request.size_gib.map(|gib| volume_size(Some(gib), None)).transpose()?;
        // Nobody boots or copies the instance's disks meanwhile.
        let instance = {
            let volume = find::volume(&self.host.records.read(), id)?;
            volume.attachment.as_ref().map(|attachment| attachment.instance_id.clone())
        };
        let held = match (size, instance) {
            (Some(_), Some(instance)) => {
                let stopped = find::instance(&self.host.records.read(), &instance)?;
                check_stopped(&stopped, RESIZE_STOPPED)?;
                Some(self.hold(&instance).await?)
            }
            _ => None,
        };
        let modified = self.modify_held(id, request, size).await;
        if let Some(held) = held {
            held.release().await;
        }
        modified?;
        find::volume(&self.host.records.read(), id)
    }

    async fn modify_held(&self, id: &str, request: &ModifyVolume, size: Option<u64>) -> Result<(), Error> {
        let modified = self.host.records.update(|tables, changes| {
            let mut volume = (*find::volume(tables, id)?).clone();
            if let Some(size) = size {
                if size < volume.size {
                    let least = volume.size.div_ceil(GIB);
                    return Err(Error::invalid(
                        "size_gib",
                        format_args!("must be {least} at least: volumes do not shrink"),
                    ));
                }
                if !matches!(volume.state, VolumeState::Available | VolumeState::InUse) {
                    return Err(wrong_state(&volume, "only an available volume, or one in use, can grow"));
                }
                check_not_copied(tables, id)?;
                if let Some(attachment) = &volume.attachment {
                    check_stopped(&*find::instance(tables, &attachment.instance_id)?, RESIZE_STOPPED)?;
                    changes.expect_unchanged::<Instance>(tables, &attachment.instance_id);
                }
                volume.size = size;
            }
            if let Some(delete) = request.delete_on_termination {
                let Some(attachment) = &mut volume.attachment else {
                    return Err(wrong_state(&volume, "delete_on_termination is for volumes in use"));
                };
                attachment.delete_on_termination = delete;
            }
            if let Some(tags) = &request.tags {
                volume.tags.clone_from(tags);
            }
            changes.replace(tables, &volume);
            Ok(())
        });
        modified.await?;
        if size.is_some() {
            self.grow_file(id).await?;
        }
        Ok(())
    }

    /// Makes a volume's file as large as its record says, and with it the file system where that is ours: an
    /// instance's layer. Can be done again.
    async fn grow_file(&self, id: &str) -> Result<(), Error> {
        let (volume, is_layer) = {
            let tables = self.host.records.read();
            let volume = find::volume(&tables, id)?;
            let is_layer = has_layer(&tables, &volume);
            (volume, is_layer)
        };
        let volumes = self.host.volumes.clone();
        let grown = tokio::task::spawn_blocking(move || {
            if !volumes.exists(&volume.id)? {
                return Ok(()); // It is made at its instance's first boot.
            }
            volumes.grow(&volume.id, volume.size)?;
            if is_layer { volumes.grow_file_system(&volume.id, &crate::files::Task::quiet()) } else { Ok(()) }
        });
        Ok(grown.await??)
    }

    /// Volumes whose files did not get as large as they were to be before a daemon died.
    pub(super) async fn finish_growing(&self) -> Result<(), Error> {
        let volumes: Vec<Arc<Volume>> = self.host.records.read().volumes.iter().cloned().collect();
        for volume in volumes {
            let settled = matches!(volume.state, VolumeState::Available | VolumeState::InUse);
            let smaller = self.host.volumes.usage(&volume.id).is_ok_and(|usage| usage.size < volume.size);
            if settled && smaller {
                tracing::info!(volume = volume.id, "grows as it was asked to before");
                self.grow_file(&volume.id).await?;
            }
        }
        Ok(())
    }

    /// Deletes a volume. It is `deleting`, and soon gone. One that is being made is given up.
    ///
    /// # Errors
    ///
    /// There is none, or it is attached.
    pub async fn delete_volume(&self, id: &str) -> Result<Arc<Volume>, Error> {
        let deleted = self.host.records.update(|tables, changes| {
            let mut volume = (*find::volume(tables, id)?).clone();
            if let Some(attachment) = &volume.attachment {
                let by = format!("instance {}: stop it and detach the volume first", attachment.instance_id);
                return Err(Error::InUse { kind: Kind::Volume, id: id.to_owned(), by });
            }
            if volume.state != VolumeState::Deleting {
                check_not_copied(tables, id)?;
                volume.state = VolumeState::Deleting;
                volume.progress = None;
                changes.replace(tables, &volume);
            }
            Ok(volume)
        });
        let deleted = deleted.await?;
        self.jobs.cancel(id);
        Ok(Arc::new(deleted))
    }
}

const RESIZE_STOPPED: &str = "its volumes grow while it is stopped: a running guest would not see it";

/// Whether a volume is a layer over an image's read-only root file system, which is ext4 and ours.
fn has_layer(tables: &Tables, volume: &Volume) -> bool {
    let instance = volume.attachment.as_ref().and_then(|a| tables.instances.get(&a.instance_id));
    let Some(instance) = instance.filter(|instance| instance.root_volume == volume.id) else { return false };
    let manifest = |image: &Arc<Image>| image.manifest.clone();
    let manifest = tables.images.get(&instance.image_id).and_then(manifest);
    manifest.is_some_and(|manifest| matches!(manifest.root, Root::Erofs { .. }))
}
