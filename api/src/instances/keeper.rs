//! Makes and removes the files of volumes, until they are as the records say: `creating` ones are made, `deleting`
//! ones removed. Both can be done again, so a daemon that was killed in between starts over.

use std::sync::Arc;
use std::time::Duration;

use super::error::Error;
use super::jobs::Work;
use super::{Service, failure};
use crate::fault;
use crate::files::FileError;
use crate::model::{Volume, VolumeState};
use crate::volume::{Content, VolumeError};

/// After an error that is the host's.
const RETRY_AFTER: Duration = Duration::from_secs(5);

fn needs_work(volume: &Volume) -> bool {
    matches!(volume.state, VolumeState::Creating | VolumeState::Deleting)
}

impl Service {
    /// Takes up whatever volumes are in the making or on their way out.
    pub(super) fn keep_volumes(&self) {
        let ids: Vec<String> = {
            let tables = self.host.records.read();
            tables
                .volumes
                .iter()
                .filter(|volume| needs_work(volume))
                .map(|volume| volume.id.clone())
                .collect()
        };
        ids.iter().for_each(|id| self.keep_volume(id));
    }

    /// Looks after a volume whose record has changed.
    pub(super) fn volume_changed(&self, volume: &Volume) {
        if needs_work(volume) {
            self.keep_volume(&volume.id);
        }
    }

    fn keep_volume(&self, id: &str) {
        let (service, own) = (self.clone(), id.to_owned());
        self.jobs.run(id, move |work| {
            let volume = service.host.records.get::<Volume>(&own).filter(|volume| needs_work(volume))?;
            Some(service.clone().settle(volume, work))
        });
    }

    async fn settle(self, volume: Arc<Volume>, work: Work) {
        let settled = match volume.state {
            VolumeState::Creating => self.make(&volume, &work).await,
            _ => self.remove(&volume).await,
        };
        if let Err(error) = settled {
            tracing::warn!(volume = volume.id, "will be tried again: {error}");
            tokio::time::sleep(RETRY_AFTER).await;
        }
    }

    /// Makes the file of a volume, and writes down what came of it.
    async fn make(&self, volume: &Volume, work: &Work) -> Result<(), Error> {
        let volumes = self.host.volumes.clone();
        let (id, size, snapshot) = (volume.id.clone(), volume.size, volume.snapshot_id.clone());
        let making = work.blocking(move |task| match &snapshot {
            Some(snapshot) => volumes.restore(snapshot, &id, size, task),
            None => volumes.create(&id, Content::Blank, size, task),
        });
        let note = |volume: &mut Volume, progress| {
            if volume.state == VolumeState::Creating {
                volume.progress = Some(progress);
            }
        };
        let made = work.noted(&self.host, &volume.id, note, making).await;
        if let Err(Error::Volume(VolumeError::File(FileError::Cancelled))) = made {
            // It is to be deleted, or the daemon ends.
            return Ok(());
        }
        fault::point("volume.made");
        let modified = self.host.records.modify(&volume.id, |volume: &mut Volume| {
            if volume.state != VolumeState::Creating {
                return Ok(());
            }
            volume.progress = None;
            volume.state = match (&made, &volume.attachment) {
                (Ok(()), None) => VolumeState::Available,
                (Ok(()), Some(_)) => VolumeState::InUse,
                (Err(error), _) => {
                    volume.state_reason = Some(failure::reason(error));
                    VolumeState::Error
                }
            };
            Ok::<_, Error>(())
        });
        modified.await?;
        if let Err(error) = made {
            tracing::warn!(volume = volume.id, "could not be made: {error}");
        }
        Ok(())
    }

    /// Removes the file of a volume, and then its record.
    async fn remove(&self, volume: &Volume) -> Result<(), Error> {
        let (volumes, id) = (self.host.volumes.clone(), volume.id.clone());
        tokio::task::spawn_blocking(move || volumes.delete(&id)).await??;
        fault::point("volume.removed");
        let removed = self.host.records.update(|tables, changes| {
            if tables.volumes.get(&volume.id).is_some() {
                changes.delete::<Volume>(tables, &volume.id);
            }
            Ok::<_, Error>(())
        });
        removed.await
    }
}
